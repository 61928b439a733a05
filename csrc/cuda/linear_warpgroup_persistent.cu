// linear_warpgroup_dense by one block a multiprocessor, which does one tile after the other: while it hands a tile's
// sums on, the copies of the next one's stages are on their way. Where tiles do not divide evenly among the blocks,
// several share one (persistent_schedule.cuh).
#include "dense_stages.cuh"
#include "dispatch.h"
#include "persistent_sums.cuh"

namespace squeezellm_hf::cuda::warpgroup {
namespace {

template <class Tile>
struct PersistentShared {
  DenseRing<Tile> ring;
  alignas(128) OutputBuffers outputs[Tile::kProductThreads / kGroupThreads];
};

// One warp: it finds room beside the blocks of the kernel before, which have nearly all registers.
__global__ void __launch_bounds__(kWarpLanes) clear_flags_kernel(uint4* flags, int count) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  allow_next_kernel();
  wait_for_previous_kernel();
  for (int i = threadIdx.x; i < count; i += kWarpLanes) flags[i] = {0, 0, 0, 0};
#endif
}

#ifdef SQUEEZELLM_HF_WGMMA

// Calls the tables of a tile's rows into the L2 cache: they are needed when its first stages are.
template <class Tile>
__device__ __forceinline__ void prefetch_tables(const LutWeight& weight, int first_row) {
  const uint32_t row_bytes = (weight.table_dtype == DType::kFloat32 ? 4 : 2) << Tile::kBits;
  const uint32_t bytes = min(kRows, weight.out_features - first_row) * row_bytes / 16 * 16;
  const char* tables = static_cast<const char*>(weight.lookup_table) + int64_t{first_row} * row_bytes;
  if (reinterpret_cast<uintptr_t>(tables) % 16 == 0 && bytes > 0) prefetch_l2(tables, bytes);
}

// By one thread: all stages of the block, one tile after the other. The first ones' indices are asked for before the
// kernel before is done.
template <class Tile>
__device__ __forceinline__ void request_all(const CUtensorMap& packed_map, const CUtensorMap& x_map,
                                            DenseRing<Tile>& ring, const LutWeight& weight, const Schedule& schedule) {
  int asked = 0;
  for (Stages early(schedule); asked < Tile::kSlots && early.next(); ++asked)
    request_packed(packed_map, ring, asked, schedule.row_tile(early.tile()) * kRows, early.stage());
  wait_for_last_kernel();
  Place<Tile::kSlots> place;
  int i = 0;
  for (Stages stages(schedule); stages.next(); ++i, place.advance(1)) {
    const int row = schedule.row_tile(stages.tile()) * kRows;
    if (i >= asked) {
      wait(ring.free[place.slot], place.parity ^ 1);
      request_packed(packed_map, ring, place.slot, row, stages.stage());
    }
    request_x(x_map, ring, place.slot, schedule.batch_tile(stages.tile()) * Tile::kBatch, stages.stage());
    if (stages.first()) prefetch_tables<Tile>(weight, row);
  }
}

template <class Tile>
__device__ __forceinline__ void multiply_all(const LinearCall& call, PersistentShared<Tile>& shared,
                                             const Schedule& schedule) {
  take_registers<Tile::kProductRegisters>();
  Segments segments(schedule);
  Segment segment;
  if (!segments.next(segment)) return;
  RowTable<Tile::kBits> tables[2];
  load_tables<Tile>(tables, call.weight, schedule.row_tile(segment.tile) * kRows);
  wait_for_last_kernel();
  Place<Tile::kSlots> place;
  for (;;) {
    typename Tile::Sums sums = {};
    multiply_stages<Tile>(sums, tables, shared.ring, place, segment.stages);
    const int first_row = schedule.row_tile(segment.tile) * kRows;
    const int first_batch = schedule.batch_tile(segment.tile) * Tile::kBatch;
    const int lines = call.batch - first_batch;
    if (segment.first_stage > 0) {
      store_part<Tile>(call, schedule, segment.part, lines, sums);
    } else {
      if (segment.part >= 0) add_part<Tile>(call, schedule, segment.part, lines, sums);
      store_tile<Tile>(call, shared.outputs[threadIdx.x / kGroupThreads], first_row, first_batch, sums);
    }
    if (!segments.next(segment)) break;
    load_tables<Tile>(tables, call.weight, schedule.row_tile(segment.tile) * kRows);
  }
}

#endif

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    persistent_kernel(const __grid_constant__ CUtensorMap packed_map, const __grid_constant__ CUtensorMap x_map,
                      const __grid_constant__ LinearCall call, const __grid_constant__ Schedule schedule) {
#ifdef SQUEEZELLM_HF_WGMMA
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<PersistentShared<Tile>*>(memory);
  if (threadIdx.x == 0) initialize_ring(shared.ring);
  if (threadIdx.x == Tile::kProductThreads) {
    prefetch_map(packed_map);
    prefetch_map(x_map);
  }
  __syncthreads();
  if (threadIdx.x < Tile::kProductThreads) {
    multiply_all<Tile>(call, shared, schedule);
  } else {
    give_up_registers<kCopyRegisters>();
    if (threadIdx.x == Tile::kProductThreads) request_all<Tile>(packed_map, x_map, shared.ring, call.weight, schedule);
  }
#endif
}

cudaError_t clear_flags(const LinearCall& call, int parts) {
  return launch_clusters(clear_flags_kernel, 1, 1, kWarpLanes, 0, call.stream, static_cast<uint4*>(call.parts),
                         static_cast<int>(flag_bytes(parts) / sizeof(uint4)));
}

template <class Tile>
cudaError_t launch_persistent(const LinearCall& call, const Schedule& schedule) {
  InputMaps maps;
  cudaError_t error = make_input_maps<Tile::kBits>(call, kRows, Tile::kBatch, maps);
  if (error != cudaSuccess) return error;
  if (schedule.parts() > 0) error = clear_flags(call, schedule.parts());
  if (error != cudaSuccess) return error;
  return launch_clusters(persistent_kernel<Tile>, schedule.blocks, 1, Tile::kThreads, sizeof(PersistentShared<Tile>),
                         call.stream, maps.packed, maps.x, call, schedule);
}

}  // namespace

cudaError_t linear_persistent(const LinearCall& call, const Schedule& schedule, int tile_batch) {
  return dispatch(call, [&](auto type, auto bits) {
    using T = typename decltype(type)::Type;
    if (tile_batch == 128) return launch_persistent<DenseTile<T, bits.value, 128>>(call, schedule);
    return launch_persistent<DenseTile<T, bits.value, 256>>(call, schedule);
  });
}

}  // namespace squeezellm_hf::cuda::warpgroup
