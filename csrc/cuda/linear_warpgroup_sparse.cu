// y = x W^T for larger batches on the tensor cores of compute capability 9.0, of weights with a sparse part.
//
// As linear_warpgroup_dense, without persistent blocks: a block owns a tile of rows and of the batch, and a slice of
// the columns; warpgroups look values up in registers, where the tensor core takes its left operand from, 32 columns
// while it multiplies the 32 before. Here they add the sparse part there, from a tile of deltas (delta_tile.cuh) that a
// warp each keeps for them. The entries come sorted by stage (sparse_pages.cu).
//
// Deltas take the shared memory that x would need for three stages of 256 activations: there x is asked for 64 columns
// at a time, indices 128.
#include "delta_tile.cuh"
#include "dispatch.h"
#include "left_operand.cuh"

namespace squeezellm_hf::cuda::warpgroup {
namespace {

constexpr int kGroups = kRows / kGroupLines;
static_assert(kStageColumns == kPageColumns && kGroupLines == kPageRows && kChunks == kDeltaChunks);
// Registers of threads that bring data: the others take what is left of the block's.
constexpr int kCopyRegisters = 40;
constexpr int kProductRegisters = 232;

template <class T_, int kBits_, int kBatch_>
struct SparseTile {
  using T = T_;
  static constexpr int kBits = kBits_;
  static constexpr int kBatch = kBatch_;
  static constexpr int kProducts = kBatch / kProductLines;
  static constexpr int kProductThreads = kGroups * kGroupThreads;
  static constexpr int kThreads = kProductThreads + kGroupThreads;
  static constexpr int kPackedSlots = 4;
  static constexpr int kXSlots = 4;
  static constexpr int kXLines = kBatch <= 128 ? 2 : 1;  // of a slot
  static constexpr int kXChunks = kXLines * kLineColumns / kChunkColumns;
  // What a warp writes at once lies in different banks.
  static constexpr int kSumStride = kRows + 4;

  using Sums = float[kProducts][kProductLines / 8][4];
};

// Rings of their own, for each the same: a slot is asked for again once all warps have freed it, and every warp waits
// for every use of every slot: no barrier is ever more than the phase waited for ahead or behind, so that its parity
// tells them apart.
template <class Tile>
struct SparseShared {
  alignas(1024) unsigned char x[Tile::kXSlots][Tile::kXLines][Tile::kBatch][kLineColumns * 2];
  alignas(1024) unsigned char packed[Tile::kPackedSlots][kRows][kPackedRowBytes<Tile::kBits>];
  DeltaRing deltas[kGroups];
  uint64_t x_ready[Tile::kXSlots];
  uint64_t x_free[Tile::kXSlots];  // all products with it are done
  uint64_t packed_ready[Tile::kPackedSlots];
  uint64_t packed_free[Tile::kPackedSlots];
};

#ifdef SQUEEZELLM_HF_WGMMA

template <class Tile>
__device__ __forceinline__ void initialize_barriers(SparseShared<Tile>& shared) {
  constexpr int kArrivals = Tile::kProductThreads / kWarpLanes * kArrivingLanes;
  for (int i = 0; i < Tile::kXSlots; ++i) {
    initialize_barrier(shared.x_ready[i], 1);
    initialize_barrier(shared.x_free[i], kArrivals);
  }
  for (int i = 0; i < Tile::kPackedSlots; ++i) {
    initialize_barrier(shared.packed_ready[i], 1);
    initialize_barrier(shared.packed_free[i], kArrivals);
  }
  for (auto& ring : shared.deltas) initialize_deltas(ring);
  fence_barriers();
}

// By one thread: all stages of the block. The first ones' indices are asked for before the kernel before is done.
template <class Tile>
__device__ __forceinline__ void request_stages(const CUtensorMap& packed_map, const CUtensorMap& x_map,
                                               SparseShared<Tile>& shared, int row, int batch, int first_stage,
                                               int stages) {
  const auto request_packed = [&](int stage, int slot) {
    arrive_expecting(shared.packed_ready[slot], sizeof(shared.packed[0]));
    copy_tile(shared.packed[slot], packed_map, (first_stage + stage) * (kPackedRowBytes<Tile::kBits> / 4), row,
              shared.packed_ready[slot]);
  };
  const int early = min(Tile::kPackedSlots, stages);
  for (int i = 0; i < early; ++i) request_packed(i, i);
  wait_for_last_kernel();
  Place<Tile::kPackedSlots> packed;
  Place<Tile::kXSlots> x;
  for (int stage = 0; stage < stages; ++stage, packed.advance(1)) {
    if (stage >= early) {
      wait(shared.packed_free[packed.slot], packed.parity ^ 1);
      request_packed(stage, packed.slot);
    }
#pragma unroll 1
    for (int column = 0; column < kStageColumns; column += Tile::kXLines * kLineColumns, x.advance(1)) {
      wait(shared.x_free[x.slot], x.parity ^ 1);
      arrive_expecting(shared.x_ready[x.slot], sizeof(shared.x[0]));
#pragma unroll
      for (int i = 0; i < Tile::kXLines; ++i)
        copy_tile(shared.x[x.slot][i], x_map, (first_stage + stage) * kStageColumns + column + i * kLineColumns, batch,
                  shared.x_ready[x.slot]);
    }
  }
}

// What a warpgroup does: the sums of its 64 rows and all activations of the block, over all stages.
template <class Tile>
__device__ __forceinline__ void multiply_stages(typename Tile::Sums& sums, const RowTable<Tile::kBits> (&tables)[2],
                                                SparseShared<Tile>& shared, int stages) {
  using T = typename Tile::T;
  constexpr int kBits = Tile::kBits;
  constexpr int kLineBytes = kLineColumns * 2;
  constexpr uint32_t kBarrierBytes = sizeof(uint64_t);
  const int lane = threadIdx.x % kWarpLanes;
  const bool arrives = lane < kArrivingLanes;
  const uint32_t t = lane % 4;
  const int row = threadIdx.x / kWarpLanes * 16 + lane / 4;
  const int warp = threadIdx.x / kWarpLanes % kDeltaWarps;
  DeltaRing& deltas = shared.deltas[threadIdx.x / kGroupThreads];
  const uint32_t x_ready = shared_address(shared.x_ready);
  const uint32_t x_free = shared_address(shared.x_free);
  const uint32_t packed_ready = shared_address(shared.packed_ready);
  const uint32_t packed_free = shared_address(shared.packed_free);
  const uint32_t delta_ready = shared_address(deltas.ready);
  const uint32_t delta_free = shared_address(deltas.free);
  const uint64_t right = matrix_descriptor(shared_address(shared.x));

  uint32_t words[2][kBits];
  uint4 added[kSteps];
  const auto load = [&](int packed_slot, int delta_slot, int chunk) {
#pragma unroll
    for (int h = 0; h < 2; ++h) load_chunk<kBits>(words[h], shared.packed[packed_slot][0], row + 8 * h, chunk);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) added[step] = deltas.tiles[delta_slot].registers[chunk][warp][step][lane];
  };
  uint32_t fragments[kChunks][kSteps][4];
  const auto look_up_chunk = [&](int buffer) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t (&fragment)[4] = fragments[buffer][step];
#pragma unroll
      for (int h = 0; h < 2; ++h)
        look_up<kBits>(tables[h], select_indices<kBits>(words[h], step, t), fragment[h], fragment[2 + h]);
      fragment[0] = add_pairs<T>(fragment[0], added[step].x);
      fragment[1] = add_pairs<T>(fragment[1], added[step].y);
      fragment[2] = add_pairs<T>(fragment[2], added[step].z);
      fragment[3] = add_pairs<T>(fragment[3], added[step].w);
    }
  };

  Place<Tile::kPackedSlots> packed;
  Place<kDeltaSlots> delta;
  Place<Tile::kXSlots> x;
  int last_x = 0;
  wait_at(packed_ready, 0);
  wait_at(delta_ready, 0);
  load(0, 0, 0);
  look_up_chunk(0);
  load(0, 0, 1);
#pragma unroll 1
  for (int stage = 0; stage < stages; ++stage) {
    Place<Tile::kPackedSlots> next_packed = packed;
    next_packed.advance(1);
    Place<kDeltaSlots> next_delta = delta;
    next_delta.advance(1);
    const bool more = stage + 1 < stages;
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      if (chunk % Tile::kXChunks == 0) wait_at(x_ready + x.slot * kBarrierBytes, x.parity);
      // Descriptors count in 16 bytes.
      const uint64_t slot = right + x.slot * static_cast<uint32_t>(sizeof(shared.x[0]) / 16);
      begin_products();
#pragma unroll
      for (int step = 0; step < kSteps; ++step)
#pragma unroll
        for (int i = 0; i < Tile::kProducts; ++i) {
          const int column = chunk % Tile::kXChunks * kChunkColumns + step * kProductDepth;
          const int offset = column / kLineColumns * static_cast<int>(sizeof(shared.x[0][0])) +
                             i * kProductLines * kLineBytes + column % kLineColumns * 2;
          multiply_fragment<T>(sums[i], fragments[chunk][step], slot + offset / 16);
        }
      commit_products();
      // All but this chunk's products are done: the next chunk's registers are free, and so is the last slot of x.
      wait_for_products<1>();
      if (chunk % Tile::kXChunks == 0 && (chunk > 0 || stage > 0) && arrives)
        arrive_at(x_free + last_x * kBarrierBytes);
      look_up_chunk((chunk + 1) % kChunks);
      if (chunk + 2 < kChunks) {
        load(packed.slot, delta.slot, chunk + 2);
      } else {
        if (chunk + 2 == kChunks) {
          __syncwarp();  // all lanes have read the stage's indices and deltas
          if (arrives) {
            arrive_at(packed_free + packed.slot * kBarrierBytes);
            arrive_at(delta_free + delta.slot * kBarrierBytes);
          }
        }
        if (more) {
          if (chunk + 2 == kChunks) {
            wait_at(packed_ready + next_packed.slot * kBarrierBytes, next_packed.parity);
            wait_at(delta_ready + next_delta.slot * kBarrierBytes, next_delta.parity);
          }
          load(next_packed.slot, next_delta.slot, chunk + 2 - kChunks);
        }
      }
      if (chunk % Tile::kXChunks == Tile::kXChunks - 1) {
        last_x = x.slot;
        x.advance(1);
      }
    }
    packed = next_packed;
    delta = next_delta;
  }
  wait_for_products<0>();
}

template <class Tile>
__device__ __forceinline__ void multiply(const LinearCall& call, SparseShared<Tile>& shared, int first_row,
                                         int first_batch, int stages) {
  take_registers<kProductRegisters>();
  RowTable<Tile::kBits> tables[2];
  load_tables<Tile>(tables, call.weight, first_row);
  wait_for_last_kernel();
  typename Tile::Sums sums = {};
  multiply_stages<Tile>(sums, tables, shared, stages);
  // The stages make room for the sums.
  static_assert(Tile::kBatch * Tile::kSumStride * sizeof(float) <= sizeof(shared.x) + sizeof(shared.packed));
  finish_slice<Tile>(call, shared.x, sums, first_row, first_batch);
}

#endif

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    warpgroup_sparse_kernel(const __grid_constant__ CUtensorMap packed_map, const __grid_constant__ CUtensorMap x_map,
                            const __grid_constant__ LinearCall call, const __grid_constant__ SparsePages pages,
                            int slice_stages, int batch_tiles) {
#ifdef SQUEEZELLM_HF_WGMMA
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<SparseShared<Tile>*>(memory);
  const int tile = blockIdx.x / cluster_size();
  // Neighbouring blocks share rows of W: all but one find them in the L2 cache.
  const int row_tile = tile / batch_tiles;
  const int first_batch = tile % batch_tiles * Tile::kBatch;
  const int first_stage = cluster_rank() * slice_stages;
  if (threadIdx.x == 0) initialize_barriers(shared);
  if (threadIdx.x == Tile::kProductThreads) {
    prefetch_map(packed_map);
    prefetch_map(x_map);
  }
  for (auto& ring : shared.deltas)
    for (auto& deltas : ring.tiles) clear_delta_tile(deltas, threadIdx.x, Tile::kThreads);
  __syncthreads();

  if (threadIdx.x < Tile::kProductThreads) {
    multiply(call, shared, row_tile * kRows, first_batch, slice_stages);
  } else {
    give_up_registers<kCopyRegisters>();
    const int warp = (threadIdx.x - Tile::kProductThreads) / kWarpLanes;
    if (warp > 0 && warp <= kGroups) {
      wait_for_last_kernel();
      keep_delta_tiles(shared.deltas[warp - 1], pages, row_tile * kGroups + warp - 1, first_stage, slice_stages);
    } else if (threadIdx.x == Tile::kProductThreads) {
      request_stages(packed_map, x_map, shared, row_tile * kRows, first_batch, first_stage, slice_stages);
    }
  }
#endif
}

// How a call is divided.
struct SparsePlan {
  int batch;  // of a tile
  int slices;
  int slice_stages;
};

template <class Tile>
cudaError_t launch(const LinearCall& call, const SparsePlan& plan) {
  InputMaps maps;
  cudaError_t error = make_input_maps<Tile::kBits>(call, kRows, Tile::kBatch, maps);
  if (error != cudaSuccess) return error;
  error = sort_sparse_pages(call);
  if (error != cudaSuccess) return error;
  const int batch_tiles = divide_up(call.batch, Tile::kBatch);
  const int row_tiles = divide_up(call.weight.out_features, kRows);
  return launch_clusters(warpgroup_sparse_kernel<Tile>, row_tiles * batch_tiles, plan.slices, Tile::kThreads,
                         sizeof(SparseShared<Tile>), call.stream, maps.packed, maps.x, call, sparse_pages(call),
                         plan.slice_stages, batch_tiles);
}

// What a block takes, in nanoseconds: for its first loads and the sums' way to y, and for each stage; by bits (2 to 4).
// Measured on an H200.
struct Cost {
  int start;
  int stage;
};
struct TileShape {
  int batch;
  Cost costs[3];
};
constexpr TileShape kTileShapes[] = {
    {128, {{5000, 960}, {5000, 1060}, {5300, 1130}}},
    {256, {{6700, 1400}, {6700, 1500}, {6700, 1500}}},
};

// The division that takes the least time, by that measure.
SparsePlan make_plan(const LinearCall& call) {
  SparsePlan best{};
  int64_t least = INT64_MAX;
  for (const TileShape& shape : kTileShapes) {
    const Cost cost = shape.costs[call.weight.bits - 2];
    const int64_t tiles = int64_t{divide_up(call.weight.out_features, kRows)} * divide_up(call.batch, shape.batch);
    for (int slices = 1; slices <= kMostSlices; ++slices) {
      const int slice_stages = divide_up(divide_up(call.weight.in_features, kStageColumns), slices);
      const int resident = resident_blocks(call, slices);
      const int64_t rounds = (tiles * slices + resident - 1) / resident;
      const int64_t time = rounds * (int64_t{slice_stages} * cost.stage + cost.start);
      if (time >= least) continue;
      least = time;
      best = {shape.batch, slices, slice_stages};
    }
  }
  return best;
}

template <class T, int kBits>
cudaError_t launch_tile(const LinearCall& call) {
  const SparsePlan plan = make_plan(call);
  if (plan.batch == 128) return launch<SparseTile<T, kBits, 128>>(call, plan);
  return launch<SparseTile<T, kBits, 256>>(call, plan);
}

}  // namespace
}  // namespace squeezellm_hf::cuda::warpgroup

namespace squeezellm_hf::cuda {

int64_t sparse_page_words(const LinearCall& call) {
  const SparsePages pages = sparse_pages(call);
  return int64_t{pages.units} * (pages.stages + 1) + call.weight.nnz;
}

cudaError_t linear_warpgroup_sparse(const LinearCall& call) {
  return dispatch(call, [&](auto type, auto bits) {
    return warpgroup::launch_tile<typename decltype(type)::Type, bits.value>(call);
  });
}

}  // namespace squeezellm_hf::cuda
