// Checks of the ops' arguments, for both devices: what they let through, the kernels can read safely.
// A Place says where tensors must be:
//   bool holds(const Tensor&) const     whether a tensor is there
//   std::string words() const           "on the CPU"
//   static constexpr int64_t kMost      the most rows, columns and sparse values that the kernels count
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <stdexcept>
#include <string>

namespace squeezellm_hf::argument_checks {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline constexpr char kFloats[] = "float32, bfloat16 or float16";

// Reaches Python as ValueError.
[[noreturn]] inline void fail(const std::string& message) { throw std::invalid_argument(message); }

inline std::string describe(const Tensor& tensor) {
  std::string text = torch::headeronly::toString(tensor.scalar_type());
  text += " [";
  for (int64_t d = 0; d < tensor.dim(); ++d) text += (d ? ", " : "") + std::to_string(tensor.size(d));
  return text + "]";
}

inline bool is_float(const Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

template <class DType>
DType float_dtype(const char* name, ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      fail(std::string(name) + " must be " + kFloats + ", got " + torch::headeronly::toString(dtype));
  }
}

template <class Place>
void check_place(const char* name, const Tensor& tensor, const Place& place) {
  if (!place.holds(tensor)) fail(std::string(name) + " must be " + place.words() + " like the other tensors");
}

// What a tensor must be; dimensions are -1 where any size will do. In words only when it is not:
// an op call has a few microseconds for everything.
template <size_t kDims, class Place>
void check(const char* name, const Tensor& tensor, const int64_t (&sizes)[kDims], const char* dtypes, bool right_dtype,
           const Place& place) {
  bool fits = right_dtype && tensor.dim() == static_cast<int64_t>(kDims);
  for (size_t d = 0; fits && d < kDims; ++d) fits = sizes[d] < 0 || tensor.size(d) == sizes[d];
  if (!fits) {
    std::string expected = std::string(dtypes) + " [";
    for (size_t d = 0; d < kDims; ++d) {
      if (d > 0) expected += ", ";
      expected += sizes[d] < 0 ? "any" : std::to_string(sizes[d]);
    }
    fail(std::string(name) + " must be " + expected + "], got " + describe(tensor));
  }
  check_place(name, tensor, place);
  if (!tensor.is_contiguous()) fail(std::string(name) + " must be contiguous");
}

// Checks the tensors of a quantized weight against each other and collects their pointers. The
// contents of crow_indices and col_indices are not checked: kernels do not trust them.
template <class LutWeight, class Place>
LutWeight check_weight(const Tensor& qweight, const Tensor& lookup_table, const std::optional<Tensor>& crow_indices,
                       const std::optional<Tensor>& col_indices, const std::optional<Tensor>& values, int64_t bits,
                       int64_t in_features, const Place& place) {
  using DType = decltype(LutWeight::table_dtype);
  using Count = decltype(LutWeight::in_features);
  // Keeps every product of sizes below within int64.
  constexpr int64_t kMost = Place::kMost;
  if (bits < 1 || bits > 8) fail("bits must be 1 to 8, got " + std::to_string(bits));
  if (in_features < 0 || in_features > kMost)
    fail("in_features must be 0 to " + std::to_string(kMost) + ", got " + std::to_string(in_features));

  LutWeight weight{};
  weight.bits = static_cast<int>(bits);
  weight.in_features = static_cast<Count>(in_features);
  weight.words_per_row = (in_features * bits + 31) / 32;
  check("qweight", qweight, {-1, weight.words_per_row}, "int32", qweight.scalar_type() == ScalarType::Int, place);
  const int64_t out = qweight.size(0);
  if (out > kMost) fail("qweight must have at most " + std::to_string(kMost) + " rows, got " + std::to_string(out));
  weight.out_features = static_cast<Count>(out);
  check("lookup_table", lookup_table, {out, int64_t{1} << bits}, kFloats, is_float(lookup_table), place);
  weight.qweight = static_cast<const uint32_t*>(qweight.const_data_ptr());
  weight.lookup_table = lookup_table.const_data_ptr();
  weight.table_dtype = float_dtype<DType>("lookup_table", lookup_table.scalar_type());

  const int given = crow_indices.has_value() + col_indices.has_value() + values.has_value();
  if (given == 0) return weight;
  if (given != 3) fail("crow_indices, col_indices and values must be given together or not at all");

  const bool narrow = col_indices->scalar_type() == ScalarType::Short;
  check("crow_indices", *crow_indices, {out + 1}, "int32", crow_indices->scalar_type() == ScalarType::Int, place);
  check("col_indices", *col_indices, {-1}, "int16 (holding uint16) or int32",
        narrow || col_indices->scalar_type() == ScalarType::Int, place);
  weight.nnz = col_indices->size(0);
  if (weight.nnz > kMost) fail("col_indices must have at most " + std::to_string(kMost) + " entries");
  check("values", *values, {weight.nnz}, kFloats, is_float(*values), place);
  if (weight.nnz == 0 || in_features == 0) return weight;
  weight.crow_indices = static_cast<const int32_t*>(crow_indices->const_data_ptr());
  weight.col_indices = col_indices->const_data_ptr();
  weight.values = values->const_data_ptr();
  weight.values_dtype = float_dtype<DType>("values", values->scalar_type());
  weight.wide_columns = !narrow;
  return weight;
}

}  // namespace squeezellm_hf::argument_checks
