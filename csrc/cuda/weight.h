// A quantized weight as the CUDA kernels see it. Free of torch headers.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace squeezellm_hf::cuda {

enum class DType : int { kFloat32, kBFloat16, kFloat16 };

// W[o, i] = lookup_table[o, index(o, i)] + sparse[o, i]; formats in squeezellm_hf/formats. Nothing
// that crow_indices or col_indices hold is trusted.
struct LutWeight {
  const uint32_t* qweight;   // [out_features, words_per_row]
  const void* lookup_table;  // [out_features, 2^bits]
  DType table_dtype;
  const int32_t* crow_indices;  // [out_features + 1], null without a sparse part
  const void* col_indices;      // [nnz], uint16 or int32
  const void* values;           // [nnz]
  DType values_dtype;
  bool wide_columns;  // col_indices are int32
  int64_t nnz;
  int64_t words_per_row;
  int in_features;
  int out_features;
  int bits;
};

// y = x W^T + bias, x [batch, in_features] and y [batch, out_features] in one 16-bit dtype.
struct LinearCall {
  LutWeight weight;
  const void* x;
  void* y;
  const void* bias;  // null without one
  DType bias_dtype;
  DType dtype;
  int batch;
  float* workspace;  // linear_workspace_floats(call) floats, null where that is 0
  int multiprocessors;
  cudaStream_t stream;
};

struct DequantizeCall {
  LutWeight weight;
  void* out;  // [out_features, in_features]
  DType dtype;
  cudaStream_t stream;
};

// Each launches on the stream and returns the launch's error.
cudaError_t dequantize(const DequantizeCall& call);
cudaError_t linear_small_batch(const LinearCall& call);

// Largest batch of linear_small_batch.
constexpr int kSmallBatch = 8;

}  // namespace squeezellm_hf::cuda
