// The line between torch and arithmetic: everything below it sees raw pointers only.
//
// One `Kernels` table exists per instruction set; cpu/instruction_set.cpp picks one. The files
// that implement them are compiled with instruction-set flags, so they include no torch header and
// no standard header with inline functions: a copy of such a function compiled for AVX-512 could
// be the one the linker keeps for the whole library.
#pragma once

#include <stdint.h>

namespace squeezellm_hf {

enum class DType { kFloat32, kBFloat16, kFloat16 };

static inline constexpr int64_t element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// W[o, i] = lookup_table[o, index(o, i)] + sparse(o, i).
//
// `qweight` is [out_features, words_per_row]; a row is a little-endian stream of `bits`-wide
// indices, least significant bit first. Pointers and counts agree with each other (the caller
// checked); the *contents* of crow_indices and col_indices are untrusted.
struct LutWeight {
  const uint32_t* qweight;
  const void* lookup_table;     // [out_features, 2^bits]
  const int32_t* crow_indices;  // [out_features + 1], null without a sparse part
  const void* col_indices;      // [nnz], uint16 or int32
  const void* values;           // [nnz], of the table's dtype
  int64_t nnz;
  int64_t words_per_row;
  int64_t out_features;
  int64_t in_features;
  int bits;
  DType table_dtype;
  DType values_dtype;
  bool wide_columns;  // int32 columns
};

// y[b, o] = bias[o] + sum_i x[b, i] W[o, i], accumulated in fp32.
struct LinearCall {
  LutWeight weight;
  const void* x;     // [batch, in_features], contiguous
  const void* bias;  // [out_features] or null
  void* y;           // [batch, out_features], contiguous
  void* workspace;   // 64-byte aligned, workspace_bytes(call) long
  int64_t batch;
  DType dtype;  // of x and y
  DType bias_dtype;
};

struct DequantizeCall {
  LutWeight weight;
  void* out;  // [out_features, in_features], contiguous
  DType dtype;
};

struct Kernels {
  const char* name;
  // Rows are handed out in multiples of this, so that a row is always computed in the same company
  // and results do not depend on the number of threads.
  int64_t row_block;
  int64_t (*workspace_bytes)(const LinearCall&);
  int64_t (*scratch_bytes)(const LinearCall&);
  // Converts rows [begin, end) of x into the layout that linear_rows reads. All of x must be
  // packed before the first linear_rows.
  void (*pack_activations)(const LinearCall&, int64_t begin, int64_t end);
  // Computes y[:, begin:end]; begin is a multiple of row_block.
  // `scratch` is 64-byte aligned, scratch_bytes(call) long and the caller's alone.
  void (*linear_rows)(const LinearCall&, int64_t begin, int64_t end, void* scratch);
  void (*dequantize_rows)(const DequantizeCall&, int64_t begin, int64_t end);
};

const Kernels& scalar_kernels();
#ifdef SQUEEZELLM_HF_X86
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
const Kernels& avx512_bf16_kernels();
#endif

}  // namespace squeezellm_hf
