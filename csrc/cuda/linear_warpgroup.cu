// y = x W^T for larger batches on the tensor cores of compute capability 9.0, of weights with a sparse part.
//
// A block owns a tile of rows and of the batch, and a slice of the columns. Its warps have two duties
// and pass tiles of 64 columns on through shared memory:
//   - dequantizing warps turn packed indices into a tile of W in 16 bits. A lane owns a row: its table
//     stays in registers (row_table.cuh), and the row's sparse values are added to the tile, so that
//     they cost no products of their own;
//   - warpgroups multiply that by the tile of x that the copy engine brings, and do little else.
// The blocks of a cluster take a slice of the columns each and add their sums through each other's
// shared memory, in a fixed order.
//
// An instruction of the tensor core multiplies 64 lines of one tile, which each warpgroup has for itself,
// by all lines of the other. Where the batch is small, the latter are the rows of W; where it is large,
// they are activations.
#include <algorithm>

#include "dispatch.h"
#include "row_table.cuh"
#include "sparse_cursor.cuh"
#include "warpgroup_tile.cuh"

namespace squeezellm_hf::cuda::warpgroup {
namespace {

constexpr int kStageColumns = 64;  // a line of 128 bytes
constexpr int kStagesPerPacked = kPackedColumns / kStageColumns;
// Where threads start with too few registers for the sums: what 256 of each kind then have.
constexpr int kProductRegisters = 160;
constexpr int kDequantizeRegisters = 96;

template <class T_, int kBits_, int kBatch_>
struct Tile {
  using T = T_;
  static constexpr int kBits = kBits_;
  static constexpr int kBatch = kBatch_;
  static constexpr bool kWeightsRight = kBatch <= 128;
  static constexpr int kRightLines = kWeightsRight ? kRows : kBatch;
  static constexpr int kProducts = kRightLines / kProductLines;
  static constexpr int kGroups = (kWeightsRight ? kBatch : kRows) / kGroupLines;
  static constexpr int kProductThreads = kGroups * kGroupThreads;
  // Threads that dequantize a row, each a part of the slice; the parts' tiles take turns.
  static constexpr int kParts = kBatch <= 128 ? 3 : 2;
  static constexpr int kPartWarps = kRows / kWarpLanes;
  static constexpr int kDequantizeWarps = kParts * kPartWarps;
  static constexpr int kDequantizeThreads = kDequantizeWarps * kWarpLanes;
  static constexpr int kThreads = kProductThreads + kDequantizeThreads;
  // 65536 / kThreads registers are too few for a thread's sums of 256 lines.
  static constexpr bool kMovesRegisters = kProducts > 1;

  static constexpr int kSlots = kBatch <= 128 ? 4 : 3;
  // A part waits for a slot to be free after it has waited for the stage kParts before: by then, all before that
  // one less kSlots are free, and so the parity tells the phase waited for from the one two before.
  static_assert(kParts <= kSlots);
  static constexpr int kPackedSlots = kBatch <= 128 ? 2 : 3;
  static constexpr int kPackedRowBytes = warpgroup::kPackedRowBytes<kBits>;
  // Of the sums in shared memory: what a warp writes at once lies in different banks.
  static constexpr int kSumStride = kWeightsRight ? kRows + 8 : kRows + 4;

  using Sums = float[kProducts][kProductLines / 8][4];
};

// The tiles of one stage: lines of 64 columns, their 16-byte chunks permuted by the line's number.
template <class Tile>
struct alignas(1024) Slot {
  unsigned char weights[kRows][kStageColumns * 2];
  unsigned char x[Tile::kBatch][kStageColumns * 2];
};

template <class Tile>
struct Shared {
  Slot<Tile> slots[Tile::kSlots];
  unsigned char packed[Tile::kDequantizeWarps][Tile::kPackedSlots][kWarpLanes][Tile::kPackedRowBytes];
  EntryBuffer<Tile::kDequantizeThreads> entries;
  uint64_t ready[Tile::kSlots];  // both tiles are there
  uint64_t free[Tile::kSlots];   // all products with them are done
  uint64_t packed_ready[Tile::kDequantizeWarps][Tile::kPackedSlots];
};

// What a block does.
struct Work {
  int first_row;
  int first_batch;
  int first_column;
  int part_stages;  // of each part
};

#ifdef SQUEEZELLM_HF_WGMMA

template <class Tile>
__device__ __forceinline__ void initialize_barriers(Shared<Tile>& shared) {
  constexpr int kProductWarps = Tile::kProductThreads / kWarpLanes;
  for (int i = 0; i < Tile::kSlots; ++i) {
    initialize_barrier(shared.ready[i], Tile::kPartWarps * kArrivingLanes + 1);  // the other one announces x
    initialize_barrier(shared.free[i], kProductWarps * kArrivingLanes);
  }
  for (auto& slots : shared.packed_ready)
    for (auto& barrier : slots) initialize_barrier(barrier, 1);
  fence_barriers();
}

// The indices of 64 columns of a row, the first or the second ones of a packed tile.
template <int kBits>
__device__ __forceinline__ void load_indices(uint32_t (&words)[2][kBits], const unsigned char* packed, int row,
                                             int half) {
  if constexpr (kBits == 3) {
    const auto* source = reinterpret_cast<const uint2*>(packed + half * 24);
    const uint2 v[3] = {source[0], source[1], source[2]};
    words[0][0] = v[0].x, words[0][1] = v[0].y, words[0][2] = v[1].x;
    words[1][0] = v[1].y, words[1][1] = v[2].x, words[1][2] = v[2].y;
  } else {
    constexpr int kChunks = kBits / 2;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int chunk = packed_chunk<kBits>(row, half * kChunks + i);
      const uint4 v = *reinterpret_cast<const uint4*>(packed + chunk * 16);
      const uint32_t loaded[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) words[(i * 4 + j) / kBits][(i * 4 + j) % kBits] = loaded[j];
    }
  }
}

// The table's own value at a column of the packed tile.
template <int kBits>
__device__ float exact_value(const LutWeight& weight, int row, const unsigned char* packed, int lane, int column) {
  const auto word_at = [&](int word) {
    return *reinterpret_cast<const uint32_t*>(packed + packed_chunk<kBits>(lane, word / 4) * 16 + word % 4 * 4);
  };
  const int bit = column * kBits;
  const uint32_t first = word_at(bit / 32);
  uint32_t index = first >> bit % 32;
  if (kBits == 3 && bit % 32 > 32 - kBits) index = __funnelshift_r(first, word_at(bit / 32 + 1), bit % 32);
  index &= (1 << kBits) - 1;
  return load_float(weight.lookup_table, weight.table_dtype, (int64_t{row} << kBits) + index);
}

template <class Tile>
__device__ __forceinline__ void dequantize_rows(const LutWeight& weight, bool copies_entries,
                                                const CUtensorMap& packed_map, const CUtensorMap& x_map,
                                                Shared<Tile>& shared, const Work& work) {
  using T = typename Tile::T;
  constexpr int kBits = Tile::kBits;
  const int thread = threadIdx.x - Tile::kProductThreads;
  const int lane = thread % kWarpLanes;
  const int warp = __shfl_sync(0xffffffff, thread / kWarpLanes, 0);
  const int part = warp / Tile::kPartWarps;
  const int tile_row = warp % Tile::kPartWarps * kWarpLanes + lane;
  const int row = work.first_row + tile_row;
  const int tiles = work.part_stages / kStagesPerPacked;
  int column = work.first_column + part * work.part_stages * kStageColumns;

  constexpr uint32_t kXBytes = sizeof(shared.slots[0].x);
  const bool requests_x = warp % Tile::kPartWarps == 0 && lane == 0;
  const auto request_packed = [&](int tile, int slot) {
    constexpr int kTileWords = Tile::kPackedRowBytes / 4;
    uint64_t& ready = shared.packed_ready[warp][slot];
    const int word = (work.first_column + part * work.part_stages * kStageColumns) / kPackedColumns * kTileWords;
    arrive_expecting(ready, sizeof(shared.packed[0][0]));
    copy_tile(shared.packed[warp][slot], packed_map, word + tile * kTileWords, row, ready);
  };
  if (lane == 0)
    for (int i = 0; i < min(Tile::kPackedSlots, tiles); ++i) request_packed(i, i);

  SparseCursor<Tile::kDequantizeThreads> sparse{weight, shared.entries, thread};
  if (weight.crow_indices != nullptr && row < weight.out_features) sparse.begin(row, column);
  // Rows beyond the last are computed like it and not written.
  const int table_row = min(row, weight.out_features - 1);
  const RowTable<kBits> table = load_table<T, kBits>(weight, table_row);
  const bool exact_table = weight.table_dtype == kDType<T>;

  Place<Tile::kPackedSlots> packed_place;
  Place<Tile::kSlots> place;
  place.advance(part);
  for (int tile = 0; tile < tiles; ++tile, packed_place.advance(1)) {
    if (copies_entries) {
      sparse.receive_entries();
      sparse.request_entries();
      if (tile == 0) sparse.receive_entries();
    }
    const unsigned char* packed = shared.packed[warp][packed_place.slot][lane];
    wait(shared.packed_ready[warp][packed_place.slot], packed_place.parity);
#pragma unroll
    for (int half = 0; half < kStagesPerPacked; ++half, place.advance(Tile::kParts), column += kStageColumns) {
      uint32_t words[2][kBits];
      load_indices<kBits>(words, packed, lane, half);
      Slot<Tile>& slot = shared.slots[place.slot];
      uint64_t& ready = shared.ready[place.slot];
      wait(shared.free[place.slot], place.parity ^ 1);
      if (requests_x) {
        arrive_expecting(ready, kXBytes);
        copy_tile(slot.x, x_map, column, work.first_batch, ready);
      }
      unsigned char* line = slot.weights[tile_row];
      const auto cell = [&](int chunk) { return line + (chunk ^ tile_row % 8) * 16; };
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        uint4 values[4];
        look_up_all<kBits>(table, words[i], values);
#pragma unroll
        for (int j = 0; j < 4; ++j) *reinterpret_cast<uint4*>(cell(4 * i + j)) = values[j];
      }
      // By all lanes together, so that their loads overlap; the others look on.
      while (__any_sync(0xffffffff, sparse.column < column + kStageColumns)) {
        const int within = sparse.column - column;
        const bool present = within < kStageColumns;
        // Columns that do not ascend are passed over.
        const bool inside = present && within >= 0;
        T* target = reinterpret_cast<T*>(cell(inside ? within / 8 : 0)) + (inside ? within % 8 : 0);
        const float value = sparse.value();
        float dense = to_float(*target);
        if (!exact_table && inside)
          dense = exact_value<kBits>(weight, table_row, packed, lane, half * kStageColumns + within);
        if (present) sparse.advance();
        if (inside) *target = from_float<T>(dense + value);
      }
      publish_shared();
      __syncwarp();
      if (lane < kArrivingLanes) arrive(ready);
    }
    if (lane == 0 && tile + Tile::kPackedSlots < tiles) request_packed(tile + Tile::kPackedSlots, packed_place.slot);
  }
}

// The product of a warpgroup's 64 lines of one tile and all lines of the other, over all stages. A stage
// is waited for when the next one's products have been given to the tensor core. The addresses are
// made beforehand: this loop's instructions are what the tensor core waits for.
template <class Tile, int kGroup>
__device__ __forceinline__ void multiply_stages(typename Tile::Sums& sums, Shared<Tile>& shared, int stages) {
  const bool arrives = threadIdx.x % kWarpLanes < kArrivingLanes;
  const uint32_t ready = shared_address(shared.ready);
  const uint32_t free = shared_address(shared.free);
  constexpr int kLineBytes = kStageColumns * 2;
  const uint32_t weights = shared_address(shared.slots[0].weights);
  const uint32_t x = shared_address(shared.slots[0].x);
  const uint64_t left = matrix_descriptor((Tile::kWeightsRight ? x : weights) + kGroup * kGroupLines * kLineBytes);
  const uint64_t right = matrix_descriptor(Tile::kWeightsRight ? weights : x);
  constexpr uint32_t kBarrierBytes = sizeof(uint64_t);
  Place<Tile::kSlots> place;
  int last_slot = 0;
#pragma unroll 1
  for (int stage = 0; stage < stages; ++stage, place.advance(1)) {
    wait_at(ready + place.slot * kBarrierBytes, place.parity);
    // Descriptors count in 16 bytes.
    const uint32_t slot = place.slot * static_cast<uint32_t>(sizeof(Slot<Tile>) / 16);
    begin_products();
#pragma unroll
    for (int k = 0; k < kStageColumns; k += kProductDepth)
#pragma unroll
      for (int i = 0; i < Tile::kProducts; ++i)
        multiply_group<typename Tile::T>(sums[i], left + slot + k * 2 / 16,
                                         right + slot + (i * kProductLines * kLineBytes + k * 2) / 16);
    commit_products();
    wait_for_products<1>();
    if (stage > 0 && arrives) arrive_at(free + last_slot * kBarrierBytes);
    last_slot = place.slot;
  }
  wait_for_products<0>();
}

// What a warpgroup does. The group is known at compile time: the tensor core takes addresses from
// registers that all threads share.
template <class Tile, int kGroup>
__device__ __forceinline__ void multiply(const LinearCall& call, Shared<Tile>& shared, const Work& work) {
  if constexpr (Tile::kMovesRegisters) take_registers<kProductRegisters>();
  typename Tile::Sums sums = {};
  multiply_stages<Tile, kGroup>(sums, shared, work.part_stages * Tile::kParts);
  // The tiles make room for the sums.
  static_assert(Tile::kBatch * Tile::kSumStride * sizeof(float) <= sizeof(shared.slots));
  synchronize(1, Tile::kProductThreads);
  float* slice_sums = reinterpret_cast<float*>(shared.slots);
  store_sums<Tile::kWeightsRight, Tile::kSumStride>(slice_sums, sums);
  synchronize_cluster();
  add_slices<Tile>(call, slice_sums, work.first_row, work.first_batch);
  synchronize_cluster();
}

#endif

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    warpgroup_kernel(const __grid_constant__ CUtensorMap packed_map, const __grid_constant__ CUtensorMap x_map,
                     const __grid_constant__ LinearCall call, int part_stages, int batch_tiles, bool copies_entries) {
#ifdef SQUEEZELLM_HF_WGMMA
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<Shared<Tile>*>(memory);
  const int tile = blockIdx.x / cluster_size();
  // Neighbouring blocks share rows of W: all but one find them in the L2 cache.
  const Work work{tile / batch_tiles * kRows, tile % batch_tiles * Tile::kBatch,
                  cluster_rank() * Tile::kParts * part_stages * kStageColumns, part_stages};
  if (threadIdx.x == 0) initialize_barriers(shared);
  if (threadIdx.x == Tile::kProductThreads) {
    prefetch_map(packed_map);
    prefetch_map(x_map);
  }
  __syncthreads();
  wait_for_last_kernel();

  if (threadIdx.x < kGroupThreads) {
    multiply<Tile, 0>(call, shared, work);
  } else if (threadIdx.x < Tile::kProductThreads) {
    multiply<Tile, 1>(call, shared, work);
  } else {
    if constexpr (Tile::kMovesRegisters) give_up_registers<kDequantizeRegisters>();
    dequantize_rows(call.weight, copies_entries, packed_map, x_map, shared, work);
  }
#endif
}

// How a call is divided.
struct Plan {
  int batch;  // of a tile
  int slices;
  int part_stages;
};

template <class Tile>
cudaError_t launch(const LinearCall& call, const Plan& plan) {
  InputMaps maps;
  const cudaError_t error = make_input_maps<Tile::kBits>(call, kWarpLanes, Tile::kBatch, maps);
  if (error != cudaSuccess) return error;
  const int batch_tiles = divide_up(call.batch, Tile::kBatch);
  const int row_tiles = divide_up(call.weight.out_features, kRows);
  const bool copies_entries = call.weight.crow_indices != nullptr && can_copy_entries(call.weight);
  return launch_clusters(warpgroup_kernel<Tile>, row_tiles * batch_tiles, plan.slices, Tile::kThreads,
                         sizeof(Shared<Tile>), call.stream, maps.packed, maps.x, call, plan.part_stages, batch_tiles,
                         copies_entries);
}

// Tiles that kernels are compiled for, and the clocks that a stage of 64 columns takes: measured.
struct TileShape {
  int batch;
  int parts;
  int stage_clocks;
};
constexpr TileShape kTileShapes[] = {{128, 3, 970}, {256, 2, 1500}};

// The division that takes the fewest clocks, by that measure.
Plan make_plan(const LinearCall& call) {
  constexpr int kStartClocks = 6000;  // of a block: the first loads, the sums' way to y
  Plan best{};
  int64_t least = INT64_MAX;
  for (const TileShape& shape : kTileShapes) {
    const int64_t tiles = int64_t{divide_up(call.weight.out_features, kRows)} * divide_up(call.batch, shape.batch);
    for (int slices = 1; slices <= kMostSlices; ++slices) {
      const int packed_tiles = divide_up(call.weight.in_features, kPackedColumns * shape.parts * slices);
      const int part_stages = packed_tiles * kStagesPerPacked;
      const int resident = resident_blocks(call, slices);
      const int64_t rounds = (tiles * slices + resident - 1) / resident;
      const int64_t clocks = rounds * (int64_t{part_stages} * shape.parts * shape.stage_clocks + kStartClocks);
      if (clocks >= least) continue;
      least = clocks;
      best = {shape.batch, slices, part_stages};
    }
  }
  return best;
}

template <class T, int kBits>
cudaError_t launch_tile(const LinearCall& call) {
  const Plan plan = make_plan(call);
  if (plan.batch == 128) return launch<Tile<T, kBits, 128>>(call, plan);
  return launch<Tile<T, kBits, 256>>(call, plan);
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

cudaError_t linear_warpgroup(const LinearCall& call) {
  return dispatch(call, [&](auto type, auto bits) {
    return warpgroup::launch_tile<typename decltype(type)::Type, bits.value>(call);
  });
}

}  // namespace squeezellm_hf::cuda
