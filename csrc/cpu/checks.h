// Checks of the ops' arguments: what they let through, the kernels can read safely.
#pragma once

#include <optional>
#include <string>

#include "../argument_checks.h"
#include "kernels/kernels.h"

namespace squeezellm_hf {

using argument_checks::fail;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// fp32, bf16 or fp16 as the kernels name them.
DType float_dtype(const char* name, ScalarType dtype);

// A CPU tensor of the kernels' float types.
DType check_floats(const char* name, const Tensor& tensor);

// Checks the tensors of a quantized weight against each other and collects their pointers. The
// contents of crow_indices and col_indices are not checked: kernels do not trust them.
LutWeight check_weight(const Tensor& qweight, const Tensor& lookup_table, const std::optional<Tensor>& crow_indices,
                       const std::optional<Tensor>& col_indices, const std::optional<Tensor>& values, int64_t bits,
                       int64_t in_features);

}  // namespace squeezellm_hf
