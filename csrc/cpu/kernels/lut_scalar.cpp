// Portable kernels for any width: decode a row to fp32 once, use it for the whole batch.
#include "convert.h"
#include "kernels.h"
#include "sparse.h"

namespace squeezellm_hf {
namespace {

constexpr int64_t kChunk = 512;  // weights decoded at a time; a multiple of 32, so on a word

int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }

void decode(const LutWeight& weight, int64_t row, const float* table, int64_t first, int64_t n, float* out) {
  const uint32_t* words = weight.qweight + row * weight.words_per_row;
  const uint32_t mask = (1u << weight.bits) - 1;
  int64_t next = first * weight.bits / 32;
  uint64_t window = 0;
  int available = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (available < weight.bits) {
      window |= uint64_t{words[next++]} << available;
      available += 32;
    }
    out[i] = table[window & mask];
    window >>= weight.bits;
    available -= weight.bits;
  }
}

// Sixteen partial sums: they bound the rounding error, and the compiler turns them into vectors.
float dot(const float* a, const float* b, int64_t n) {
  float sums[16] = {};
  for (int64_t i = 0; i < n; i += 16)
    for (int j = 0; j < 16; ++j) sums[j] += a[i + j] * b[i + j];
  for (int width = 8; width > 0; width /= 2)
    for (int j = 0; j < width; ++j) sums[j] += sums[j + width];
  return sums[0];
}

// Workspace: x as fp32, rows padded with zeros to a multiple of 16.
int64_t workspace_bytes(const LinearCall& call) {
  return call.batch * padded(call.weight.in_features) * static_cast<int64_t>(sizeof(float));
}

// Scratch: one decoded row.
int64_t scratch_bytes(const LinearCall& call) {
  return padded(call.weight.in_features) * static_cast<int64_t>(sizeof(float));
}

void pack_activations(const LinearCall& call, int64_t begin, int64_t end) {
  const int64_t n = call.weight.in_features;
  for (int64_t b = begin; b < end; ++b) {
    float* packed = static_cast<float*>(call.workspace) + b * padded(n);
    load_floats(call.x, call.dtype, b * n, n, packed);
    for (int64_t i = n; i < padded(n); ++i) packed[i] = 0;
  }
}

void linear_rows(const LinearCall& call, int64_t begin, int64_t end, void* scratch) {
  const LutWeight& weight = call.weight;
  const int64_t n = weight.in_features;
  const int64_t stride = padded(n);
  const float* x = static_cast<const float*>(call.workspace);
  float* decoded = static_cast<float*>(scratch);
  for (int64_t i = n; i < stride; ++i) decoded[i] = 0;
  float table[256];
  for (int64_t row = begin; row < end; ++row) {
    load_floats(weight.lookup_table, weight.table_dtype, row << weight.bits, int64_t{1} << weight.bits, table);
    decode(weight, row, table, 0, n, decoded);
    add_sparse(weight, weight.bits, row, decoded);
    const float bias = call.bias == nullptr ? 0 : element(call.bias, call.bias_dtype, row);
    for (int64_t b = 0; b < call.batch; ++b) {
      const float sum = dot(x + b * stride, decoded, stride) + bias;
      store_floats(&sum, 1, call.y, call.dtype, b * weight.out_features + row);
    }
  }
}

template <class Out>
void dequantize(const DequantizeCall& call, int64_t begin, int64_t end) {
  const LutWeight& weight = call.weight;
  const int64_t n = weight.in_features;
  float table[256];
  float chunk[kChunk];
  for (int64_t row = begin; row < end; ++row) {
    Out* out = static_cast<Out*>(call.out) + row * n;
    load_floats(weight.lookup_table, weight.table_dtype, row << weight.bits, int64_t{1} << weight.bits, table);
    for (int64_t first = 0; first < n; first += kChunk) {
      const int64_t count = n - first < kChunk ? n - first : kChunk;
      decode(weight, row, table, first, count, chunk);
      from_floats(chunk, count, out + first);
    }
    add_sparse(weight, weight.bits, row, out);
  }
}

void dequantize_rows(const DequantizeCall& call, int64_t begin, int64_t end) {
  switch (call.dtype) {
    case DType::kBFloat16:
      return dequantize<bf16>(call, begin, end);
    case DType::kFloat16:
      return dequantize<fp16>(call, begin, end);
    default:
      return dequantize<float>(call, begin, end);
  }
}

}  // namespace

const Kernels& scalar_kernels() {
  static const Kernels kernels = {"scalar",         1,           workspace_bytes, scratch_bytes,
                                  pack_activations, linear_rows, dequantize_rows};
  return kernels;
}

}  // namespace squeezellm_hf
