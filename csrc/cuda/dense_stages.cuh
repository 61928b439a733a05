// What the kernels for larger batches without a sparse part share: tiles, the ring of stages, and the loop that looks
// W up and multiplies.
//
// One thread orders copies of packed indices and of x, 128 columns at a time, into a ring of stages. Warpgroups look
// the values up in registers (left_operand.cuh): W is neither written to shared memory nor read back.
#pragma once

#include "left_operand.cuh"

namespace squeezellm_hf::cuda::warpgroup {

// Registers of a thread that orders copies: the others take what is left of the block's.
constexpr int kCopyRegisters = 24;
constexpr uint32_t kAllLanes = 0xffffffff;

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

// A slot is asked for again once all warps have freed it, and every warp waits for every stage and frees it once: no
// barrier is ever more than the phase waited for ahead or behind, so that its parity tells them apart.
template <class Tile>
struct DenseRing {
  DenseSlot<Tile> slots[Tile::kSlots];
  uint64_t ready[Tile::kSlots];  // indices and x are there
  uint64_t free[Tile::kSlots];   // all products with them are done
};

#ifdef SQUEEZELLM_HF_WGMMA

// By one thread, before a barrier of the block.
template <class Tile>
__device__ __forceinline__ void initialize_ring(DenseRing<Tile>& ring) {
  for (int i = 0; i < Tile::kSlots; ++i) {
    initialize_barrier(ring.ready[i], 1);
    initialize_barrier(ring.free[i], Tile::kProductThreads / kWarpLanes * kArrivingLanes);
  }
  fence_barriers();
}

// Asks for a stage's indices, and announces x.
template <class Tile>
__device__ __forceinline__ void request_packed(const CUtensorMap& map, DenseRing<Tile>& ring, int slot, int row,
                                               int stage) {
  constexpr uint32_t kBytes = sizeof(ring.slots[0].x) + sizeof(ring.slots[0].packed);
  arrive_expecting(ring.ready[slot], kBytes);
  copy_tile_once(ring.slots[slot].packed, map, stage * (kPackedRowBytes<Tile::kBits> / 4), row, ring.ready[slot]);
}

template <class Tile>
__device__ __forceinline__ void request_x(const CUtensorMap& map, DenseRing<Tile>& ring, int slot, int batch,
                                          int stage) {
#pragma unroll
  for (int i = 0; i < kStageColumns / kLineColumns; ++i)
    copy_tile(ring.slots[slot].x[i], map, stage * kStageColumns + i * kLineColumns, batch, ring.ready[slot]);
}

// What a warpgroup does: the sums of its 64 rows and all activations of the tile, over the next stages of the ring.
template <class Tile>
__device__ __forceinline__ void multiply_stages(typename Tile::Sums& sums, const RowTable<Tile::kBits> (&tables)[2],
                                                DenseRing<Tile>& ring, Place<Tile::kSlots>& place, int stages) {
  using T = typename Tile::T;
  constexpr int kBits = Tile::kBits;
  constexpr int kLineBytes = kLineColumns * 2;
  constexpr uint32_t kBarrierBytes = sizeof(uint64_t);
  const int lane = threadIdx.x % kWarpLanes;
  const uint32_t t = lane % 4;
  const int row = threadIdx.x / kWarpLanes * 16 + lane / 4;
  const uint32_t ready = shared_address(ring.ready);
  const uint32_t free = shared_address(ring.free);
  const uint64_t right = matrix_descriptor(shared_address(ring.slots[0].x));

  uint32_t words[2][kBits];
  const auto load = [&](int slot, int chunk) {
#pragma unroll
    for (int h = 0; h < 2; ++h) load_chunk<kBits>(words[h], ring.slots[slot].packed[0], row + 8 * h, chunk);
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
  const auto release = [&](int slot) {
    __syncwarp();  // all lanes have read the indices
    if (lane < kArrivingLanes) arrive_at(free + slot * kBarrierBytes);
  };

  int last_slot = 0;
  wait_at(ready + place.slot * kBarrierBytes, place.parity);
  load(place.slot, 0);
  look_up_chunk(0);
  load(place.slot, 1);
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
          const int offset = column / kLineColumns * static_cast<int>(sizeof(ring.slots[0].x[0])) +
                             i * kProductLines * kLineBytes + column % kLineColumns * 2;
          multiply_fragment<T>(sums[i], fragments[chunk][step], slot + offset / 16);
        }
      commit_products();
      // All but the last few chunks' products are done: the next chunk's registers are free, and at one of the
      // chunks the last stage's slot.
      wait_for_products<Tile::kPending>();
      if (chunk + 1 == Tile::kPending && stage > 0) release(last_slot);
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
  release(last_slot);
}

#endif

}  // namespace squeezellm_hf::cuda::warpgroup
