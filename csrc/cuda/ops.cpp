// lut_linear, lut_linear_group and lut_dequantize for torch's CUDA dispatch key. The schemas are declared in Python
// (squeezellm_hf/ops/schema.py); built against torch's stable ABI, so one binary serves every
// torch from 2.11 on.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <vector>

#include "../empty.h"
#include "checks.h"

namespace squeezellm_hf::cuda {
namespace {

using torch::stable::accelerator::DeviceGuard;

// Of torch's C interface; torch has reported the cause on the way.
void check_torch(AOTITorchError error) {
  if (error != AOTI_TORCH_SUCCESS) throw std::runtime_error("a call into torch failed");
}

cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  check_torch(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

void check_launch(cudaError_t error) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("CUDA kernel launch failed: ") + cudaGetErrorString(error));
}

struct DeviceLimits {
  int multiprocessors;
  int shared_memory;  // bytes that a block may have
  int capability;     // major number of the compute capability
};

// Asked of the driver once.
const DeviceLimits& device_limits(int32_t device) {
  static const std::vector<DeviceLimits> all = [] {
    int count = 0;
    check_launch(cudaGetDeviceCount(&count));
    std::vector<DeviceLimits> limits(count);
    for (int i = 0; i < count; ++i) {
      check_launch(cudaDeviceGetAttribute(&limits[i].multiprocessors, cudaDevAttrMultiProcessorCount, i));
      check_launch(cudaDeviceGetAttribute(&limits[i].shared_memory, cudaDevAttrMaxSharedMemoryPerBlockOptin, i));
      check_launch(cudaDeviceGetAttribute(&limits[i].capability, cudaDevAttrComputeCapabilityMajor, i));
    }
    return limits;
  }();
  return all.at(device);
}

// y = x W^T + bias by torch's own matrix product, for a W in the dtype of x.
Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  std::optional<Tensor> bias_as_x;
  if (bias.has_value()) {
    bias_as_x = bias->scalar_type() == x.scalar_type() ? *bias : torch::stable::to(*bias, x.scalar_type());
  }
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x), torch::stable::detail::from(weight),
                                    torch::stable::detail::from(bias_as_x)};
  check_torch(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor dequantize_to(const LutWeight& weight, const Tensor& like, ScalarType dtype, cudaStream_t stream) {
  Tensor out = torch::stable::new_empty(like, {weight.out_features, weight.in_features}, dtype);
  if (out.numel() == 0) return out;
  check_launch(dequantize({weight, out.mutable_data_ptr(), float_dtype("dtype", dtype), stream}));
  return out;
}

// The largest batch for which the weight is not dequantized first: beyond, that is repaid by the library's
// matrix product. Measured on an H200.
int64_t most_fused(const LinearCall& call, bool warpgroups) {
  const bool sparse = call.weight.crow_indices != nullptr;
  if (!warpgroups) return sparse ? 128 : 256;
  // There sparse values are rounded to the dtype of x: into its range, if they are of that dtype.
  const bool in_range = call.dtype != DType::kFloat16 || call.weight.values_dtype == DType::kFloat16;
  if (sparse) return can_page(call.weight) && in_range ? 512 : kPairsBatch;
  return 2048;
}

// Whether the kernels of lut_linear hold the tables in the dtype of x without leaving its range.
bool fits(const LinearCall& call) {
  const int bits = call.weight.bits;
  const bool narrow_range = call.dtype == DType::kFloat16 && call.weight.table_dtype != DType::kFloat16;
  return call.dtype != DType::kFloat32 && !narrow_range && bits >= 2 && bits <= 4 && call.weight.in_features > 0;
}

// Whether linear_warpgroup_pairs serves: also the largest of the small batches, of which linear_streamed is not faster,
// and those from three on whose x is too much for its memory. With a sparse part that one is faster, on few and short
// rows.
bool suits_pairs(const LinearCall& call, bool warpgroups) {
  constexpr int kStreamed = 4;
  constexpr int kMany = 8192;
  if (!warpgroups || call.batch > kPairsBatch || call.batch <= 2 || !is_aligned(call)) return false;
  if (call.batch > kSmallBatch || !fits_streamed(call)) return true;
  if (call.batch <= kStreamed) return false;
  return call.weight.crow_indices == nullptr || call.weight.in_features > kMany || call.weight.out_features > kMany;
}

// By the kernel that suits the batch; what kernels hand to each other lies in memory that is allocated here.
void launch_linear(LinearCall& call, const Tensor& x, bool warpgroups) {
  const bool sparse = call.weight.crow_indices != nullptr;
  const bool pairs = suits_pairs(call, warpgroups);
  const int64_t batch = call.batch;
  if (!pairs && batch <= kSmallBatch) {
    const bool streamed = call.capability >= 9 && is_aligned(call) && can_stream(call.capability);
    return check_launch(streamed ? linear_streamed(call) : linear_small_batch(call));
  }
  if (!pairs && warpgroups && sparse) {
    const Tensor pages = empty(x, {sparse_page_words(call)}, aoti_torch_dtype_int32());
    call.pages = pages.mutable_data_ptr();
    return check_launch(linear_warpgroup_sparse(call));
  }
  if (!pairs && warpgroups) {
    std::optional<Tensor> parts;
    if (const int64_t bytes = parts_bytes(call); bytes > 0) {
      parts = empty(x, {bytes}, aoti_torch_dtype_uint8());
      call.parts = parts->mutable_data_ptr();
    }
    return check_launch(linear_warpgroup_dense(call));
  }
  std::optional<Tensor> transposed;
  if (sparse) {
    transposed = empty(x, {call.weight.in_features, transposed_batch(batch)});
    call.transposed_x = transposed->mutable_data_ptr();
  }
  if (pairs) {
    const Tensor permuted = empty(x, {batch, permuted_columns(call)});
    call.permuted_x = permuted.mutable_data_ptr();
    return check_launch(linear_warpgroup_pairs(call));
  }
  const int64_t slices = linear_slices(call);
  const Tensor workspace = empty(x, {slices, batch, call.weight.out_features}, aoti_torch_dtype_float32());
  call.workspace = static_cast<float*>(workspace.mutable_data_ptr());
  check_launch(linear_tensor_core(call));
  check_launch(finish_linear(call, static_cast<int>(slices)));
}

// A call whose arguments have been checked, and what it needs of them besides.
struct Checked {
  LinearCall call{};
  std::optional<Tensor> bias;  // contiguous
  std::vector<int64_t> y_sizes;
  int64_t batch = 1;

  bool is_empty() const { return batch == 0 || call.weight.out_features == 0; }
};

// On the current device, that of x.
Checked check_linear(const Tensor& x, const Tensor& qweight, const Tensor& lookup_table,
                     const std::optional<Tensor>& crow_indices, const std::optional<Tensor>& col_indices,
                     const std::optional<Tensor>& values, const std::optional<Tensor>& bias, int64_t bits) {
  Checked checked;
  LinearCall& call = checked.call;
  const int32_t device = x.get_device_index();
  call.dtype = check_floats("x", x, device);
  const int64_t in_features = x.size(x.dim() - 1);
  call.weight = check_weight(qweight, lookup_table, crow_indices, col_indices, values, bits, in_features, device);
  const int64_t out_features = call.weight.out_features;
  call.stream = current_stream(device);

  checked.y_sizes.assign(x.sizes().begin(), x.sizes().end());
  checked.y_sizes.back() = out_features;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) checked.batch *= x.size(d);

  if (bias.has_value()) {
    call.bias_dtype = check_floats("bias", *bias, device);
    if (bias->dim() != 1 || bias->size(0) != out_features)
      fail("bias must have the shape [" + std::to_string(out_features) + "]");
    checked.bias = bias->is_contiguous() ? *bias : torch::stable::contiguous(*bias);
    call.bias = checked.bias->const_data_ptr();
  }
  const DeviceLimits& limits = device_limits(device);
  call.capability = limits.capability;
  call.multiprocessors = limits.multiprocessors;
  call.shared_memory = limits.shared_memory;
  call.batch = static_cast<int>(checked.batch);
  return checked;
}

// x is contiguous.
Tensor run_linear(Checked& checked, const Tensor& x) {
  if (checked.is_empty()) return empty(x, checked.y_sizes);
  LinearCall& call = checked.call;
  call.x = x.const_data_ptr();
  const int64_t batch = checked.batch;
  const bool small = batch <= kSmallBatch;
  const bool warpgroups = call.capability == 9 && has_warpgroup_kernel();
  if (!fits(call) || batch > most_fused(call, warpgroups) || (!small && !is_aligned(call))) {
    // A 16-bit product of tables beyond fp16's range goes through fp32.
    const bool through_fp32 = call.dtype == DType::kFloat16 && call.weight.table_dtype != DType::kFloat16;
    const ScalarType dtype = through_fp32 ? ScalarType::Float : x.scalar_type();
    const Tensor weight = dequantize_to(call.weight, x, dtype, call.stream);
    if (!through_fp32) return linear(x, weight, checked.bias);
    return torch::stable::to(linear(torch::stable::to(x, dtype), weight, checked.bias), x.scalar_type());
  }
  Tensor y = empty(x, checked.y_sizes);
  call.y = y.mutable_data_ptr();
  launch_linear(call, x, warpgroups);
  return y;
}

Tensor lut_linear(const Tensor& x, const Tensor& qweight, const Tensor& lookup_table,
                  const std::optional<Tensor>& crow_indices, const std::optional<Tensor>& col_indices,
                  const std::optional<Tensor>& values, const std::optional<Tensor>& bias, int64_t bits) {
  if (x.dim() < 1) fail("x must have at least one dimension, got none");
  const DeviceGuard guard(x.get_device_index());
  Checked checked = check_linear(x, qweight, lookup_table, crow_indices, col_indices, values, bias, bits);
  return run_linear(checked, x.is_contiguous() ? x : torch::stable::contiguous(x));
}

using Tensors = std::vector<Tensor>;
using Optional = std::optional<Tensor>;
using Optionals = std::vector<Optional>;

// What a group does besides (Fusion), as tensors: contiguous, and like x in dtype.
struct Besides {
  Optional norm_weight;
  double norm_eps;
  int64_t silu;
  Optional factor;
  Optional residual;
};

Optional checked_like(const char* name, const Optional& tensor, const Tensor& x, const std::vector<int64_t>& sizes) {
  if (!tensor.has_value()) return tensor;
  check_floats(name, *tensor, x.get_device_index());
  bool same = tensor->scalar_type() == x.scalar_type() && tensor->dim() == static_cast<int64_t>(sizes.size());
  for (size_t d = 0; same && d < sizes.size(); ++d) same = tensor->size(d) == sizes[d];
  if (!same) {
    std::string shape;
    for (const int64_t size : sizes) shape += (shape.empty() ? "" : ", ") + std::to_string(size);
    fail(std::string(name) + " must have the dtype of x and the shape [" + shape + "], got " +
         argument_checks::describe(*tensor));
  }
  return tensor->is_contiguous() ? tensor : torch::stable::contiguous(*tensor);
}

Besides check_besides(const Tensor& x, const std::vector<Checked>& all, Besides given) {
  if (given.norm_weight.has_value() && given.factor.has_value()) fail("norm_weight and factor must not both be given");
  if (given.silu < -1 || given.silu >= static_cast<int64_t>(all.size()))
    fail("silu must be the place of a weight, or -1, got " + std::to_string(given.silu));
  if (given.residual.has_value() && all.size() != 1)
    fail("residual is for one weight, got " + std::to_string(all.size()));
  const std::vector<int64_t> x_sizes(x.sizes().begin(), x.sizes().end());
  given.norm_weight = checked_like("norm_weight", given.norm_weight, x, {x_sizes.back()});
  given.factor = checked_like("factor", given.factor, x, x_sizes);
  if (given.residual.has_value()) given.residual = checked_like("residual", given.residual, x, all[0].y_sizes);
  return given;
}

const void* pointer_of(const Optional& tensor) { return tensor.has_value() ? tensor->const_data_ptr() : nullptr; }

// Whether the calls, which are of one x, are one launch.
bool suits_group(const std::vector<Checked>& all, const std::vector<LinearCall>& calls, const Fusion& fusion) {
  for (const Checked& checked : all) {
    if (checked.batch != 1 || checked.is_empty() || !fits(checked.call)) return false;
    if (checked.call.capability < 9 || !can_stream(checked.call.capability)) return false;
  }
  return can_stream_group(calls.data(), static_cast<int>(calls.size()), fusion);
}

// A launch for each weight and each step.
Tensors run_one_by_one(std::vector<Checked>& all, Tensor x, const Besides& besides) {
  Tensors ys;
  if (all.empty()) return ys;
  const LinearCall& call = all[0].call;
  const auto rows = [&](const Tensor& from, Tensor& to) {
    const int64_t columns = from.size(from.dim() - 1);
    return RowsCall{from.const_data_ptr(), to.mutable_data_ptr(), call.dtype, all[0].batch, columns, call.stream};
  };
  if (besides.norm_weight.has_value() || besides.factor.has_value()) {
    Tensor changed = empty(x, {x.sizes().begin(), x.sizes().end()});
    const RowsCall step = rows(x, changed);
    check_launch(besides.factor.has_value()
                     ? multiply_rows(step, besides.factor->const_data_ptr())
                     : rms_norm(step, besides.norm_weight->const_data_ptr(), static_cast<float>(besides.norm_eps)));
    x = changed;
  }
  for (Checked& checked : all) ys.push_back(run_linear(checked, x));
  if (besides.silu >= 0) check_launch(silu_rows(rows(ys[besides.silu], ys[besides.silu])));
  if (besides.residual.has_value()) check_launch(add_rows(rows(ys[0], ys[0]), besides.residual->const_data_ptr()));
  return ys;
}

Tensors lut_linear_group(const Tensor& x, Tensors qweight, Tensors lookup_table, Optionals crow_indices,
                         Optionals col_indices, Optionals values, Optionals bias, int64_t bits, Optional norm_weight,
                         double norm_eps, int64_t silu, Optional factor, Optional residual) {
  const size_t count = qweight.size();
  for (const size_t size : {lookup_table.size(), crow_indices.size(), col_indices.size(), values.size(), bias.size()})
    if (size != count) fail("the lists must be of one length");
  if (x.dim() < 1) fail("x must have at least one dimension, got none");
  const DeviceGuard guard(x.get_device_index());
  const Tensor x_contiguous = x.is_contiguous() ? x : torch::stable::contiguous(x);

  std::vector<Checked> all;
  std::vector<LinearCall> calls;
  for (size_t i = 0; i < count; ++i) {
    try {
      all.push_back(
          check_linear(x, qweight[i], lookup_table[i], crow_indices[i], col_indices[i], values[i], bias[i], bits));
    } catch (const std::invalid_argument& error) {
      fail("weight " + std::to_string(i) + " of the group: " + error.what());
    }
    calls.push_back(all[i].call);
    calls[i].x = x_contiguous.const_data_ptr();
  }
  const Besides besides = check_besides(x, all, {norm_weight, norm_eps, silu, factor, residual});
  const Fusion fusion{pointer_of(besides.norm_weight), static_cast<float>(norm_eps), static_cast<int>(silu),
                      pointer_of(besides.factor), pointer_of(besides.residual)};
  if (suits_group(all, calls, fusion)) {
    Tensors ys;
    for (size_t i = 0; i < count; ++i) {
      ys.push_back(empty(x, all[i].y_sizes));
      calls[i].y = ys[i].mutable_data_ptr();
    }
    bool launched = false;
    check_launch(linear_streamed_group(calls.data(), static_cast<int>(count), fusion, launched));
    if (launched) return ys;
  }
  return run_one_by_one(all, x_contiguous, besides);
}

Tensor lut_dequantize(const Tensor& qweight, const Tensor& lookup_table, const std::optional<Tensor>& crow_indices,
                      const std::optional<Tensor>& col_indices, const std::optional<Tensor>& values, int64_t bits,
                      int64_t in_features, ScalarType dtype) {
  const int32_t device = qweight.get_device_index();
  const DeviceGuard guard(device);
  const LutWeight weight =
      check_weight(qweight, lookup_table, crow_indices, col_indices, values, bits, in_features, device);
  return dequantize_to(weight, lookup_table, dtype, current_stream(device));
}

}  // namespace
}  // namespace squeezellm_hf::cuda

STABLE_TORCH_LIBRARY_IMPL(squeezellm_hf, CUDA, library) {
  library.impl("lut_linear", TORCH_BOX(&squeezellm_hf::cuda::lut_linear));
  library.impl("lut_linear_no_grad", TORCH_BOX(&squeezellm_hf::cuda::lut_linear));
  library.impl("lut_linear_group", TORCH_BOX(&squeezellm_hf::cuda::lut_linear_group));
  library.impl("lut_dequantize", TORCH_BOX(&squeezellm_hf::cuda::lut_dequantize));
}
