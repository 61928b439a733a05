// How linear_streamed divides a block's warps and its shared memory.
#pragma once

#include "tensor_copy.cuh"

namespace squeezellm_hf::cuda::streamed {

constexpr int kRows = 16;         // of a tile: of the tensor core's left operand
constexpr int kStageWarps = 4;    // that share a stage: few, since the slowest one holds it
constexpr int kMaxStages = 32;    // of the ring
constexpr int kSumBuffers = 2;    // tiles whose sums are in work at the same time
constexpr int kTableBuffers = 2;  // the next tile's tables are filled during the work on one
constexpr int kEntryBytes = 256;  // from one entry of a table to the next
constexpr int kEarlyStages = 3;   // on their way before x
constexpr int kLeastRing = 6;     // stages without which too little is on its way
constexpr int kWideBlock = 16;    // looking-up warps of the only block of a multiprocessor
constexpr int kNarrowBlock = 8;   // and of each of two

// The warps of a block, by duty, in this order.
template <int kBlockWarps>
struct Duties {
  static constexpr int kWarps = kBlockWarps;                 // look up and multiply
  static constexpr int kStageStride = kWarps / kStageWarps;  // from one stage of a warp to its next
  static constexpr int kFillWarps = kWarps / 4;
  static constexpr int kSumWarps = kWarps / 8;  // multiply the sparse part, add all sums, write y
  static constexpr int kCopyWarp = kWarps + kFillWarps + kSumWarps;
  static constexpr int kThreads = (kCopyWarp + 1) * kWarpLanes;
  static constexpr int kBlocks = kWideBlock / kWarps;  // of a multiprocessor
};

// A unit is kLaneWords consecutive words for each of 4 lanes, a whole number of groups of 8 indices.
template <int kBits>
struct Unit {
  static constexpr int kLaneWords = kBits == 3 ? 6 : 4;
  static constexpr int kLoadBytes = kBits == 3 ? 8 : 16;
  static constexpr int kLaneLoads = kLaneWords * 4 / kLoadBytes;
  static constexpr int kLaneWeights = kLaneWords * 32 / kBits;
  static constexpr int kBytes = 4 * kLaneWords * 4;
  static constexpr int kWeights = 4 * kLaneWeights;
  static constexpr int kGroups = kLaneWeights / 8;
  static constexpr int kPairs = 1 << (2 * kBits);
  static constexpr int kStageBytes = kStageWarps * kBytes;  // of a row
  static constexpr int kStageWeights = kStageWarps * kWeights;
  static constexpr int kSlotBytes = kRows * kStageBytes;
};

// Weights are copied in boxes of 16 rows of 128 bytes, whose 16-byte pieces are turned by the row's number
// modulo 8. The rows that the lanes l / 4 take are chosen so that the lanes of a load meet different banks.
constexpr int kBoxRowBytes = 128;
constexpr int kBoxBytes = kRows * kBoxRowBytes;
template <int kBits>
__host__ __device__ constexpr int tile_row(int lane_row) {
  return lane_row / 8 * 8 + (kBits == 3 ? lane_row * 2 % 8 + lane_row % 8 / 4 : lane_row % 8 / 2 + lane_row % 2 * 4);
}
__host__ __device__ constexpr int box_offset(int row, int byte) {
  return byte / kBoxRowBytes * kBoxBytes + row * kBoxRowBytes + ((byte / 16 ^ row) % 8 * 16) + byte % 16;
}

// The ring starts where boxes may.
__host__ __device__ constexpr int ring_offset(int64_t bytes) { return static_cast<int>((bytes + 1023) / 1024 * 1024); }

// What the host decides.
struct Plan {
  int stages;    // of a tile
  int ring;      // stages in shared memory: a multiple of kStageStride, so that a slot keeps its warps
  int x_stride;  // bytes between columns of x in shared memory
  bool pairs;    // two blocks share tiles (Work)
};

// Of x in shared memory; streamed_planes.cuh keeps 4 bytes of a column more.
template <int kBatch, bool kPlanes>
__host__ __device__ constexpr int64_t x_bytes(int64_t x_stride) {
  return x_stride * (kPlanes ? 3 : kBatch);
}

// Byte offset in the tables of an entry: that of row r holds the values of the indices e % 2^bits (low half) and
// e / 2^bits, twice. The rows of the two buffers lie side by side.
//
// Two copies give the 32 lanes of a look-up a bank each if they take all 16 rows. The tensor core wants the row
// l / 4 in one register and the row l / 4 + 8 in another, so lanes 2 and 3 of every four look them up in the other
// order ("crossed", streamed_dense.cuh). Four copies would need no such order, and twice the time to fill.
__host__ __device__ constexpr int table_offset(int buffer, int entry, int lane_row) {
  return entry * kEntryBytes + buffer * (kEntryBytes / 2) + lane_row * 8;
}

template <int kBits, int kBatch, int kWarps, bool kPlanes>
struct Tables {
  unsigned char tables[Unit<kBits>::kPairs * kEntryBytes];  // of kTableBuffers tiles
};
// What stands in their place in streamed_planes.cuh.
template <int kWarps>
struct Tables<2, 1, kWarps, true> {
  float4 factors[kTableBuffers][kRows];
  uint32_t largest[kWarps];  // |x| of a warp's part, as bits
};

template <class T, int kBits, int kBatch, int kWarps, bool kPlanes = false>
struct alignas(16) Shared : Tables<kBits, kBatch, kWarps, kPlanes> {
  float sums[kSumBuffers][kWarps + 1][kBatch][kRows];  // of the warps, and of the sparse part
  uint64_t full[kMaxStages];
  uint64_t empty[kMaxStages];
  uint64_t tables_full[kTableBuffers];
  uint64_t tables_empty[kTableBuffers];
  uint64_t sums_full[kSumBuffers];
  uint64_t sums_empty[kSumBuffers];
  uint64_t x_read;  // what is read of x has come
  uint64_t x_full;
  float squares[kWarps];            // of what each warp loaded of x, for a norm
  float other_half[kBatch][kRows];  // sums of the cluster's second block
  uint64_t other_half_full;
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

// Barriers of the looking-up warps; 0 is __syncthreads().
enum Named : int { kPlanesBarrier = 1, kInputBarrier };

// Position in the ring: a slot and the parity of its phase.
struct Slot {
  int index;
  uint32_t parity = 0;
  __device__ void advance(int steps, int ring) {
    index += steps;
    while (index >= ring) index -= ring, parity ^= 1;
  }
};

// Byte offset in the tables of the entry for pair j of a lane's words; `base` is the lane's own and the buffer's.
template <int kBits>
__device__ __forceinline__ uint32_t pair_offset(const uint32_t (&words)[Unit<kBits>::kLaneWords], int j,
                                                uint32_t base) {
  const int word = j * 2 * kBits / 32;
  const int shift = j * 2 * kBits % 32;
  const uint32_t bits = words[word];
  if constexpr (kBits == 4) {
    // One instruction: the pair's byte becomes the second byte.
    return __byte_perm(bits, base, 0x7604 | shift / 8 << 4);
  } else if constexpr (kBits == 2) {
    // The compiler shares the masked word among the four pairs at even (or odd) nibbles.
    return __byte_perm((shift % 8 ? bits >> 4 : bits) & 0x0F0F0F0F, base, 0x7604 | shift / 8 << 4);
  } else {
    constexpr uint32_t kMask = (Unit<kBits>::kPairs - 1) * kEntryBytes;
    const int next = min(word + 1, Unit<kBits>::kLaneWords - 1);
    if (shift + 2 * kBits > 32) return and_or(__funnelshift_r(bits, words[next], shift - 8), kMask, base);
    return and_or(shift >= 8 ? bits >> (shift - 8) : bits << (8 - shift), kMask, base);
  }
}

// Where x[k] of 8 consecutive k lies in its column, in pieces of 16 bytes: turned in every 128 bytes, so
// that the 4 lanes of a row, whose activations are 64 or 128 bytes apart, do not meet in a bank.
__device__ __forceinline__ int x_piece(int piece) { return piece ^ (piece >> 3 & 7); }

#endif

}  // namespace squeezellm_hf::cuda::streamed
