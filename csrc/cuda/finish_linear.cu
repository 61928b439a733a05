// The end of linear_tensor_core: y = sum of the slices + sparse part + bias.
//
// A sparse value meets one activation of every batch row. They lie in_features apart, so x is
// transposed first: then one value costs one line instead of a line for each batch row.
#include "common.cuh"

namespace squeezellm_hf::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpLanes;
constexpr int kTile = 32;

__global__ void __launch_bounds__(kThreads)
    transpose_kernel(const uint16_t* x, uint16_t* transposed, int batch, int in_features) {
  __shared__ uint16_t tile[kTile][kTile + 2];
  const int lane = threadIdx.x % kWarpLanes;
  const int warp = threadIdx.x / kWarpLanes;
  const int k = blockIdx.x * kTile;
  const int n = blockIdx.y * kTile;
  for (int i = warp; i < kTile; i += kWarps)
    if (n + i < batch && k + lane < in_features) tile[i][lane] = x[int64_t{n + i} * in_features + k + lane];
  __syncthreads();
  for (int i = warp; i < kTile; i += kWarps)
    if (n + lane < batch && k + i < in_features) transposed[int64_t{k + i} * batch + n + lane] = tile[lane][i];
}

// A block: 32 rows and 32 batch rows; a warp: 4 of the rows, a lane: one batch row.
template <class T>
__global__ void __launch_bounds__(kThreads) finish_kernel(const LinearCall call, int slices, const T* transposed) {
  __shared__ float tile[kTile][kTile + 1];
  const LutWeight& weight = call.weight;
  const int lane = threadIdx.x % kWarpLanes;
  const int warp = threadIdx.x / kWarpLanes;
  const int first_row = blockIdx.x * kTile;
  const int first_column = blockIdx.y * kTile;
  if (transposed != nullptr) {
    const int n = min(first_column + lane, call.batch - 1);
    for (int r = warp; r < kTile; r += kWarps) {
      const int row = first_row + r;
      if (row >= weight.out_features) break;
      const int2 entries = sparse_row(weight, row);
      float sum = 0.0f;
#pragma unroll 8
      for (int entry = entries.x; entry < entries.y; ++entry)
        sum += load_float(weight.values, weight.values_dtype, entry) *
               to_float(transposed[int64_t{sparse_column(weight, entry)} * call.batch + n]);
      tile[lane][r] = sum;
    }
    __syncthreads();
  }
  const int row = first_row + lane;
  if (row >= weight.out_features) return;
  const float bias = call.bias == nullptr ? 0.0f : load_float(call.bias, call.bias_dtype, row);
  for (int i = warp; i < kTile; i += kWarps) {
    const int n = first_column + i;
    if (n >= call.batch) break;
    float sum = bias;
    for (int s = 0; s < slices; ++s)
      sum += call.workspace[(int64_t{s} * call.batch + n) * weight.out_features + row];
    if (transposed != nullptr) sum += tile[i][lane];
    static_cast<T*>(call.y)[int64_t{n} * weight.out_features + row] = from_float<T>(sum);
  }
}

template <class T>
cudaError_t launch(const LinearCall& call, int slices) {
  T* transposed = nullptr;
  const int batch_tiles = (call.batch + kTile - 1) / kTile;
  if (call.weight.crow_indices != nullptr) {
    transposed = static_cast<T*>(call.transposed_x);
    const dim3 grid((call.weight.in_features + kTile - 1) / kTile, batch_tiles);
    transpose_kernel<<<grid, kThreads, 0, call.stream>>>(static_cast<const uint16_t*>(call.x),
                                                         reinterpret_cast<uint16_t*>(transposed), call.batch,
                                                         call.weight.in_features);
  }
  const dim3 grid((call.weight.out_features + kTile - 1) / kTile, batch_tiles);
  finish_kernel<T><<<grid, kThreads, 0, call.stream>>>(call, slices, transposed);
  return cudaGetLastError();
}

}  // namespace

cudaError_t finish_linear(const LinearCall& call) {
  const int slices = static_cast<int>(linear_slices(call));
  return call.dtype == DType::kFloat16 ? launch<__half>(call, slices) : launch<__nv_bfloat16>(call, slices);
}

}  // namespace squeezellm_hf::cuda
