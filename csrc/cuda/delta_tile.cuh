// The sparse part as a tile of deltas beside the packed indices: 128 columns of the 64 rows of a warpgroup, nearly all
// zero, in the order in which its threads hold W for the tensor core. So a thread adds them to the eight registers of
// 32 columns that it has just looked up, by packed additions and without a branch.
//
// A warp of each warpgroup's own keeps the tiles: it writes the values of a stage's page (sparse_pages.h) and takes out
// those that lay there before.
#pragma once

#include "sparse_pages.h"
#include "tensor_copy.cuh"

namespace squeezellm_hf::cuda::warpgroup {

constexpr int kDeltaWarps = 4;   // of a warpgroup
constexpr int kDeltaChunks = 4;  // of 32 columns
constexpr int kDeltaSteps = 2;   // of 16
constexpr int kDeltaSlots = 2;

// A thread's deltas of 16 columns lie together, a warp's loads meet each bank once.
struct alignas(16) DeltaTile {
  uint4 registers[kDeltaChunks][kDeltaWarps][kDeltaSteps][kWarpLanes];
};
static_assert(sizeof(DeltaTile) == sizeof(uint16_t) * kPageCells);

// A slot is written once the warps of its warpgroup have freed it, and they wait for every stage: no barrier is ever
// more than the phase waited for ahead or behind.
struct DeltaRing {
  DeltaTile tiles[kDeltaSlots];
  uint64_t ready[kDeltaSlots];
  uint64_t free[kDeltaSlots];
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

// By one thread, before fence_barriers().
__device__ __forceinline__ void initialize_deltas(DeltaRing& ring) {
  for (int i = 0; i < kDeltaSlots; ++i) {
    initialize_barrier(ring.ready[i], kArrivingLanes);
    initialize_barrier(ring.free[i], kDeltaWarps * kArrivingLanes);
  }
}

// By `threads` threads.
__device__ __forceinline__ void clear_delta_tile(DeltaTile& tile, int thread, int threads) {
  auto* registers = &tile.registers[0][0][0][0];
  for (int i = thread; i < kDeltaChunks * kDeltaWarps * kDeltaSteps * kWarpLanes; i += threads)
    registers[i] = {0, 0, 0, 0};
}

// Two values of T each.
template <class T>
__device__ __forceinline__ uint32_t add_pairs(uint32_t a, uint32_t b) {
  uint32_t sum;
  if constexpr (__is_same(T, __nv_bfloat16)) {
    asm("add.rn.bf16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
  } else {
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
  }
  return sum;
}

// By one warp: the tiles of all stages of a block, of the rows whose pages start at `begins`. A page's first entries
// are loaded some stages ahead, behind all of x that is on its way, and kept, to be taken out again; of a longer page
// the rest is loaded when its turn comes, and the whole tile is cleared after it.
__device__ __forceinline__ void keep_delta_tiles(DeltaRing& ring, const SparsePages& pages, int unit, int first_stage,
                                                 int stages) {
  constexpr int kKept = 2;  // of a lane
  constexpr int kAhead = 4;
  constexpr int kHeld = kDeltaSlots + kAhead;  // stages whose entries are in registers
  static_assert(kHeld % kDeltaSlots == 0 && kAhead < kWarpLanes);
  constexpr uint32_t kNone = 0xffffffff;
  constexpr uint32_t kAllLanes = 0xffffffff;
  const int lane = threadIdx.x % kWarpLanes;
  const int32_t* begins = pages.begins + int64_t{unit} * (pages.stages + 1);
  // Stages beyond the last are empty. What a kernel before has just written is read past the L1 cache.
  const auto load_begins = [&](int stage) { return __ldcg(begins + min(first_stage + stage + lane, pages.stages)); };
  int begins_from = 0;  // the stage of the first lane's
  int own_begin = load_begins(0);
  int later_begin = load_begins(kWarpLanes);
  const auto begin_of = [&](int stage) {
    const int i = stage - begins_from;
    return __shfl_sync(kAllLanes, i < kWarpLanes ? own_begin : later_begin, i % kWarpLanes);
  };
  const auto load = [&](uint32_t (&words)[kKept], int begin, int end) {
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      const int entry = begin + i * kWarpLanes + lane;
      words[i] = entry < end ? __ldcg(pages.entries + entry) : kNone;
    }
  };
  const auto put = [&](DeltaTile& tile, uint32_t word, uint16_t value) {
    if (word != kNone) reinterpret_cast<uint16_t*>(&tile)[word % kPageCells] = value;
  };

  uint32_t words[kHeld][kKept];  // of a stage, by its number
  bool longer[kHeld] = {};       // whether it has more
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    if (i < kAhead) {
      load(words[i], begin_of(i), begin_of(i + 1));
    } else {
#pragma unroll
      for (int j = 0; j < kKept; ++j) words[i][j] = kNone;
    }
  }
#pragma unroll 1
  for (int first = 0; first < stages; first += kHeld) {
#pragma unroll
    for (int held = 0; held < kHeld; ++held) {
      const int stage = first + held;
      if (stage >= stages) break;
      if (stage - begins_from == kWarpLanes) {
        begins_from = stage;
        own_begin = later_begin;
        later_begin = load_begins(stage + kWarpLanes);
      }
      constexpr int kSlots = kDeltaSlots;
      const int before = (held + kAhead) % kHeld;  // the slot's last one, then that kAhead from now
      DeltaTile& tile = ring.tiles[held % kSlots];
      wait(ring.free[held % kSlots], (stage / kSlots & 1) ^ 1);
      if (longer[before]) {
        clear_delta_tile(tile, lane, kWarpLanes);
      } else {
#pragma unroll
        for (int i = 0; i < kKept; ++i) put(tile, words[before][i], 0);
      }
      __syncwarp();  // a cell may be another lane's now
#pragma unroll
      for (int i = 0; i < kKept; ++i) put(tile, words[held][i], words[held][i] >> 16);
      const int end = begin_of(stage + 1);
      const int kept_end = begin_of(stage) + kKept * kWarpLanes;
      for (int rest = kept_end; rest < end; rest += kKept * kWarpLanes) {
        uint32_t more[kKept];
        load(more, rest, end);
#pragma unroll
        for (int i = 0; i < kKept; ++i) put(tile, more[i], more[i] >> 16);
      }
      longer[held] = kept_end < end;
      __syncwarp();  // all lanes have written
      if (lane < kArrivingLanes) arrive(ring.ready[held % kSlots]);
      load(words[before], begin_of(stage + kAhead), begin_of(stage + kAhead + 1));
    }
  }
}

#endif

}  // namespace squeezellm_hf::cuda::warpgroup
