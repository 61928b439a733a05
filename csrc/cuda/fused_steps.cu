// The steps of Fusion (weight.h) by kernels of their own, where linear_streamed_group does not serve.
#include "common.cuh"

namespace squeezellm_hf::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpLanes;

// The value in the precision of a dtype.
__device__ float rounded(float value, DType dtype) {
  if (dtype == DType::kFloat16) return to_float(from_float<__half>(value));
  return dtype == DType::kBFloat16 ? to_float(from_float<__nv_bfloat16>(value)) : value;
}

// Not through the read-only path: it may be out.
__device__ float load(const void* data, DType dtype, int64_t i) {
  return float_of_bits(
      dtype == DType::kFloat32 ? static_cast<const uint32_t*>(data)[i] : static_cast<const uint16_t*>(data)[i], dtype);
}

__device__ void store(void* data, DType dtype, int64_t i, float value) {
  switch (dtype) {
    case DType::kFloat16:
      static_cast<__half*>(data)[i] = from_float<__half>(value);
      break;
    case DType::kBFloat16:
      static_cast<__nv_bfloat16*>(data)[i] = from_float<__nv_bfloat16>(value);
      break;
    default:
      static_cast<float*>(data)[i] = value;
  }
}

// A block a row.
__global__ void __launch_bounds__(kThreads) rms_norm_kernel(const RowsCall call, const void* weight, float epsilon) {
  __shared__ float parts[kWarps];
  const int64_t start = blockIdx.x * call.columns;
  float squares = 0;
  for (int64_t i = threadIdx.x; i < call.columns; i += kThreads) {
    const float value = load(call.x, call.dtype, start + i);
    squares += value * value;
  }
  for (int distance = 16; distance > 0; distance /= 2) squares += __shfl_xor_sync(0xffffffff, squares, distance);
  if (threadIdx.x % kWarpLanes == 0) parts[threadIdx.x / kWarpLanes] = squares;
  __syncthreads();
  float total = 0;
  for (int w = 0; w < kWarps; ++w) total += parts[w];
  const float scale = rsqrtf(total / static_cast<float>(call.columns) + epsilon);
  for (int64_t i = threadIdx.x; i < call.columns; i += kThreads) {
    const float value = rounded(load(call.x, call.dtype, start + i) * scale, call.dtype);
    store(call.out, call.dtype, start + i, value * load(weight, call.dtype, i));
  }
}

// out = step(x, other), each element by itself.
template <class Step>
__global__ void __launch_bounds__(kThreads) each_kernel(const RowsCall call, const void* other, const Step step) {
  const int64_t count = call.rows * call.columns;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count; i += int64_t{gridDim.x} * kThreads)
    store(call.out, call.dtype, i, step(load(call.x, call.dtype, i), load(other, call.dtype, i)));
}

struct Silu {
  __device__ float operator()(float x, float) const { return x / (1 + expf(-x)); }
};

struct Multiply {
  __device__ float operator()(float x, float factor) const { return x * factor; }
};

struct Add {
  __device__ float operator()(float x, float residual) const { return x + residual; }
};

template <class Step>
cudaError_t launch_each(const RowsCall& call, const void* other) {
  constexpr int64_t kMostBlocks = 4096;
  const int64_t blocks = (call.rows * call.columns + kThreads - 1) / kThreads;
  if (blocks == 0) return cudaSuccess;
  each_kernel<<<static_cast<int>(blocks < kMostBlocks ? blocks : kMostBlocks), kThreads, 0, call.stream>>>(call, other,
                                                                                                           Step{});
  return cudaGetLastError();
}

}  // namespace

cudaError_t rms_norm(const RowsCall& call, const void* weight, float epsilon) {
  if (call.rows == 0) return cudaSuccess;
  rms_norm_kernel<<<static_cast<unsigned>(call.rows), kThreads, 0, call.stream>>>(call, weight, epsilon);
  return cudaGetLastError();
}

cudaError_t silu_rows(const RowsCall& call) { return launch_each<Silu>(call, call.x); }

cudaError_t multiply_rows(const RowsCall& call, const void* factor) { return launch_each<Multiply>(call, factor); }

cudaError_t add_rows(const RowsCall& call, const void* residual) { return launch_each<Add>(call, residual); }

}  // namespace squeezellm_hf::cuda
