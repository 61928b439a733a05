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
constexpr int kRows = 16;   // of a block
constexpr int kBatch = 64;  // likewise
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
    if (n + lane < padded_batch && k + i < in_features) transposed[int64_t{k + i} * padded_batch + n + lane] = tile[lane][i];
}

// A warp takes a row's sparse values, several at a time, `lanes` lanes for the batch rows of each.
template <class T>
__device__ void add_sparse_row(float (&sums)[kVector], const LinearCall& call, int2 entries, const T* transposed,
                               int padded_batch, int lanes, int lane) {
#pragma unroll 4
  for (int entry = entries.x + lane / lanes; entry < entries.y; entry += kWarpLanes / lanes) {
    const float value = load_float(call.weight.values, call.weight.values_dtype, entry);
    const int64_t line = int64_t{sparse_column(call.weight, entry)} * padded_batch;
    const uint4 vector = __ldg(reinterpret_cast<const uint4*>(transposed + line + lane % lanes * kVector));
    const T* x = reinterpret_cast<const T*>(&vector);
#pragma unroll
    for (int i = 0; i < kVector; ++i) sums[i] += value * to_float(x[i]);
  }
  for (int distance = lanes; distance < kWarpLanes; distance *= 2)
#pragma unroll
    for (int i = 0; i < kVector; ++i) sums[i] += __shfl_xor_sync(0xffffffff, sums[i], distance);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(const LinearCall call, int slices, const T* transposed, int padded_batch) {
  __shared__ float sparse_sums[kBatch][kRows + 1];
  const LutWeight& weight = call.weight;
  const int lane = threadIdx.x % kWarpLanes;
  const int warp = threadIdx.x / kWarpLanes;
  const int first_row = blockIdx.x * kRows;
  const int first_column = blockIdx.y * kBatch;
  const int columns = min(kBatch, call.batch - first_column);
  if (transposed != nullptr) {
    int lanes = 1;
    while (lanes * kVector < columns) lanes *= 2;
    // Lanes beyond the padded batch repeat the last ones' work.
    const int shift = min(lane % lanes * kVector, padded_batch - first_column - kVector) - lane % lanes * kVector;
    for (int r = warp; r < kRows && first_row + r < weight.out_features; r += kWarps) {
      float sums[kVector] = {};
      add_sparse_row<T>(sums, call, sparse_row(weight, first_row + r), transposed + first_column + shift, padded_batch,
                        lanes, lane);
      if (lane < lanes && shift == 0) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) sparse_sums[lane * kVector + i][r] = sums[i];
      }
    }
    __syncthreads();
  }
  for (int i = threadIdx.x; i < columns * kRows; i += kThreads) {
    const int row = first_row + i % kRows;
    const int n = first_column + i / kRows;
    if (row >= weight.out_features) continue;
    float sum = call.bias == nullptr ? 0.0f : load_float(call.bias, call.bias_dtype, row);
    for (int s = 0; s < slices; ++s)
      sum += call.workspace[(int64_t{s} * call.batch + n) * weight.out_features + row];
    if (transposed != nullptr) sum += sparse_sums[i / kRows][i % kRows];
    static_cast<T*>(call.y)[int64_t{n} * weight.out_features + row] = from_float<T>(sum);
  }
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
  const dim3 grid((call.weight.out_features + kRows - 1) / kRows, (call.batch + kBatch - 1) / kBatch);
  finish_kernel<T><<<grid, kThreads, 0, call.stream>>>(call, slices, static_cast<const T*>(call.transposed_x),
                                                       padded_batch);
  return cudaGetLastError();
}

}  // namespace

cudaError_t finish_linear(const LinearCall& call) {
  const int slices = static_cast<int>(linear_slices(call));
  return call.dtype == DType::kFloat16 ? launch<__half>(call, slices) : launch<__nv_bfloat16>(call, slices);
}

}  // namespace squeezellm_hf::cuda
