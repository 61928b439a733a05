// A block of linear_streamed: its copies, its barriers, and which warp does what.
#pragma once

#include "streamed_dense.cuh"
#include "streamed_planes.cuh"
#include "streamed_sums.cuh"
#include "streamed_tables.cuh"

namespace squeezellm_hf::cuda::streamed {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

// All copies, for all tiles of the block: by one thread, whose addresses are thereby the same for its warp.
template <class T, int kBits, int kBatch, int kWarps, bool kPlanes, class Weights>
__device__ void order_copies(Shared<T, kBits, kBatch, kWarps, kPlanes>& shared, unsigned char* ring, Weights weights,
                             const Plan& plan, const Work& work) {
  using U = Unit<kBits>;
  Slot slot{0};
  int early = kEarlyStages;
  for (int count = 0; count < work.tiles; ++count) {
    const Tile tile = weights.tile(work.tile(count));
    for (int stage = work.first_stage(count); stage < work.end_stage(count); ++stage) {
      // x must not queue behind a whole ring.
      if (early-- == 0) wait(shared.x_read, 0);
      wait(shared.empty[slot.index], slot.parity ^ 1);
      unsigned char* target = ring + slot.index * U::kSlotBytes;
      uint64_t& full = shared.full[slot.index];
      arrive_expecting(full, U::kSlotBytes);
#pragma unroll
      for (int box = 0; box < U::kStageBytes / kBoxRowBytes; ++box) {
        const int byte = stage * U::kStageBytes + box * kBoxRowBytes;
        copy_tile_once(target + box * kBoxBytes, weights.map(tile.weight), byte / 4, tile.row, full);
      }
      slot.advance(1, plan.ring);
    }
  }
}

// A warp's share of them, by one thread: an address that lanes do not share is worked off lane by lane.
template <class T, int kBits, int kBatch, int kWarps, bool kPlanes>
__device__ void initialize_barriers(Shared<T, kBits, kBatch, kWarps, kPlanes>& shared, const Plan& plan, int share,
                                    int shares) {
  using D = Duties<kWarps>;
  if (!elect_lane()) return;
  for (int i = share; i < plan.ring; i += shares) {
    initialize_barrier(shared.full[i], 1);
    initialize_barrier(shared.empty[i], kStageWarps * kArrivingLanes);
  }
  if (share == 0)
    for (int i = 0; i < kTableBuffers; ++i) {
      initialize_barrier(shared.tables_full[i], D::kFillWarps * kArrivingLanes);
      initialize_barrier(shared.tables_empty[i], kWarps * kArrivingLanes);
    }
  if (share == 1)
    for (int i = 0; i < kSumBuffers; ++i) {
      initialize_barrier(shared.sums_full[i], kWarps * kArrivingLanes);
      initialize_barrier(shared.sums_empty[i], kArrivingLanes);
    }
  if (share == 2) {
    initialize_barrier(shared.x_read, kWarps * kArrivingLanes);
    initialize_barrier(shared.x_full, kWarps * kArrivingLanes);
    initialize_barrier(shared.other_half_full, kWarpLanes);
  }
  fence_barriers();
}

template <class T, int kBits, int kBatch, int kWarps, bool kPlanes, class Weights>
__device__ void run_block(unsigned char* memory, Weights weights, const Plan& plan) {
  using D = Duties<kWarps>;
  auto& shared = *reinterpret_cast<Shared<T, kBits, kBatch, kWarps, kPlanes>*>(memory);
  unsigned char* x = memory + sizeof(shared);
  unsigned char* ring = memory + ring_offset(sizeof(shared) + x_bytes<kBatch, kPlanes>(plan.x_stride));
  const LinearCall& call = weights.call;
  const Work work(weights.tiles(), plan);
  const int lane = threadIdx.x % kWarpLanes;
  // The shuffle tells the compiler that a warp's lanes agree on it.
  const int warp = __shfl_sync(0xffffffff, threadIdx.x / kWarpLanes, 0);

  // All that comes before the first products is here, in the order of the code: far instructions come late.
  TablePart<T, kBits, D::kFillWarps, Weights> tables(weights, warp - kWarps, lane);
  if (!kPlanes && warp >= kWarps && warp < kWarps + D::kFillWarps) tables.load(work.tile(0));
  if (warp == D::kCopyWarp) weights.prefetch_maps(lane);
  initialize_barriers(shared, plan, warp, D::kCopyWarp + 1);
  if (plan.pairs) arrive_in_cluster();
  __syncthreads();
  // The next kernel may start where this one's blocks have ended; until the previous one is complete,
  // only weights are read.
  allow_next_kernel();
  if (warp < kWarps) {
    if constexpr (kPlanes) {
      unsigned char* planes = x + plan.x_stride;
      const FixedPoint fixed = load_planes(x, planes, shared, weights, plan);
      multiply_planes(shared, ring, planes, fixed, plan, work, warp, lane);
    } else {
      load_x<T, kBits, kBatch, kWarps>(x, shared, weights, plan);
      multiply_dense(shared, ring, x, call, plan, work, warp, lane);
    }
  } else if (warp < kWarps + D::kFillWarps) {
    if constexpr (kPlanes) {
      fill_factors(shared, weights, work, warp - kWarps, lane);
    } else {
      fill_tables(shared, tables, work, lane);
    }
  } else if (warp < D::kCopyWarp) {
    sum_up(shared, weights, x, plan, work, warp - kWarps - D::kFillWarps, lane);
  } else {
    if (elect_lane()) order_copies(shared, ring, weights, plan, work);
  }
}

#endif

}  // namespace squeezellm_hf::cuda::streamed
