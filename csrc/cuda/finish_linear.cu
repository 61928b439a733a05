// The end of linear_tensor_core: y = sum of the slices + sparse part + bias.
//
// A sparse value meets one activation of every batch row. They lie in_features apart, so x is
// transposed first: then a value costs a few neighbouring bytes instead of a line for each.
#include "common.cuh"

namespace squeezellm_hf::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpLanes;
constexpr int kTile = 32;   // of the transposition
constexpr int kRows = 8;    // of a block: one a warp
constexpr int kVector = 8;  // batch rows of a lane: 16 bytes

__global__ void __launch_bounds__(kThreads)
    transpose_kernel(const uint16_t* x, uint16_t* transposed, int batch, int padded_batch, int in_features) {
  __shared__ uint16_t tile[kTile][kTile + 2];
  const int lane = threadIdx.x % kWarpLanes;
  const int warp = threadIdx.x / kWarpLanes;
  const int k = blockIdx.x * kTile;
  const int n = blockIdx.y * kTile;
  for (int i = warp; i < kTile; i += kWarps)
    tile[i][lane] = n + i < batch && k + lane < in_features ? x[int64_t{n + i} * in_features + k + lane] : 0;
  __syncthreads();
  for (int i = warp; i < kTile; i += kWarps)
    if (n + lane < padded_batch && k + i < in_features)
      transposed[int64_t{k + i} * padded_batch + n + lane] = tile[lane][i];
}

// The sparse part of one row by a warp: the lanes load an entry each, then take 32 / kLanes entries at
// a time, kLanes lanes for the batch rows of each. Every lane of a group ends up with the sums.
template <class T, int kLanes>
__device__ void add_sparse_row(float (&sums)[kVector], const LutWeight& weight, int2 entries, const T* transposed,
                               int padded_batch, int lane) {
  for (int first = entries.x; first < entries.y; first += kWarpLanes) {
    const int entry = first + lane;
    const bool present = entry < entries.y;
    const int lane_column = present ? sparse_column(weight, entry) : 0;
    const float lane_value = present ? load_float(weight.values, weight.values_dtype, entry) : 0.0f;
    const int count = min(entries.y - first, kWarpLanes);
#pragma unroll
    for (int step = 0; step < kLanes; ++step) {
      constexpr int kEntries = kWarpLanes / kLanes;
      const int source = step * kEntries + lane / kLanes;
      const int column = __shfl_sync(0xffffffff, lane_column, source);
      const float value = __shfl_sync(0xffffffff, lane_value, source);
      if (source >= count) continue;
      const uint4 vector = __ldg(reinterpret_cast<const uint4*>(transposed + int64_t{column} * padded_batch));
      const T* x = reinterpret_cast<const T*>(&vector);
#pragma unroll
      for (int i = 0; i < kVector; ++i) sums[i] += value * to_float(x[i]);
    }
  }
#pragma unroll
  for (int distance = kLanes; distance < kWarpLanes; distance *= 2)
#pragma unroll
    for (int i = 0; i < kVector; ++i) sums[i] += __shfl_xor_sync(0xffffffff, sums[i], distance);
}

// kLanes lanes of 8 batch rows each.
template <class T, int kLanes>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(const LinearCall call, int slices, const T* transposed, int padded_batch) {
  constexpr int kBatch = kLanes * kVector;
  __shared__ float sparse_sums[kBatch][kRows + 1];
  const LutWeight& weight = call.weight;
  const int lane = threadIdx.x % kWarpLanes;
  const int warp = threadIdx.x / kWarpLanes;
  const int first_row = blockIdx.x * kRows;
  const int first_column = blockIdx.y * kBatch;
  if (transposed != nullptr) {
    if (first_row + warp < weight.out_features) {
      // Lanes beyond the padded batch repeat the last ones' work.
      const int column = first_column + lane % kLanes * kVector;
      float sums[kVector] = {};
      add_sparse_row<T, kLanes>(sums, weight, sparse_row(weight, first_row + warp),
                                transposed + min(column, padded_batch - kVector), padded_batch, lane);
      if (lane < kLanes) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) sparse_sums[lane * kVector + i][warp] = sums[i];
      }
    }
    __syncthreads();
  }
  const int columns = min(kBatch, call.batch - first_column);
  for (int i = threadIdx.x; i < columns * kRows; i += kThreads) {
    const int row = first_row + i % kRows;
    const int n = first_column + i / kRows;
    if (row >= weight.out_features) continue;
    float sum = call.bias == nullptr ? 0.0f : load_float(call.bias, call.bias_dtype, row);
    for (int s = 0; s < slices; ++s) sum += call.workspace[(int64_t{s} * call.batch + n) * weight.out_features + row];
    if (transposed != nullptr) sum += sparse_sums[i / kRows][i % kRows];
    static_cast<T*>(call.y)[int64_t{n} * weight.out_features + row] = from_float<T>(sum);
  }
}

template <class T, int kLanes>
void launch_finish(const LinearCall& call, int slices, int padded_batch) {
  constexpr int kBatch = kLanes * kVector;
  const dim3 grid((call.weight.out_features + kRows - 1) / kRows, (call.batch + kBatch - 1) / kBatch);
  finish_kernel<T, kLanes>
      <<<grid, kThreads, 0, call.stream>>>(call, slices, static_cast<const T*>(call.transposed_x), padded_batch);
}

template <class T>
cudaError_t launch(const LinearCall& call, int slices) {
  const int padded_batch = static_cast<int>(transposed_batch(call.batch));
  if (call.transposed_x != nullptr) {
    const dim3 grid((call.weight.in_features + kTile - 1) / kTile, (padded_batch + kTile - 1) / kTile);
    transpose_kernel<<<grid, kThreads, 0, call.stream>>>(static_cast<const uint16_t*>(call.x),
                                                         static_cast<uint16_t*>(call.transposed_x), call.batch,
                                                         padded_batch, call.weight.in_features);
  }
  if (call.batch <= 2 * kVector) {
    launch_finish<T, 2>(call, slices, padded_batch);
  } else if (call.batch <= 4 * kVector) {
    launch_finish<T, 4>(call, slices, padded_batch);
  } else {
    launch_finish<T, 8>(call, slices, padded_batch);
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t finish_linear(const LinearCall& call, int slices) {
  return call.dtype == DType::kFloat16 ? launch<__half>(call, slices) : launch<__nv_bfloat16>(call, slices);
}

}  // namespace squeezellm_hf::cuda
