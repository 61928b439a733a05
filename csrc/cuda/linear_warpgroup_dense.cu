// y = x W^T for larger batches on the tensor cores of compute capability 9.0, of weights without a sparse part.
//
// A block owns a tile of rows and of the batch, and a slice of the columns. One thread orders copies of packed
// indices and of x, 128 columns at a time, into a ring of stages. Warpgroups look the values up in registers
// (fragment_table.cuh), where the tensor core takes its left operand from: W is neither written to shared memory nor
// read back. While the tensor core multiplies 32 columns, a thread looks up the next 32.
//
// The blocks of a cluster take a slice of the columns each and add their sums, in a fixed order.
#include "dispatch.h"
#include "fragment_table.cuh"
#include "warpgroup_tile.cuh"

namespace squeezellm_hf::cuda::warpgroup {
namespace {

constexpr int kStageColumns = kPackedColumns;
constexpr int kLineColumns = 64;   // of a tile of x: 128 bytes
constexpr int kChunkColumns = 32;  // looked up at a time
constexpr int kChunks = kStageColumns / kChunkColumns;
constexpr int kSteps = kChunkColumns / kProductDepth;
// Registers of a thread that orders copies: the others take what is left of the block's.
constexpr int kCopyRegisters = 24;

template <class T_, int kBits_, int kBatch_>
struct DenseTile {
  using T = T_;
  static constexpr int kBits = kBits_;
  static constexpr int kBatch = kBatch_;
  static constexpr int kRightLines = kBatch < kProductLines ? kBatch : kProductLines;
  static constexpr int kProducts = kBatch / kRightLines;
  static constexpr int kProductThreads = kRows / kGroupLines * kGroupThreads;
  static constexpr int kThreads = kProductThreads + kGroupThreads;
  static constexpr int kSlots = kBatch <= 64 ? 4 : kBatch <= 128 ? 5 : 3;
  static constexpr int kBlocks = kBatch <= 64 ? 2 : 1;  // of a multiprocessor
  static constexpr int kProductRegisters = kBlocks == 2 ? 104 : 240;
  // Chunks that the tensor core may still be at when the next one is looked up. With three, the compiler no longer
  // sees that the registers are free, and serializes the products (C7513).
  static constexpr int kPending = kBatch <= 64 ? 2 : 1;
  // What a warp writes at once lies in different banks.
  static constexpr int kSumStride = kRows + 4;

  using Sums = float[kProducts][kRightLines / 8][4];
};

template <class Tile>
struct alignas(1024) DenseSlot {
  unsigned char x[kStageColumns / kLineColumns][Tile::kBatch][kLineColumns * 2];
  unsigned char packed[kRows][kPackedRowBytes<Tile::kBits>];
};

// A slot is asked for again once all warps have freed it, and every warp waits for every stage: no barrier is ever
// more than the phase waited for ahead or behind, so that its parity tells them apart.
template <class Tile>
struct DenseShared {
  DenseSlot<Tile> slots[Tile::kSlots];
  uint64_t ready[Tile::kSlots];  // indices and x are there
  uint64_t free[Tile::kSlots];   // all products with them are done
};

#ifdef SQUEEZELLM_HF_WGMMA

// By one thread: all stages of the block. The first ones' indices are asked for before the kernel before is done.
template <class Tile>
__device__ __forceinline__ void request_stages(const CUtensorMap& packed_map, const CUtensorMap& x_map,
                                               DenseShared<Tile>& shared, int row, int batch, int first_stage,
                                               int stages) {
  constexpr uint32_t kBytes = sizeof(shared.slots[0].x) + sizeof(shared.slots[0].packed);
  const auto request_packed = [&](int stage, int slot) {
    arrive_expecting(shared.ready[slot], kBytes);
    copy_tile(shared.slots[slot].packed, packed_map, (first_stage + stage) * (kPackedRowBytes<Tile::kBits> / 4), row,
              shared.ready[slot]);
  };
  const int early = min(Tile::kSlots, stages);
  for (int i = 0; i < early; ++i) request_packed(i, i);
  wait_for_last_kernel();
  Place<Tile::kSlots> place;
  for (int stage = 0; stage < stages; ++stage, place.advance(1)) {
    if (stage >= early) {
      wait(shared.free[place.slot], place.parity ^ 1);
      request_packed(stage, place.slot);
    }
#pragma unroll
    for (int i = 0; i < kStageColumns / kLineColumns; ++i)
      copy_tile(shared.slots[place.slot].x[i], x_map, (first_stage + stage) * kStageColumns + i * kLineColumns, batch,
                shared.ready[place.slot]);
  }
}

// The indices of a chunk of columns of a row.
template <int kBits>
__device__ __forceinline__ void load_chunk(uint32_t (&words)[kBits], const unsigned char* packed, int row, int chunk) {
  constexpr int kBytes = kChunkColumns * kBits / 8;
  const int begin = chunk * kBytes;
  const unsigned char* line = packed + row * kPackedRowBytes<kBits>;
  load_indices<kBits>(words, line + packed_chunk<kBits>(row, begin / 16) * 16 + begin % 16);
}

// What a warpgroup does: the sums of its 64 rows and all activations of the block, over all stages.
template <class Tile>
__device__ __forceinline__ void multiply_stages(typename Tile::Sums& sums, const RowTable<Tile::kBits> (&tables)[2],
                                                DenseShared<Tile>& shared, int stages) {
  using T = typename Tile::T;
  constexpr int kBits = Tile::kBits;
  constexpr int kLineBytes = kLineColumns * 2;
  constexpr uint32_t kBarrierBytes = sizeof(uint64_t);
  const int lane = threadIdx.x % kWarpLanes;
  const uint32_t t = lane % 4;
  const int row = threadIdx.x / kWarpLanes * 16 + lane / 4;
  const uint32_t ready = shared_address(shared.ready);
  const uint32_t free = shared_address(shared.free);
  const uint64_t right = matrix_descriptor(shared_address(shared.slots[0].x));

  uint32_t words[2][kBits];
  const auto load = [&](int slot, int chunk) {
#pragma unroll
    for (int h = 0; h < 2; ++h) load_chunk<kBits>(words[h], shared.slots[slot].packed[0], row + 8 * h, chunk);
  };
  uint32_t fragments[kChunks][kSteps][4];
  const auto look_up_chunk = [&](int buffer) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        look_up<kBits>(tables[h], select_indices<kBits>(words[h], step, t), fragments[buffer][step][h],
                       fragments[buffer][step][2 + h]);
  };

  Place<Tile::kSlots> place;
  int last_slot = 0;
  wait_at(ready, 0);
  load(0, 0);
  look_up_chunk(0);
  load(0, 1);
#pragma unroll 1
  for (int stage = 0; stage < stages; ++stage) {
    // Descriptors count in 16 bytes.
    const uint64_t slot = right + place.slot * static_cast<uint32_t>(sizeof(DenseSlot<Tile>) / 16);
    Place<Tile::kSlots> next = place;
    next.advance(1);
    const bool more = stage + 1 < stages;
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      begin_products();
#pragma unroll
      for (int step = 0; step < kSteps; ++step)
#pragma unroll
        for (int i = 0; i < Tile::kProducts; ++i) {
          const int column = chunk * kChunkColumns + step * kProductDepth;
          const int offset = column / kLineColumns * static_cast<int>(sizeof(shared.slots[0].x[0])) +
                             i * kProductLines * kLineBytes + column % kLineColumns * 2;
          multiply_fragment<T>(sums[i], fragments[chunk][step], slot + offset / 16);
        }
      commit_products();
      // All but the last few chunks' products are done: the next chunk's registers are free, and at one of the
      // chunks the last stage's slot.
      wait_for_products<Tile::kPending>();
      if (chunk + 1 == Tile::kPending && stage > 0) {
        __syncwarp();  // all lanes have read the indices
        if (lane < kArrivingLanes) arrive_at(free + last_slot * kBarrierBytes);
      }
      look_up_chunk((chunk + 1) % kChunks);
      if (chunk + 2 < kChunks) {
        load(place.slot, chunk + 2);
      } else if (more) {
        if (chunk + 2 == kChunks) wait_at(ready + next.slot * kBarrierBytes, next.parity);
        load(next.slot, chunk + 2 - kChunks);
      }
    }
    last_slot = place.slot;
    place = next;
  }
  wait_for_products<0>();
}

template <class Tile>
__device__ __forceinline__ void multiply(const LinearCall& call, DenseShared<Tile>& shared, int first_row,
                                         int first_batch, int stages) {
  take_registers<Tile::kProductRegisters>();
  const int row = first_row + threadIdx.x / kWarpLanes * 16 + threadIdx.x % kWarpLanes / 4;
  RowTable<Tile::kBits> tables[2];
  // Rows beyond the last are computed like it and not written.
#pragma unroll
  for (int h = 0; h < 2; ++h)
    tables[h] = load_table<typename Tile::T, Tile::kBits>(call.weight, min(row + 8 * h, call.weight.out_features - 1));
  typename Tile::Sums sums = {};
  multiply_stages<Tile>(sums, tables, shared, stages);
  // The stages make room for the sums.
  static_assert(Tile::kBatch * Tile::kSumStride * sizeof(float) <= sizeof(shared.slots));
  synchronize(1, Tile::kProductThreads);
  float* slice_sums = reinterpret_cast<float*>(shared.slots);
  store_sums<false, Tile::kSumStride>(slice_sums, sums);
  synchronize_cluster();
  add_slices<Tile>(call, slice_sums, first_row, first_batch);
  synchronize_cluster();
}

#endif

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    warpgroup_dense_kernel(const __grid_constant__ CUtensorMap packed_map, const __grid_constant__ CUtensorMap x_map,
                           const __grid_constant__ LinearCall call, int slice_stages, int batch_tiles) {
#ifdef SQUEEZELLM_HF_WGMMA
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<DenseShared<Tile>*>(memory);
  const int tile = blockIdx.x / cluster_size();
  // Neighbouring blocks share rows of W: all but one find them in the L2 cache.
  const int first_row = tile / batch_tiles * kRows;
  const int first_batch = tile % batch_tiles * Tile::kBatch;
  const int first_stage = cluster_rank() * slice_stages;
  if (threadIdx.x == 0) {
    for (int i = 0; i < Tile::kSlots; ++i) {
      initialize_barrier(shared.ready[i], 1);
      initialize_barrier(shared.free[i], Tile::kProductThreads / kWarpLanes * kArrivingLanes);
    }
    fence_barriers();
  }
  if (threadIdx.x == Tile::kProductThreads) {
    prefetch_map(packed_map);
    prefetch_map(x_map);
  }
  __syncthreads();

  if (threadIdx.x < Tile::kProductThreads) {
    wait_for_last_kernel();
    multiply(call, shared, first_row, first_batch, slice_stages);
  } else {
    give_up_registers<kCopyRegisters>();
    if (threadIdx.x == Tile::kProductThreads)
      request_stages(packed_map, x_map, shared, first_row, first_batch, first_stage, slice_stages);
  }
#endif
}

// How a call is divided.
struct DensePlan {
  int batch;  // of a tile
  int slices;
  int slice_stages;
};

template <class Tile>
cudaError_t launch(const LinearCall& call, const DensePlan& plan) {
  CUtensorMap packed_map;
  CUtensorMap x_map;
  cudaError_t error = make_packed_map<Tile::kBits>(call.weight, kRows, packed_map);
  if (error != cudaSuccess) return error;
  error = make_x_map(call, Tile::kBatch, x_map);
  if (error != cudaSuccess) return error;
  const int batch_tiles = divide_up(call.batch, Tile::kBatch);
  const int row_tiles = divide_up(call.weight.out_features, kRows);
  return launch_clusters(warpgroup_dense_kernel<Tile>, row_tiles * batch_tiles, plan.slices, Tile::kThreads,
                         sizeof(DenseShared<Tile>), call.stream, packed_map, x_map, call, plan.slice_stages,
                         batch_tiles);
}

// What a block takes, in nanoseconds: for its first loads and the sums' way to y, and for each stage. Measured on an
// H200, by bits (2 to 4), alone on a multiprocessor and beside another block.
struct Cost {
  int start;
  int stage;
};
struct TileShape {
  int batch;
  Cost alone[3];
  Cost beside[3];
};
constexpr TileShape kTileShapes[] = {
    {64, {{3510, 620}, {3300, 700}, {3020, 820}}, {{4170, 1110}, {4250, 1300}, {3980, 1470}}},
    {128, {{5310, 720}, {5390, 840}, {5460, 930}}, {}},
    {256, {{7050, 1270}, {7170, 1280}, {7340, 1320}}, {}},
};

// Nanoseconds that `blocks` blocks of `stages` stages take on a device that holds `resident` of them, one each
// multiprocessor: rounds of as many as it holds, then the rest.
int64_t time_of(const TileShape& shape, int bits, int64_t blocks, int stages, int resident, int resident_beside) {
  const auto time = [stages](Cost cost) { return int64_t{stages} * cost.stage + cost.start; };
  const int64_t alone = time(shape.alone[bits - 2]);
  if (shape.beside[0].stage == 0) return (blocks + resident - 1) / resident * alone;
  const int64_t beside = time(shape.beside[bits - 2]);
  const int64_t rest = blocks % resident_beside;
  return blocks / resident_beside * beside + (rest == 0 ? 0 : rest <= resident ? alone : beside);
}

// The division that takes the least time, by that measure.
DensePlan make_plan(const LinearCall& call) {
  DensePlan best{};
  int64_t least = INT64_MAX;
  for (const TileShape& shape : kTileShapes) {
    const int64_t tiles = int64_t{divide_up(call.weight.out_features, kRows)} * divide_up(call.batch, shape.batch);
    for (int slices = 1; slices <= kMostSlices; ++slices) {
      const int slice_stages = divide_up(divide_up(call.weight.in_features, kStageColumns), slices);
      const int64_t time = time_of(shape, call.weight.bits, tiles * slices, slice_stages, resident_blocks(call, slices),
                                   resident_pairs(call, slices));
      if (time >= least) continue;
      least = time;
      best = {shape.batch, slices, slice_stages};
    }
  }
  return best;
}

template <class T, int kBits>
cudaError_t launch_dense_tile(const LinearCall& call) {
  const DensePlan plan = make_plan(call);
  if (plan.batch == 64) return launch<DenseTile<T, kBits, 64>>(call, plan);
  if (plan.batch == 128) return launch<DenseTile<T, kBits, 128>>(call, plan);
  return launch<DenseTile<T, kBits, 256>>(call, plan);
}

}  // namespace
}  // namespace squeezellm_hf::cuda::warpgroup

namespace squeezellm_hf::cuda {

cudaError_t linear_warpgroup_dense(const LinearCall& call) {
  return dispatch(call, [&](auto type, auto bits) {
    return warpgroup::launch_dense_tile<typename decltype(type)::Type, bits.value>(call);
  });
}

}  // namespace squeezellm_hf::cuda
