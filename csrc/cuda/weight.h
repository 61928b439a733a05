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
  float* workspace;  // linear_tensor_core and finish_linear: [linear_slices(call), batch, out_features]
  // finish_linear and linear_warpgroup_pairs: [in_features, transposed_batch(batch)] in the dtype of x, null without a
  // sparse part.
  void* transposed_x;
  void* parts;       // linear_warpgroup_dense: parts_bytes(call) bytes, null where these are none
  void* permuted_x;  // linear_warpgroup_pairs: [batch, permuted_columns(call)] in the dtype of x
  void* pages;       // linear_warpgroup_sparse: sparse_page_words(call) words of 4 bytes
  int capability;    // the device's, major
  int multiprocessors;
  int shared_memory;  // bytes that a block may have
  cudaStream_t stream;
};

// What a group's launch does besides, for one row of activations; pointers are null where it does not. Each step is
// rounded to the dtype of x, like those of a model's own layers; but from compute capability 9.0 on, with bf16,
// x * norm_weight is, and the result is multiplied by the norm's scale before it is rounded.
struct Fusion {
  const void* norm_weight = nullptr;  // [in_features]: x is norm_weight * x / sqrt(mean(x^2) + norm_epsilon)
  float norm_epsilon = 0;
  int silu = -1;                   // of this weight, y is silu(y)
  const void* factor = nullptr;    // [in_features]: x is x * factor
  const void* residual = nullptr;  // [out_features], of the only weight: added to y

  bool is_none() const { return norm_weight == nullptr && silu < 0 && factor == nullptr && residual == nullptr; }
};

// What of Fusion is done by a kernel of its own, for any rows and any float dtype; x and out may be one.
struct RowsCall {
  const void* x;  // [rows, columns], as out is
  void* out;
  DType dtype;
  int64_t rows;
  int64_t columns;
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
// Batches 1 to kSmallBatch.
cudaError_t linear_small_batch(const LinearCall& call);
// Batches 1 to kSmallBatch on compute capability 9.0; only where is_aligned(call) and can_stream.
cudaError_t linear_streamed(const LinearCall& call);
// Whether this library was compiled for compute capability 9.0; asked on a device of this one, 9 or later.
bool can_stream(int capability);
// Whether x fits beside its tables; elsewhere it calls linear_small_batch.
bool fits_streamed(const LinearCall& call);
// The same for up to kMostGrouped calls of one x in one launch; only where can_stream and can_stream_group(). No
// out_features may be 0. Nothing is launched where x does not fit.
cudaError_t linear_streamed_group(const LinearCall* calls, int count, const Fusion& fusion, bool& launched);
// Whether they suit it: batch 1, alike in all but out_features, and with a sparse part all or none.
bool can_stream_group(const LinearCall* calls, int count, const Fusion& fusion);
// The same steps elsewhere.
cudaError_t rms_norm(const RowsCall& call, const void* weight, float epsilon);
cudaError_t silu_rows(const RowsCall& call);
cudaError_t multiply_rows(const RowsCall& call, const void* factor);
cudaError_t add_rows(const RowsCall& call, const void* residual);
// Any batch, to be followed by finish_linear; only where is_aligned(call).
cudaError_t linear_tensor_core(const LinearCall& call);
// Adds the workspace's slices, the sparse part and the bias.
cudaError_t finish_linear(const LinearCall& call, int slices);
// On compute capability 9.0, nothing to follow; only where is_aligned(call) and has_warpgroup_kernel(). Any batch, for
// weights without a sparse part:
cudaError_t linear_warpgroup_dense(const LinearCall& call);
int64_t parts_bytes(const LinearCall& call);
// Any batch, for weights with one; only where can_page(call.weight):
cudaError_t linear_warpgroup_sparse(const LinearCall& call);
int64_t sparse_page_words(const LinearCall& call);
// Whether a block of the kernel that sorts the sparse part has the memory to count it by columns.
inline bool can_page(const LutWeight& weight) { return weight.in_features <= (1 << 20); }
// Batches up to kPairsBatch, with and without one, faster:
cudaError_t linear_warpgroup_pairs(const LinearCall& call);
// Whether this library was compiled for what is special to compute capability 9.0 (9.0a).
bool has_warpgroup_kernel();

constexpr int kSmallBatch = 8;
constexpr int kPairsBatch = 64;
constexpr int kMostGrouped = 4;  // weights that share a launch

// Into how many slices of the columns linear_tensor_core divides the work.
int64_t linear_slices(const LinearCall& call);

// Of the copy of x that linear_warpgroup_pairs makes.
inline int64_t permuted_columns(const LinearCall& call) { return (int64_t{call.weight.in_features} + 127) / 128 * 128; }

__host__ __device__ inline int64_t transposed_batch(int64_t batch) { return (batch + 7) / 8 * 8; }

// Whether rows of weights and activations can be read 16 bytes at a time.
inline bool is_aligned(const LinearCall& call) {
  const auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
  return aligned(call.x) && aligned(call.weight.qweight) && call.weight.in_features % 8 == 0 &&
         call.weight.words_per_row % 4 == 0;
}

}  // namespace squeezellm_hf::cuda
