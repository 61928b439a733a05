// Which of the two linear kernels serves a call, and the table of kernels of one instruction set.
#pragma once

#include "large_batch.h"
#include "small_batch.h"

namespace squeezellm_hf {

template <class Lanes, class Narrow, class Large>
struct Linear {
  using Small = SmallBatch<Lanes>;

  static int64_t workspace_bytes(const LinearCall& call) {
    return Small::serves(call) ? Small::workspace_bytes(call) : Large::workspace_bytes(call);
  }

  static int64_t scratch_bytes(const LinearCall& call) { return Small::serves(call) ? 0 : Large::scratch_bytes(call); }

  static void pack_activations(const LinearCall& call, int64_t begin, int64_t end) {
    return Small::serves(call) ? Small::pack_activations(call, begin, end) : Large::pack_activations(call, begin, end);
  }

  static void linear_rows(const LinearCall& call, int64_t begin, int64_t end, void* scratch) {
    return Small::serves(call) ? Small::linear_rows(call, begin, end) : Large::linear_rows(call, begin, end, scratch);
  }

  static Kernels kernels(const char* name) {
    return {name,
            Large::kRowBlock,
            workspace_bytes,
            scratch_bytes,
            pack_activations,
            linear_rows,
            dequantize_rows<Lanes, Narrow>};
  }
};

}  // namespace squeezellm_hf
