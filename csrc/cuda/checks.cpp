#include "checks.h"

namespace squeezellm_hf::cuda {
namespace {

struct CudaDevice {
  // Room for a kernel to step a little, or a stride, beyond the end in 32 bits.
  static constexpr int64_t kMost = int64_t{1} << 30;
  int32_t index;
  bool holds(const Tensor& tensor) const { return tensor.is_cuda() && tensor.get_device_index() == index; }
  std::string words() const { return "on the CUDA device " + std::to_string(index); }
};

}  // namespace

DType float_dtype(const char* name, ScalarType dtype) { return argument_checks::float_dtype<DType>(name, dtype); }

DType check_floats(const char* name, const Tensor& tensor, int32_t device) {
  argument_checks::check_place(name, tensor, CudaDevice{device});
  return float_dtype(name, tensor.scalar_type());
}

LutWeight check_weight(const Tensor& qweight, const Tensor& lookup_table, const std::optional<Tensor>& crow_indices,
                       const std::optional<Tensor>& col_indices, const std::optional<Tensor>& values, int64_t bits,
                       int64_t in_features, int32_t device) {
  return argument_checks::check_weight<LutWeight>(qweight, lookup_table, crow_indices, col_indices, values, bits,
                                                  in_features, CudaDevice{device});
}

}  // namespace squeezellm_hf::cuda
