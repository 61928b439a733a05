// y = x W^T for small batches on compute capability 9.0: the weights stream through shared memory.
//
// One block a multiprocessor, or two smaller ones, whose warps have duties of their own:
//  - most turn indices into values and multiply, a unit of the columns of 16 rows at a time (streamed_dense.cuh).
//    Two neighbouring indices select one 32-bit entry of a table of all pairs of the row's values. Of many 2-bit
//    weights and one activation, bits are counted instead (streamed_planes.cuh);
//  - some fill the next tile's tables (streamed_tables.cuh);
//  - one or two multiply the sparse part, add the warps' sums and write y (streamed_sums.cuh, streamed_sparse.cuh);
//  - one thread orders copies of packed rows into a ring of stages.
// They meet on barriers in shared memory only. x stays in shared memory.
#include "dispatch.h"
#include "streamed_dense.cuh"
#include "streamed_planes.cuh"
#include "streamed_sums.cuh"
#include "streamed_tables.cuh"

namespace squeezellm_hf::cuda {
namespace streamed {
namespace {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

// All copies, for all tiles of the block: by one thread, whose addresses are thereby the same for its warp.
template <class T, int kBits, int kBatch, int kWarps, bool kPlanes>
__device__ void order_copies(Shared<T, kBits, kBatch, kWarps, kPlanes>& shared, unsigned char* ring,
                             const CUtensorMap& weights, const Plan& plan, const Work& work) {
  using U = Unit<kBits>;
  Slot slot{0};
  int early = kEarlyStages;
  for (int count = 0; count < work.tiles; ++count) {
    for (int stage = 0; stage < plan.stages; ++stage) {
      // x must not queue behind a whole ring.
      if (early-- == 0) wait(shared.x_full, 0);
      wait(shared.empty[slot.index], slot.parity ^ 1);
      unsigned char* target = ring + slot.index * U::kSlotBytes;
      uint64_t& full = shared.full[slot.index];
      arrive_expecting(full, U::kSlotBytes);
#pragma unroll
      for (int box = 0; box < U::kStageBytes / kBoxRowBytes; ++box) {
        const int byte = stage * U::kStageBytes + box * kBoxRowBytes;
        copy_tile(target + box * kBoxBytes, weights, byte / 4, work.tile(count) * kRows, full);
      }
      slot.advance(1, plan.ring);
    }
  }
}

template <class T, int kBits, int kBatch, int kWarps, bool kPlanes>
__device__ void initialize_barriers(Shared<T, kBits, kBatch, kWarps, kPlanes>& shared, const LinearCall& call,
                                    const Plan& plan) {
  using D = Duties<kWarps>;
  for (int i = 0; i < plan.ring; ++i) {
    initialize_barrier(shared.full[i], 1);
    initialize_barrier(shared.empty[i], kStageWarps * kArrivingLanes);
  }
  for (int i = 0; i < kTableBuffers; ++i) {
    initialize_barrier(shared.tables_full[i], D::kFillWarps * kArrivingLanes);
    initialize_barrier(shared.tables_empty[i], kWarps * kArrivingLanes);
  }
  for (int i = 0; i < kSumBuffers; ++i) {
    const int sum_warps = kWarps + (call.weight.crow_indices != nullptr ? D::kSumWarps : 0);
    initialize_barrier(shared.sums_full[i], sum_warps * kArrivingLanes);
    initialize_barrier(shared.sums_empty[i], kArrivingLanes);
  }
  initialize_barrier(shared.x_full, kWarps * kArrivingLanes);
  fence_barriers();
}

template <class T, int kBits, int kBatch, int kWarps, bool kPlanes>
__device__ void run_block(unsigned char* memory, const LinearCall& call, const CUtensorMap& weights, const Plan& plan) {
  using D = Duties<kWarps>;
  auto& shared = *reinterpret_cast<Shared<T, kBits, kBatch, kWarps, kPlanes>*>(memory);
  unsigned char* x = memory + sizeof(shared);
  unsigned char* ring = memory + ring_offset(sizeof(shared) + x_bytes<kBatch, kPlanes>(plan.x_stride));
  const Work work(call.weight.out_features);
  const int lane = threadIdx.x % kWarpLanes;
  // The shuffle tells the compiler that a warp's lanes agree on it.
  const int warp = __shfl_sync(0xffffffff, threadIdx.x / kWarpLanes, 0);

  // The longest way to the first products begins before the barriers are there.
  TablePart<T, kBits, D::kFillWarps> tables(call.weight, warp - kWarps, lane);
  if (!kPlanes && warp >= kWarps && warp < kWarps + D::kFillWarps) tables.load(work.tile(0));
  if (warp == D::kCopyWarp && lane == 0) prefetch_map(weights);
  if (threadIdx.x == 0) initialize_barriers(shared, call, plan);
  __syncthreads();
  // The next kernel may start where this one's blocks have ended; until the previous one is complete,
  // only weights are read.
  allow_next_kernel();
  if (warp < kWarps) {
    if constexpr (kPlanes) {
      unsigned char* planes = x + plan.x_stride;
      const FixedPoint fixed = load_planes(x, planes, shared, call, plan);
      multiply_planes(shared, ring, planes, fixed, plan, work, warp, lane);
    } else {
      load_x<T, kBits, kWarps>(x, shared.x_full, call, plan);
      multiply_dense(shared, ring, x, call, plan, work, warp, lane);
    }
  } else if (warp < kWarps + D::kFillWarps) {
    if constexpr (kPlanes) {
      fill_factors(shared, call.weight, work, warp - kWarps, lane);
    } else {
      fill_tables(shared, tables, work, lane);
    }
  } else if (warp < D::kCopyWarp) {
    sum_up(shared, call, x, plan, work, warp - kWarps - D::kFillWarps, lane);
  } else if (elect_lane()) {
    order_copies(shared, ring, weights, plan, work);
  }
}

#endif

template <class T, int kBits, int kBatch, int kWarps, bool kPlanes>
__global__ void __launch_bounds__(Duties<kWarps>::kThreads, Duties<kWarps>::kBlocks)
    streamed_kernel(const LinearCall call, const __grid_constant__ CUtensorMap weights, const Plan plan) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  extern __shared__ __align__(1024) unsigned char memory[];
  run_block<T, kBits, kBatch, kWarps, kPlanes>(memory, call, weights, plan);
#endif
}

// Of a block; each takes a kilobyte more than it may use.
template <int kWarps>
int block_memory(const LinearCall& call) {
  constexpr int kReserved = 1024;
  return (call.shared_memory + kReserved) / Duties<kWarps>::kBlocks - kReserved;
}

// Whether two blocks a multiprocessor are faster than one. While one of them ends a tile, or waits for a sparse
// part, the other goes on; but a tile takes each of them twice as long, and the last tiles may leave many idle.
bool prefers_narrow(const LinearCall& call) {
  constexpr int kLongRow = 8192;  // with few ends of tiles to cover
  const int tiles = (call.weight.out_features + kRows - 1) / kRows;
  const auto rounds = [&](int blocks) { return (tiles + blocks - 1) / blocks; };
  const int percent = call.weight.crow_indices != nullptr ? 125 : 110;  // of the other's time; measured
  return call.weight.in_features <= kLongRow &&
         2 * rounds(2 * call.multiprocessors) * 100 <= rounds(call.multiprocessors) * percent;
}

// The ring is empty where x does not fit.
template <class T, int kBits, int kBatch, int kWarps, bool kPlanes>
Plan make_plan(const LinearCall& call) {
  using U = Unit<kBits>;
  Plan plan{};
  plan.stages = (call.weight.in_features + U::kStageWeights - 1) / U::kStageWeights;
  // Between columns of x: lest the lanes of a load meet in a bank.
  const int64_t x_stride = int64_t{plan.stages} * U::kStageWeights * 2 + (kBatch > 1 ? 128 / kBatch : 0);
  const int64_t used = sizeof(Shared<T, kBits, kBatch, kWarps, kPlanes>) + x_bytes<kBatch, kPlanes>(x_stride);
  const int64_t room = block_memory<kWarps>(call) - (used + 1023) / 1024 * 1024;
  if (room < 0) return plan;
  plan.x_stride = static_cast<int>(x_stride);
  plan.ring = static_cast<int>(room / U::kSlotBytes);
  if (plan.ring > kMaxStages) plan.ring = kMaxStages;
  plan.ring -= plan.ring % Duties<kWarps>::kStageStride;
  return plan;
}

template <class T, int kBits, int kBatch, int kWarps, bool kPlanes>
cudaError_t launch(const LinearCall& call, const Plan& plan) {
  const auto kernel = streamed_kernel<T, kBits, kBatch, kWarps, kPlanes>;
  const int bytes = block_memory<kWarps>(call);
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  const LutWeight& weight = call.weight;
  CUtensorMap weights;
  const cudaError_t mapped =
      make_tensor_map({CU_TENSOR_MAP_DATA_TYPE_INT32, weight.qweight, static_cast<uint64_t>(weight.words_per_row),
                       static_cast<uint64_t>(weight.out_features), static_cast<uint64_t>(weight.words_per_row) * 4,
                       kBoxRowBytes / 4, kRows, CU_TENSOR_MAP_SWIZZLE_128B},
                      weights);
  if (mapped != cudaSuccess) return mapped;
  const int tiles = (weight.out_features + kRows - 1) / kRows;
  const int blocks = call.multiprocessors * Duties<kWarps>::kBlocks;
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = tiles < blocks ? tiles : blocks;
  config.blockDim = Duties<kWarps>::kThreads;
  config.dynamicSmemBytes = bytes;
  config.stream = call.stream;
  config.attrs = &overlap;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, call, weights, plan);
}

// Whether it was launched; not where x does not fit.
template <class T, int kBits, int kBatch, bool kPlanes>
bool launch_where_x_fits(const LinearCall& call, cudaError_t& error) {
  if (prefers_narrow(call)) {
    const Plan narrow = make_plan<T, kBits, kBatch, kNarrowBlock, kPlanes>(call);
    if (narrow.ring >= kLeastRing) {
      error = launch<T, kBits, kBatch, kNarrowBlock, kPlanes>(call, narrow);
      return true;
    }
  }
  const Plan wide = make_plan<T, kBits, kBatch, kWideBlock, kPlanes>(call);
  if (wide.ring < kLeastRing) return false;
  error = launch<T, kBits, kBatch, kWideBlock, kPlanes>(call, wide);
  return true;
}

// Whether bits are counted (streamed_planes.cuh): not where few weights do not repay what x costs then, nor on devices
// beyond compute capability 9, to which a product of bits is eight products.
bool prefers_planes(const LinearCall& call) {
  constexpr int64_t kLeastWeights = int64_t{24} << 20;  // estimated
  static const bool native = [] {
    cudaFuncAttributes attributes;
    const auto kernel = streamed_kernel<__half, 2, 1, kWideBlock, true>;
    return cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.binaryVersion == 90;
  }();
  return native && int64_t{call.weight.out_features} * call.weight.in_features >= kLeastWeights;
}

template <class T, int kBits, int kBatch>
cudaError_t launch(const LinearCall& call) {
  cudaError_t error = cudaSuccess;
  if constexpr (kBits == 2 && kBatch == 1) {
    if (prefers_planes(call) && launch_where_x_fits<T, kBits, kBatch, true>(call, error)) return error;
  }
  return launch_where_x_fits<T, kBits, kBatch, false>(call, error) ? error : linear_small_batch(call);
}

template <class T, int kBits>
cudaError_t launch_batch(const LinearCall& call) {
  if (call.batch == 1) return launch<T, kBits, 1>(call);
  if (call.batch == 2) return launch<T, kBits, 2>(call);
  if (call.batch <= 4) return launch<T, kBits, 4>(call);
  return launch<T, kBits, 8>(call);
}

}  // namespace
}  // namespace streamed

bool can_stream() {
  static const bool compiled = [] {
    cudaFuncAttributes attributes;
    const auto kernel = streamed::streamed_kernel<__half, 4, 1, streamed::kWideBlock, false>;
    return cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90;
  }();
  return compiled;
}

cudaError_t linear_streamed(const LinearCall& call) {
  return dispatch(call, [&](auto type, auto bits) {
    return streamed::launch_batch<typename decltype(type)::Type, bits.value>(call);
  });
}

}  // namespace squeezellm_hf::cuda
