#include "checks.h"

#include <stdexcept>

namespace squeezellm_hf {
namespace {

std::string describe(const Tensor& tensor) {
  std::string text = torch::headeronly::toString(tensor.scalar_type());
  text += " [";
  for (int64_t d = 0; d < tensor.dim(); ++d) text += (d ? ", " : "") + std::to_string(tensor.size(d));
  return text + "]";
}

// Dimensions are -1 where any size will do. `expected()` says in words what the tensor must be, only
// when it is not: an op call has a few microseconds for everything.
template <class Expected>
void check(const char* name, const Tensor& tensor, std::initializer_list<int64_t> sizes, const Expected& expected,
           bool right_dtype) {
  bool fits = right_dtype && tensor.dim() == static_cast<int64_t>(sizes.size());
  int64_t d = 0;
  for (int64_t size : sizes) {
    fits = fits && (size < 0 || tensor.size(d) == size);
    ++d;
  }
  if (!fits) fail(std::string(name) + " must be " + expected() + ", got " + describe(tensor));
  if (!tensor.is_cpu()) fail(std::string(name) + " must be on the CPU like the other tensors");
  if (!tensor.is_contiguous()) fail(std::string(name) + " must be contiguous");
}

bool is_float(const Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

std::string sizes(int64_t a) { return "[" + std::to_string(a) + "]"; }
std::string sizes(int64_t a, int64_t b) { return "[" + std::to_string(a) + ", " + std::to_string(b) + "]"; }

}  // namespace

void fail(const std::string& message) { throw std::invalid_argument(message); }

DType float_dtype(const char* name, ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      fail(std::string(name) + " must be float32, bfloat16 or float16, got " + torch::headeronly::toString(dtype));
  }
}

DType check_floats(const char* name, const Tensor& tensor) {
  if (!tensor.is_cpu()) fail(std::string(name) + " must be on the CPU like the other tensors");
  return float_dtype(name, tensor.scalar_type());
}

LutWeight check_weight(const Tensor& qweight, const Tensor& lookup_table, const std::optional<Tensor>& crow_indices,
                       const std::optional<Tensor>& col_indices, const std::optional<Tensor>& values, int64_t bits,
                       int64_t in_features) {
  if (bits < 1 || bits > 8) fail("bits must be 1 to 8, got " + std::to_string(bits));
  // The upper bound keeps every product of sizes below within int64.
  if (in_features < 0 || in_features > INT32_MAX)
    fail("in_features must be 0 to 2147483647, got " + std::to_string(in_features));

  LutWeight weight{};
  weight.bits = static_cast<int>(bits);
  weight.in_features = in_features;
  weight.words_per_row = (in_features * bits + 31) / 32;
  weight.out_features = qweight.dim() == 2 ? qweight.size(0) : -1;
  const int64_t out = weight.out_features;

  const auto packed = [&] {
    return "int32 [out_features, " + std::to_string(weight.words_per_row) + "] for " + std::to_string(in_features) +
           " in_features at " + std::to_string(bits) + " bits";
  };
  check("qweight", qweight, {-1, weight.words_per_row}, packed, qweight.scalar_type() == ScalarType::Int);
  if (out > INT32_MAX) fail("qweight must have at most 2147483647 rows, got " + std::to_string(out));
  const int64_t entries = int64_t{1} << bits;
  const auto table = [&] { return "float32, bfloat16 or float16 " + sizes(out, entries); };
  check("lookup_table", lookup_table, {out, entries}, table, is_float(lookup_table));
  weight.qweight = static_cast<const uint32_t*>(qweight.const_data_ptr());
  weight.lookup_table = lookup_table.const_data_ptr();
  weight.table_dtype = check_floats("lookup_table", lookup_table);

  const int given = crow_indices.has_value() + col_indices.has_value() + values.has_value();
  if (given == 0) return weight;
  if (given != 3) fail("crow_indices, col_indices and values must be given together or not at all");

  const bool narrow = col_indices->scalar_type() == ScalarType::Short;
  const auto pointers = [&] { return "int32 " + sizes(out + 1); };
  check("crow_indices", *crow_indices, {out + 1}, pointers, crow_indices->scalar_type() == ScalarType::Int);
  const auto columns = [] { return "int16 (holding uint16) or int32 [nnz]"; };
  check("col_indices", *col_indices, {-1}, columns, narrow || col_indices->scalar_type() == ScalarType::Int);
  weight.nnz = col_indices->size(0);
  const auto floats = [&] { return "float32, bfloat16 or float16 " + sizes(weight.nnz) + " like col_indices"; };
  check("values", *values, {weight.nnz}, floats, is_float(*values));
  weight.crow_indices = static_cast<const int32_t*>(crow_indices->const_data_ptr());
  weight.col_indices = col_indices->const_data_ptr();
  weight.values = values->const_data_ptr();
  weight.values_dtype = check_floats("values", *values);
  weight.wide_columns = !narrow;
  return weight;
}

}  // namespace squeezellm_hf
