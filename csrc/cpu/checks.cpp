#include "checks.h"

#include <cstdint>

namespace squeezellm_hf {
namespace {

struct Cpu {
  static constexpr int64_t kMost = INT32_MAX;
  bool holds(const Tensor& tensor) const { return tensor.is_cpu(); }
  std::string words() const { return "on the CPU"; }
};

}  // namespace

DType float_dtype(const char* name, ScalarType dtype) { return argument_checks::float_dtype<DType>(name, dtype); }

DType check_floats(const char* name, const Tensor& tensor) {
  argument_checks::check_place(name, tensor, Cpu{});
  return float_dtype(name, tensor.scalar_type());
}

LutWeight check_weight(const Tensor& qweight, const Tensor& lookup_table, const std::optional<Tensor>& crow_indices,
                       const std::optional<Tensor>& col_indices, const std::optional<Tensor>& values, int64_t bits,
                       int64_t in_features) {
  return argument_checks::check_weight<LutWeight>(qweight, lookup_table, crow_indices, col_indices, values, bits,
                                                  in_features, Cpu{});
}

}  // namespace squeezellm_hf
