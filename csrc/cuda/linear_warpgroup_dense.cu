// y = x W^T for larger batches on the tensor cores of compute capability 9.0, of weights without a sparse part.
//
// A block owns a tile of rows and of the batch, and a slice of the columns (dense_stages.cuh). The blocks of a cluster
// take a slice each and add their sums, in a fixed order. Where a call's tiles leave multiprocessors idle,
// linear_warpgroup_persistent.cu divides them otherwise.
#include "dense_plan.cuh"
#include "dense_stages.cuh"
#include "dispatch.h"

namespace squeezellm_hf::cuda::warpgroup {

cudaError_t linear_persistent(const LinearCall& call, const Schedule& schedule, int tile_batch);

namespace {

#ifdef SQUEEZELLM_HF_WGMMA

// By one thread: all stages of the block. The first ones' indices are asked for before the kernel before is done.
template <class Tile>
__device__ __forceinline__ void request_stages(const CUtensorMap& packed_map, const CUtensorMap& x_map,
                                               DenseRing<Tile>& ring, int row, int batch, int first_stage, int stages) {
  const int early = min(Tile::kSlots, stages);
  for (int i = 0; i < early; ++i) request_packed(packed_map, ring, i, row, first_stage + i);
  wait_for_last_kernel();
  Place<Tile::kSlots> place;
  for (int stage = 0; stage < stages; ++stage, place.advance(1)) {
    if (stage >= early) {
      wait(ring.free[place.slot], place.parity ^ 1);
      request_packed(packed_map, ring, place.slot, row, first_stage + stage);
    }
    request_x(x_map, ring, place.slot, batch, first_stage + stage);
  }
}

template <class Tile>
__device__ __forceinline__ void multiply(const LinearCall& call, DenseRing<Tile>& ring, int first_row, int first_batch,
                                         int stages) {
  take_registers<Tile::kProductRegisters>();
  RowTable<Tile::kBits> tables[2];
  load_tables<Tile>(tables, call.weight, first_row);
  wait_for_last_kernel();
  typename Tile::Sums sums = {};
  Place<Tile::kSlots> place;
  multiply_stages<Tile>(sums, tables, ring, place, stages);
  // The stages make room for the sums.
  static_assert(Tile::kBatch * Tile::kSumStride * sizeof(float) <= sizeof(ring.slots));
  finish_slice<Tile>(call, ring.slots, sums, first_row, first_batch);
}

#endif

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    warpgroup_dense_kernel(const __grid_constant__ CUtensorMap packed_map, const __grid_constant__ CUtensorMap x_map,
                           const __grid_constant__ LinearCall call, int slice_stages, int batch_tiles) {
#ifdef SQUEEZELLM_HF_WGMMA
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& ring = *reinterpret_cast<DenseRing<Tile>*>(memory);
  const int tile = blockIdx.x / cluster_size();
  // Neighbouring blocks share rows of W: all but one find them in the L2 cache.
  const int first_row = tile / batch_tiles * kRows;
  const int first_batch = tile % batch_tiles * Tile::kBatch;
  const int first_stage = cluster_rank() * slice_stages;
  if (threadIdx.x == 0) initialize_ring(ring);
  if (threadIdx.x == Tile::kProductThreads) {
    prefetch_map(packed_map);
    prefetch_map(x_map);
  }
  __syncthreads();

  if (threadIdx.x < Tile::kProductThreads) {
    multiply(call, ring, first_row, first_batch, slice_stages);
  } else {
    give_up_registers<kCopyRegisters>();
    if (threadIdx.x == Tile::kProductThreads)
      request_stages(packed_map, x_map, ring, first_row, first_batch, first_stage, slice_stages);
  }
#endif
}

template <class Tile>
cudaError_t launch(const LinearCall& call, const DensePlan& plan) {
  InputMaps maps;
  const cudaError_t error = make_input_maps<Tile::kBits>(call, kRows, Tile::kBatch, maps);
  if (error != cudaSuccess) return error;
  const int batch_tiles = divide_up(call.batch, Tile::kBatch);
  const int row_tiles = divide_up(call.weight.out_features, kRows);
  return launch_clusters(warpgroup_dense_kernel<Tile>, row_tiles * batch_tiles, plan.slices, Tile::kThreads,
                         sizeof(DenseRing<Tile>), call.stream, maps.packed, maps.x, call, plan.slice_stages,
                         batch_tiles);
}

template <class T, int kBits>
cudaError_t launch_dense_tile(const LinearCall& call, const DensePlan& plan) {
  if (plan.batch == 64) return launch<DenseTile<T, kBits, 64>>(call, plan);
  if (plan.batch == 128) return launch<DenseTile<T, kBits, 128>>(call, plan);
  return launch<DenseTile<T, kBits, 256>>(call, plan);
}

}  // namespace
}  // namespace squeezellm_hf::cuda::warpgroup

namespace squeezellm_hf::cuda {

bool has_warpgroup_kernel() {
#ifdef SQUEEZELLM_HF_SM90A
  return true;
#else
  return false;
#endif
}

cudaError_t linear_warpgroup_dense(const LinearCall& call) {
  const warpgroup::DensePlan plan = warpgroup::make_plan(call);
  if (plan.slices == 0) return warpgroup::linear_persistent(call, plan.schedule, plan.batch);
  return dispatch(call, [&](auto type, auto bits) {
    return warpgroup::launch_dense_tile<typename decltype(type)::Type, bits.value>(call, plan);
  });
}

int64_t parts_bytes(const LinearCall& call) {
  const warpgroup::DensePlan plan = warpgroup::make_plan(call);
  return plan.slices == 0 ? warpgroup::schedule_bytes(plan.schedule, plan.batch) : 0;
}

}  // namespace squeezellm_hf::cuda
