// y = x W^T for batches 5 to 64 on the tensor cores of compute capability 9.0.
//
// A block owns 128 or 64 rows, up to 64 activations and a slice of the columns. Warpgroups take stages of 128 columns
// in turn: each looks values up, two indices at once (pair_table.cuh), in registers, where the tensor core takes its
// left operand from, and has sums of its own for all rows. So one looks up while another multiplies. Another warpgroup
// brings x.
//
// The warpgroups of a block, then the blocks of a cluster, add their sums in a fixed order, those of a sparse part
// (pair_sparse.cuh) with them.
#include "dispatch.h"
#include "pair_sparse.cuh"

namespace squeezellm_hf::cuda::warpgroup {
namespace {

#ifdef SQUEEZELLM_HF_WGMMA

// What a warpgroup does: the sums of all rows and activations of the block, over its stages. The first stages' indices
// have been asked for.
template <class Tile>
__device__ __forceinline__ void multiply_stages(typename Tile::Sums& sums, PairShared<Tile>& shared,
                                                const WarpIndices<Tile>& indices, int group, int stages) {
  using T = typename Tile::T;
  using Table = PairTable<Tile::kBits, Tile::kTileRows>;
  constexpr int kProducts = Tile::kTileRows / kGroupLines;
  constexpr int kStageTiles = kStageColumns / kLineColumns;
  constexpr uint32_t kBarrierBytes = sizeof(uint64_t);
  const int lane = threadIdx.x % kWarpLanes;
  const Table table(shared.tables, threadIdx.x / kWarpLanes % 4, lane);
  const uint32_t x_ready = shared_address(shared.x_ready);
  const uint32_t x_free = shared_address(shared.x_free);
  const uint64_t right = matrix_descriptor(shared_address(shared.x));

  uint32_t words[Table::kLaneRows][Tile::kBits];
  uint32_t fragments[2][Tile::kChunkSteps][kProducts][4];
  const auto look_up_chunk = [&](int chunk) {
#pragma unroll
    for (int step = 0; step < Tile::kChunkSteps; ++step)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t values[Table::kLaneRows];
        table.look_up(words, (chunk * Tile::kChunkSteps + step) * 2 + half, values);
#pragma unroll
        for (int b = 0; b < Table::kLaneRows; ++b) fragments[chunk % 2][step][b / 2][b % 2 + 2 * half] = values[b];
      }
  };

  Place<Tile::kPackedSlots> packed;
  Place<Tile::kSlots> place;
  place.advance(group * kStageTiles);
  int last_slot = 0;
  indices.load(words, packed);
  look_up_chunk(0);
#pragma unroll 1
  for (int stage = group; stage < stages; stage += Tile::kGroups) {
    const bool more = stage + Tile::kGroups < stages;
    uint64_t slot = 0;
#pragma unroll
    for (int chunk = 0; chunk < Tile::kChunks; ++chunk) {
      const int line_chunk = chunk % Tile::kLineChunks;
      if (line_chunk == 0) {
        wait_at(x_ready + place.slot * kBarrierBytes, place.parity);
        // Descriptors count in 16 bytes.
        slot = right + place.slot * static_cast<uint32_t>(sizeof(shared.x[0]) / 16);
      }
      begin_products();
#pragma unroll
      for (int step = 0; step < Tile::kChunkSteps; ++step)
#pragma unroll
        for (int i = 0; i < kProducts; ++i) {
          const int column = (line_chunk * Tile::kChunkSteps + step) * kProductDepth;
          multiply_fragment<T>(sums[i], fragments[chunk % 2][step][i], slot + column * 2 / 16);
        }
      commit_products();
      // All but this chunk's products are done: the next one's registers are free, and the last slot.
      wait_for_products<1>();
      if (line_chunk == 0) {
        if ((chunk > 0 || stage > group) && lane < kArrivingLanes) arrive_at(x_free + last_slot * kBarrierBytes);
        last_slot = place.slot;
        place.advance(chunk + Tile::kLineChunks < Tile::kChunks ? 1 : (Tile::kGroups - 1) * kStageTiles + 1);
      }
      if (chunk == 0) {
        // This stage's indices are in registers.
        const int next = stage + Tile::kPackedSlots * Tile::kGroups;
        if (next < stages) indices.request(next, packed.slot);
        packed.advance(1);
      }
      if (chunk + 1 < Tile::kChunks) {
        look_up_chunk(chunk + 1);
        if (chunk + 2 == Tile::kChunks && more) indices.load(words, packed);
      } else if (more) {
        look_up_chunk(0);
      }
    }
  }
  wait_for_products<0>();
}

// Adds the warpgroups' sums, [group][batch][row], in the first one's place, and after them those of the sparse part's
// rows.
template <class Tile, bool kSparse>
__device__ __forceinline__ void add_groups(float* sums, RowRange sparse_rows) {
  constexpr int kLineQuads = Tile::kSumStride / 4;
  constexpr int kQuads = Tile::kBatch * kLineQuads;
  auto* quads = reinterpret_cast<float4*>(sums);
  for (int i = threadIdx.x; i < kQuads; i += Tile::kProductThreads) {
    float4 sum = quads[i];
#pragma unroll
    for (int group = 1; group < Tile::kGroups; ++group) {
      const float4 v = quads[group * kQuads + i];
      sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    }
    if (kSparse && sparse_rows.has(i % kLineQuads * 4)) {
      const float4 v = quads[Tile::kGroups * kQuads + i];
      sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    }
    quads[i] = sum;
  }
}

template <class Tile, bool kSparse>
__device__ __forceinline__ void multiply(const CUtensorMap& packed_map, const LinearCall& call,
                                         PairShared<Tile>& shared, int first_row, int first_batch, int first_stage,
                                         int stages) {
  constexpr int kSumGroup = Tile::kBatch * Tile::kSumStride;
  constexpr int kSums = (Tile::kGroups + 1) * kSumGroup;
  static_assert((kSums + SparseRows<Tile>::kPartialSums) * sizeof(float) <= offsetof(PairShared<Tile>, packed_ready));
  take_registers<Tile::kProductRegisters>();
  // Known to be the same for a warp: the tensor core wants no branches that might not be.
  const int group = __shfl_sync(~0u, threadIdx.x / kGroupThreads, 0);
  const int warp = threadIdx.x / kWarpLanes % 4;
  const int lane = threadIdx.x % kWarpLanes;
  const WarpIndices<Tile> indices(packed_map, shared, first_row + warp * Tile::kWarpRows, first_stage);
  for (int i = 0; i < Tile::kPackedSlots; ++i)
    if (group + i * Tile::kGroups < stages) indices.request(group + i * Tile::kGroups, i);
  // Asked for before the tables' values, and not touched before those are there.
  const int tile_row = static_cast<int>(threadIdx.x);
  int pointer = 0;
  if (kSparse && tile_row <= Tile::kTileRows) pointer = row_pointer(call.weight, first_row + tile_row);
  fill_pair_tables<typename Tile::T, Tile::kBits, Tile::kTileRows, Tile::kProductThreads / Tile::kTileRows>(
      shared.tables, call.weight, first_row, threadIdx.x);
  static_assert(Tile::kTileRows < Tile::kProductThreads);
  if (kSparse && tile_row <= Tile::kTileRows) shared.row_pointers[tile_row] = pointer;
  synchronize(1, Tile::kProductThreads);
  wait_for_last_kernel();
  typename Tile::Sums sums = {};
  if (group < stages) multiply_stages<Tile>(sums, shared, indices, group, stages);

  float* block_sums = reinterpret_cast<float*>(&shared);
  const auto store_group = [&] {
    // The stages and tables make room for the sums.
    synchronize(1, Tile::kProductThreads);
    float* own = block_sums + group * kSumGroup + warp * Tile::kWarpRows + lane / 4;
#pragma unroll
    for (int i = 0; i < Tile::kTileRows / kGroupLines; ++i)
#pragma unroll
      for (int n = 0; n < Tile::kBatch / 8; ++n)
#pragma unroll
        for (int k = 0; k < 4; ++k)
          own[(n * 8 + lane % 4 * 2 + k % 2) * Tile::kSumStride + i * 16 + k / 2 * 8] = sums[i][n][k];
  };
  RowRange sparse_rows = {0, 0};
  if constexpr (kSparse) {
    sparse_rows = sparse_share<Tile>();
    SparseRows<Tile> sparse(call, shared, sparse_rows, first_batch);
    sparse.load_first();
    store_group();
    sparse.multiply(block_sums + Tile::kGroups * kSumGroup, block_sums + kSums);
  } else {
    store_group();
  }
  synchronize(1, Tile::kProductThreads);
  add_groups<Tile, kSparse>(block_sums, sparse_rows);
  if (cluster_size() == 1) {
    synchronize(1, Tile::kProductThreads);
    add_slices<Tile, Tile::kTileRows>(call, block_sums, first_row, first_batch);
    return;
  }
  synchronize_cluster();
  add_slices<Tile, Tile::kTileRows>(call, block_sums, first_row, first_batch);
  synchronize_cluster();
}

#endif

template <class Tile, bool kSparse>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    warpgroup_pairs_kernel(const __grid_constant__ CUtensorMap packed_map, const __grid_constant__ CUtensorMap x_map,
                           const __grid_constant__ LinearCall call, int slice_stages, int batch_tiles) {
#ifdef SQUEEZELLM_HF_WGMMA
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<PairShared<Tile>*>(memory);
  const int tile = blockIdx.x / cluster_size();
  // Neighbouring blocks share rows of W: all but one find them in the L2 cache.
  const int first_row = tile / batch_tiles * Tile::kTileRows;
  const int first_batch = tile % batch_tiles * Tile::kBatch;
  const int first_stage = cluster_rank() * slice_stages;
  if (threadIdx.x == 0) {
    for (int i = 0; i < Tile::kSlots; ++i) {
      initialize_barrier(shared.x_ready[i], 1);
      initialize_barrier(shared.x_free[i], kGroupThreads / kWarpLanes * kArrivingLanes);
    }
    for (auto& slots : shared.packed_ready)
      for (uint64_t& ready : slots) initialize_barrier(ready, 1);
    fence_barriers();
  }
  if (threadIdx.x == Tile::kProductThreads) {
    prefetch_map(packed_map);
    prefetch_map(x_map);
  }
  __syncthreads();

  if (threadIdx.x < Tile::kProductThreads) {
    multiply<Tile, kSparse>(packed_map, call, shared, first_row, first_batch, first_stage, slice_stages);
  } else {
    give_up_registers<kCopyRegisters>();
    if (threadIdx.x == Tile::kProductThreads) {
      wait_for_last_kernel();
      request_activations(x_map, shared, first_batch, first_stage * kStageColumns, slice_stages);
    }
    if constexpr (kSparse) {
      // Late: earlier, the weight's way through the L2 cache might drive the entries out again.
      __syncwarp();
      synchronize(2, kGroupThreads);
      prefetch_sparse_part<Tile>(call.weight, first_row);
    }
  }
#endif
}

// How a call is divided.
struct PairPlan {
  int rows;  // of a tile
  int batch;
  int slices;
  int slice_stages;
};

template <class Tile>
cudaError_t launch(const LinearCall& call, const PairPlan& plan) {
  CUtensorMap packed_map;
  CUtensorMap x_map;
  cudaError_t error = make_packed_map<Tile::kBits>(call.weight, Tile::kWarpRows, packed_map);
  if (error != cudaSuccess) return error;
  error = make_permuted_map(call, Tile::kBatch, x_map);
  if (error != cudaSuccess) return error;
  error = permute_activations(call);
  if (error != cudaSuccess) return error;
  const int batch_tiles = divide_up(call.batch, Tile::kBatch);
  const int row_tiles = divide_up(call.weight.out_features, Tile::kTileRows);
  const auto kernel =
      call.weight.crow_indices == nullptr ? warpgroup_pairs_kernel<Tile, false> : warpgroup_pairs_kernel<Tile, true>;
  return launch_clusters(kernel, row_tiles * batch_tiles, plan.slices, Tile::kThreads, sizeof(PairShared<Tile>),
                         call.stream, packed_map, x_map, call, plan.slice_stages, batch_tiles);
}

// What a block takes, in nanoseconds: for tables, first loads and the sums' way to y, and for each stage. Measured on
// an H200, by bits (2 to 4).
struct PairCost {
  int start;
  int stage;
};
struct PairShape {
  int rows;
  int batch;
  PairCost cost[3];
};
// Tiles of 64 rows pay at 4 bits only, where they have room for a second copy of the tables.
constexpr PairShape kPairShapes[] = {
    {64, 16, {{}, {}, {5005, 243}}},
    {64, 32, {{}, {}, {4875, 273}}},
    {128, 16, {{4452, 313}, {4897, 334}, {5357, 405}}},
    {128, 32, {{4670, 345}, {5030, 361}, {5245, 440}}},
    {128, 64, {{5743, 494}, {5647, 528}, {6309, 566}}},
};

// The narrowest tile that takes all activations: with two, a row's tables would be filled twice.
constexpr int tile_batch(int batch) { return batch <= 16 ? 16 : batch <= 32 ? 32 : 64; }

// The division that takes the least time, by that measure.
PairPlan make_plan(const LinearCall& call) {
  PairPlan best{};
  int64_t least = INT64_MAX;
  for (const PairShape& shape : kPairShapes) {
    const PairCost cost = shape.cost[call.weight.bits - 2];
    if (cost.stage == 0 || shape.batch != tile_batch(call.batch)) continue;
    const int64_t tiles = int64_t{divide_up(call.weight.out_features, shape.rows)} * divide_up(call.batch, shape.batch);
    for (int slices = 1; slices <= kMostSlices; ++slices) {
      const int slice_stages = divide_up(divide_up(call.weight.in_features, kStageColumns), slices);
      const int resident = resident_blocks(call, slices);
      const int64_t rounds = (tiles * slices + resident - 1) / resident;
      const int64_t time = rounds * (cost.start + int64_t{slice_stages} * cost.stage);
      if (time >= least) continue;
      least = time;
      best = {shape.rows, shape.batch, slices, slice_stages};
    }
  }
  return best;
}

template <class T, int kBits>
cudaError_t launch_pair_tile(const LinearCall& call) {
  const PairPlan plan = make_plan(call);
  if constexpr (kBits == 4) {
    if (plan.rows == 64 && plan.batch == 16) return launch<PairTile<T, kBits, 64, 16>>(call, plan);
    if (plan.rows == 64) return launch<PairTile<T, kBits, 64, 32>>(call, plan);
  }
  if (plan.batch == 16) return launch<PairTile<T, kBits, 128, 16>>(call, plan);
  if (plan.batch == 32) return launch<PairTile<T, kBits, 128, 32>>(call, plan);
  return launch<PairTile<T, kBits, 128, 64>>(call, plan);
}

}  // namespace
}  // namespace squeezellm_hf::cuda::warpgroup

namespace squeezellm_hf::cuda {

cudaError_t linear_warpgroup_pairs(const LinearCall& call) {
  return dispatch(call, [&](auto type, auto bits) {
    return warpgroup::launch_pair_tile<typename decltype(type)::Type, bits.value>(call);
  });
}

}  // namespace squeezellm_hf::cuda
