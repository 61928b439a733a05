// The end of a tile in linear_streamed: its sparse part, the warps' sums, y.
#pragma once

#include "streamed_input.cuh"
#include "streamed_sparse.cuh"

namespace squeezellm_hf::cuda::streamed {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

template <class T>
__device__ __forceinline__ T silu(T value) {
  const float x = to_float(value);
  return from_float<T>(__fdividef(x, 1 + __expf(-x)));
}

// What the second block has of a tile goes to the first one.
template <class T, int kBits, int kBatch, int kWarps, bool kPlanes, int kTurns>
__device__ void send_half(Shared<T, kBits, kBatch, kWarps, kPlanes>& shared, const float (&total)[kTurns], int lane) {
  wait_in_cluster();
#pragma unroll
  for (int i = 0; i < kTurns; ++i) {
    const int n = (i * kWarpLanes + lane) / kRows;
    if (n < kBatch) store_in_block(address_in_block(shared_address(&shared.other_half[n][lane % kRows]), 0), total[i]);
  }
  arrive_in_block(address_in_block(shared_address(&shared.other_half_full), 0));
}

// Adds a tile's sums and writes y: by one warp.
template <class T, int kBits, int kBatch, int kWarps, bool kPlanes, class Weights>
__device__ void finish_tile(Shared<T, kBits, kBatch, kWarps, kPlanes>& shared, Weights weights, const Work& work,
                            int count, float scale, int lane) {
  constexpr int kTurns = (kBatch * kRows + kWarpLanes - 1) / kWarpLanes;
  const LinearCall& call = weights.call;
  const Tile tile = weights.tile(work.tile(count));
  const LutWeight& weight = weights.weight(tile.weight);
  const void* const biases = weights.bias(tile.weight);
  const int buffer = count % kSumBuffers;
  const int row = tile.row + lane % kRows;
  const bool inside = row < weight.out_features;
  uint32_t bias = 0;
  if (biases != nullptr && inside) bias = load_bits(biases, call.bias_dtype, row);
  const auto* const residuals = static_cast<const unsigned short*>(weights.residual());
  unsigned short residual = 0;
  if (residuals != nullptr && inside) residual = load_uncached(residuals + row);
  float total[kTurns] = {};
  wait(shared.sums_full[buffer], count / kSumBuffers & 1);
#pragma unroll
  for (int i = 0; i < kTurns; ++i) {
    const int n = (i * kWarpLanes + lane) / kRows % kBatch;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total[i] += shared.sums[buffer][w][n][lane % kRows];
    if (weight.crow_indices != nullptr && work.first_stage(count) == 0)
      total[i] += shared.sums[buffer][kWarps][n][lane % kRows];
  }
  __syncwarp();
  if (lane < kArrivingLanes) arrive(shared.sums_empty[buffer]);
  if (work.halved && count == 0) {
    if (work.second) return send_half(shared, total, lane);
    wait_for_cluster(shared.other_half_full, 0);
#pragma unroll
    for (int i = 0; i < kTurns; ++i)
      total[i] += shared.other_half[(i * kWarpLanes + lane) / kRows % kBatch][lane % kRows];
  }
#pragma unroll
  for (int i = 0; i < kTurns; ++i) {
    const int n = (i * kWarpLanes + lane) / kRows;
    if (!inside || n >= call.batch) continue;
    if constexpr (Weights::kFuses) total[i] *= scale;
    if (biases != nullptr) total[i] += float_of_bits(bias, call.bias_dtype);
    T result = from_float<T>(total[i]);
    if (weights.has_silu(tile.weight)) result = silu(result);
    if (residuals != nullptr)
      result = from_float<T>(to_float(result) + to_float(*reinterpret_cast<const T*>(&residual)));
    static_cast<T*>(weights.y(tile.weight))[int64_t{n} * weight.out_features + row] = result;
  }
}

// The duties of a summing warp: every kSumWarps-th tile, whose sparse part it multiplies before it waits for the sums.
// Each has the time of kSumWarps tiles for the latencies on the way.
template <class T, int kBits, int kBatch, int kWarps, bool kPlanes, class Weights>
__device__ void sum_up(Shared<T, kBits, kBatch, kWarps, kPlanes>& shared, Weights weights, const unsigned char* x,
                       const Plan& plan, const Work& work, int warp, int lane) {
  constexpr int kSumWarps = Duties<kWarps>::kSumWarps;
  static_assert(kSumBuffers % kSumWarps == 0);  // a buffer has the same warp always
  const bool has_sparse = weights.call.weight.crow_indices != nullptr;
  SparsePart<T, kBatch, Weights> sparse{weights, x, plan.x_stride, lane};
  if (has_sparse) {
    sparse.load_row(work.tile(warp));
    sparse.load_first();
    sparse.load_row(work.tile(warp + kSumWarps));
  }
  wait(shared.x_full, 0);
  wait_for_previous_kernel();  // whose memory y may be
  float scale = 1;
  if constexpr (Weights::kFuses && kScalesSums<T>)
    if (weights.group.fusion.norm_weight != nullptr)
      scale = norm_scale<kWarps>(shared.squares, weights.call, weights.group.fusion);
  for (int count = warp; count < work.tiles; count += kSumWarps) {
    if (has_sparse) {
      if (work.first_stage(count) == 0) sparse.multiply(shared.sums[count % kSumBuffers][kWarps]);
      __syncwarp();
      sparse.load_first();
      sparse.load_row(work.tile(count + 2 * kSumWarps));
    }
    finish_tile(shared, weights, work, count, scale, lane);
  }
}

#endif

}  // namespace squeezellm_hf::cuda::streamed
