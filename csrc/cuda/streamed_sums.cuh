// The end of a tile in linear_streamed: its sparse part, the warps' sums, y.
#pragma once

#include "streamed_sparse.cuh"

namespace squeezellm_hf::cuda::streamed {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

// wait() for what another block of the cluster wrote, arrive() at its barrier, and a store to its shared memory.
__device__ __forceinline__ void wait_for_block(uint64_t& barrier, uint32_t parity) {
  asm volatile(
      "{.reg .pred done;\n"
      "again: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;}" ::"r"(shared_address(&barrier)),
      "r"(parity)
      : "memory");
}

__device__ __forceinline__ void arrive_in_block(uint64_t& barrier, int rank) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(
                   address_in_block(shared_address(&barrier), rank))
               : "memory");
}

__device__ __forceinline__ void store_in_block(float* target, float value, int rank) {
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(address_in_block(shared_address(target), rank)), "f"(value)
               : "memory");
}

// Adds a tile's sums, and either writes y or leaves them to the cluster's other block: by one warp.
template <class T, int kBits, int kBatch, int kWarps>
__device__ void finish_tile(Shared<T, kBits, kBatch, kWarps>& shared, const LinearCall& call, const Work& work,
                            int count, int lane) {
  constexpr int kTurns = (kBatch * kRows + kWarpLanes - 1) / kWarpLanes;
  constexpr int kLanes = kBatch == 1 ? kRows : kWarpLanes;
  const LutWeight& weight = call.weight;
  const int buffer = count % kSumBuffers;
  const uint32_t parity = count / kSumBuffers & 1;
  const bool finishes = work.finishes(count);
  const int row = lane % kRows;
  const int y_row = work.tile(count) * kRows + row;
  const bool inside = lane < kLanes && y_row < weight.out_features;
  uint32_t bias = 0;
  if (call.bias != nullptr && finishes && inside) bias = load_bits(call.bias, call.bias_dtype, y_row);
  float total[kTurns] = {};
  wait(shared.sums_full[buffer], parity);
#pragma unroll
  for (int i = 0; i < kTurns; ++i) {
    const int n = i * (kWarpLanes / kRows) + lane / kRows % kBatch;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total[i] += shared.sums[buffer][w][n][row];
    if (weight.crow_indices != nullptr && finishes) total[i] += shared.sums[buffer][kWarps][n][row];
  }
  __syncwarp();
  if (lane == 0) arrive(shared.sums_empty[buffer]);

  const uint32_t other_parity = parity;  // a block sends, or receives, every second tile
  if (!finishes) {
    wait_for_block(shared.other_empty, other_parity ^ 1);
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      const int n = i * (kWarpLanes / kRows) + lane / kRows % kBatch;
      if (lane < kLanes) store_in_block(&shared.other_sums[n][row], total[i], work.rank ^ 1);
    }
    __syncwarp();
    if (lane == 0) arrive_in_block(shared.other_full, work.rank ^ 1);
    return;
  }
  if (work.split > 1) {
    wait_for_block(shared.other_full, other_parity);
#pragma unroll
    for (int i = 0; i < kTurns; ++i)
      total[i] += shared.other_sums[i * (kWarpLanes / kRows) + lane / kRows % kBatch][row];
    __syncwarp();
    if (lane == 0) arrive_in_block(shared.other_empty, work.rank ^ 1);
  }
#pragma unroll
  for (int i = 0; i < kTurns; ++i) {
    const int n = i * (kWarpLanes / kRows) + lane / kRows % kBatch;
    if (!inside || n >= call.batch) continue;
    if (call.bias != nullptr) total[i] += float_of_bits(bias, call.bias_dtype);
    static_cast<T*>(call.y)[int64_t{n} * weight.out_features + y_row] = from_float<T>(total[i]);
  }
}

// The duties of a summing warp, for all tiles of the block: the sparse part a tile ahead of the sums.
template <class T, int kBits, int kBatch, int kWarps>
__device__ void sum_up(Shared<T, kBits, kBatch, kWarps>& shared, const LinearCall& call, const unsigned char* x,
                       const Plan& plan, const Work& work, int warp, int lane) {
  constexpr int kSumWarps = Duties<kWarps>::kSumWarps;
  const bool has_sparse = call.weight.crow_indices != nullptr;
  SparsePart<T, kBatch, kSumWarps> sparse{call, x, plan.x_stride, warp, lane};
  const int first = work.split == 1 ? 0 : work.rank;  // of the tiles that this block finishes
  if (has_sparse) {
    sparse.load_row(work.tile(first));
    sparse.load_first();
    sparse.load_row(work.tile(first + work.split));
  }
  wait(shared.x_full, 0);
  wait_for_previous_kernel();  // whose memory y may be

  const auto multiply_sparse = [&](int count) {
    if (!has_sparse || count >= work.tiles || !work.finishes(count)) return;
    const int buffer = count % kSumBuffers;
    wait(shared.sums_empty[buffer], (count / kSumBuffers & 1) ^ 1);
    sparse.multiply(shared.sums[buffer][kWarps]);
    __syncwarp();
    if (lane == 0) arrive(shared.sums_full[buffer]);
    sparse.load_first();
    sparse.load_row(work.tile(count + 2 * work.split));
  };
  multiply_sparse(0);
  for (int count = 0; count < work.tiles; ++count) {
    multiply_sparse(count + 1);
    // Always the same warp for a buffer, in order: no parity is taken for that of another phase.
    if (count % kSumWarps == warp) finish_tile<T, kBits, kBatch, kWarps>(shared, call, work, count, lane);
  }
}

#endif

}  // namespace squeezellm_hf::cuda::streamed
