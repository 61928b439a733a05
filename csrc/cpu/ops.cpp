// lut_linear and lut_dequantize for torch's CPU dispatch key. The schemas are declared in Python
// (squeezellm_hf/ops/schema.py); built against torch's stable ABI, so one binary serves every
// torch from 2.11 on.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "../empty.h"
#include "checks.h"
#include "instruction_set.h"

namespace squeezellm_hf {
namespace {

// Multiply-adds and weights worth handing to another thread (some 10 microseconds).
constexpr int64_t kWorkPerThread = 1 << 18;

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
using Buffer = std::unique_ptr<void, Free>;

Buffer allocate(int64_t bytes) {
  const size_t size = (static_cast<size_t>(bytes) + 63) / 64 * 64;
  if (size == 0) return Buffer(nullptr);
  Buffer buffer(std::aligned_alloc(64, size));
  if (buffer == nullptr) throw std::bad_alloc();
  return buffer;
}

// Calls body(begin, end) with begin a multiple of `block`.
template <class Body>
void parallel_over_blocks(int64_t n, int64_t block, int64_t work_per_block, const Body& body) {
  const int64_t blocks = (n + block - 1) / block;
  const int64_t grain = std::max<int64_t>(1, kWorkPerThread / std::max<int64_t>(1, work_per_block));
  torch::stable::parallel_for(0, blocks, grain,
                              [&](int64_t begin, int64_t end) { body(begin * block, std::min(end * block, n)); });
}

Tensor lut_linear(const Tensor& x, const Tensor& qweight, const Tensor& lookup_table,
                  const std::optional<Tensor>& crow_indices, const std::optional<Tensor>& col_indices,
                  const std::optional<Tensor>& values, const std::optional<Tensor>& bias, int64_t bits) {
  if (x.dim() < 1) fail("x must have at least one dimension, got none");
  LinearCall call{};
  call.dtype = check_floats("x", x);
  const int64_t in_features = x.size(x.dim() - 1);
  call.weight = check_weight(qweight, lookup_table, crow_indices, col_indices, values, bits, in_features);
  const int64_t out_features = call.weight.out_features;

  std::vector<int64_t> y_sizes(x.sizes().begin(), x.sizes().end());
  y_sizes.back() = out_features;
  call.batch = 1;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) call.batch *= x.size(d);

  Tensor bias_contiguous;
  if (bias.has_value()) {
    call.bias_dtype = check_floats("bias", *bias);
    if (bias->dim() != 1 || bias->size(0) != out_features)
      fail("bias must have the shape [" + std::to_string(out_features) + "]");
    bias_contiguous = torch::stable::contiguous(*bias);
    call.bias = bias_contiguous.const_data_ptr();
  }

  Tensor y = empty(x, y_sizes);
  if (call.batch == 0 || out_features == 0) return y;
  const Tensor x_contiguous = x.is_contiguous() ? x : torch::stable::contiguous(x);
  call.x = x_contiguous.const_data_ptr();
  call.y = y.mutable_data_ptr();

  const Kernels& kernels = active_kernels();
  const Buffer workspace = allocate(kernels.workspace_bytes(call));
  call.workspace = workspace.get();
  parallel_over_blocks(call.batch, 1, in_features,
                       [&](int64_t begin, int64_t end) { kernels.pack_activations(call, begin, end); });
  const int64_t scratch_bytes = kernels.scratch_bytes(call);
  parallel_over_blocks(out_features, kernels.row_block, kernels.row_block * in_features * call.batch,
                       [&](int64_t begin, int64_t end) {
                         const Buffer scratch = allocate(scratch_bytes);
                         kernels.linear_rows(call, begin, end, scratch.get());
                       });
  return y;
}

Tensor lut_dequantize(const Tensor& qweight, const Tensor& lookup_table, const std::optional<Tensor>& crow_indices,
                      const std::optional<Tensor>& col_indices, const std::optional<Tensor>& values, int64_t bits,
                      int64_t in_features, ScalarType dtype) {
  DequantizeCall call{};
  call.weight = check_weight(qweight, lookup_table, crow_indices, col_indices, values, bits, in_features);
  call.dtype = float_dtype("dtype", dtype);
  Tensor weight = torch::stable::new_empty(lookup_table, {call.weight.out_features, in_features}, dtype);
  call.out = weight.mutable_data_ptr();
  const Kernels& kernels = active_kernels();
  parallel_over_blocks(call.weight.out_features, 1, in_features,
                       [&](int64_t begin, int64_t end) { kernels.dequantize_rows(call, begin, end); });
  return weight;
}

}  // namespace
}  // namespace squeezellm_hf

STABLE_TORCH_LIBRARY_IMPL(squeezellm_hf, CPU, library) {
  library.impl("lut_linear", TORCH_BOX(&squeezellm_hf::lut_linear));
  library.impl("lut_linear_no_grad", TORCH_BOX(&squeezellm_hf::lut_linear));
  library.impl("lut_dequantize", TORCH_BOX(&squeezellm_hf::lut_dequantize));
}
