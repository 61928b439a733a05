// The stages of linear_warpgroup_pairs in shared memory: 128 columns of packed indices, and of x.
//
// A lane looks up 32 consecutive columns of a row, 16 bytes of indices at 4 bits. The order in which the tensor core
// takes columns follows from that, and x is put in it first (permute_activations).
#pragma once

#include "pair_table.cuh"
#include "warpgroup_tile.cuh"

namespace squeezellm_hf::cuda::warpgroup {

constexpr int kStageColumns = kPackedColumns;
constexpr int kLineColumns = 64;  // of a tile of x: 128 bytes
// Registers of a thread that orders copies: the others take what is left of the block's.
constexpr int kCopyRegisters = 24;

template <class T_, int kBits_, int kTileRows_, int kBatch_>
struct PairTile {
  using T = T_;
  static constexpr int kBits = kBits_;
  static constexpr int kTileRows = kTileRows_;
  static constexpr int kBatch = kBatch_;
  // Warpgroups, which take stages in turn: as many as there are registers for. One more orders copies of x.
  static constexpr int kGroups = kBatch <= 32 ? 4 : 3;
  static constexpr int kProductThreads = kGroups * kGroupThreads;
  static constexpr int kThreads = kProductThreads + kGroupThreads;
  static constexpr int kProductRegisters = kGroups == 4 ? 112 : 160;
  static constexpr int kWarps = kProductThreads / kWarpLanes;
  static constexpr int kWarpRows = kTileRows / 4;  // whose indices a warp has for itself
  static constexpr int kPackedSlots = (kBatch <= 16 ? 2 : 1) * 128 / kTileRows;
  // Of x, what memory is left for.
  static constexpr int kMemory =
      225 * 1024 - PairLayout<kBits, kTileRows>::kBytes - kWarps * kPackedSlots * kWarpRows * kPackedRowBytes<kBits>;
  static constexpr int kSlots = std::min(16, kMemory / (kBatch * kLineColumns * 2));
  static constexpr int kChunkSteps = 2;  // looked up at a time
  static constexpr int kChunks = kStageColumns / (kChunkSteps * kProductDepth);
  static constexpr int kLineChunks = kLineColumns / (kChunkSteps * kProductDepth);
  // Of the sparse part: entries of a row that its lanes take at a time, and how many of a lane are on their way.
  static constexpr int kSparseParts = 4;
  static constexpr int kSparseAhead = 6;
  // What a warp writes at once lies in different banks.
  static constexpr int kSumStride = kTileRows + 4;

  using Sums = float[kTileRows / kGroupLines][kBatch / 8][4];
};

template <class Tile>
struct alignas(1024) PairShared {
  unsigned char x[Tile::kSlots][Tile::kBatch][kLineColumns * 2];
  unsigned char packed[Tile::kWarps][Tile::kPackedSlots][Tile::kWarpRows][kPackedRowBytes<Tile::kBits>];
  unsigned char tables[PairLayout<Tile::kBits, Tile::kTileRows>::kBytes];
  uint64_t packed_ready[Tile::kWarps][Tile::kPackedSlots];
  uint64_t x_ready[Tile::kSlots];
  uint64_t x_free[Tile::kSlots];
  int row_pointers[Tile::kTileRows + 1];  // of the sparse part
};

constexpr int kPermuteThreads = 128;
// Blocks of a multiprocessor: few enough registers that they find room beside other kernels.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kPermuteBlocks = 1;  // does nothing there
#else
constexpr int kPermuteBlocks = 16;
#endif

#ifdef SQUEEZELLM_HF_WGMMA

// Activations in the tensor core's order, with zeros up to a multiple of 128 columns: of columns 32 t + 4 s + i of 128,
// those with i = 0 and 1 come to places 16 s + 2 t and after, those with i = 2 and 3 eight places on. A piece is 4
// times 16 bytes.
__device__ __forceinline__ void permute_piece(const uint16_t* x, uint16_t* permuted, int piece, int in_features,
                                              int columns) {
  const int line = piece / (columns / 32);
  const int quarter = piece % (columns / 32);
  const int begin = quarter / 4 * kStageColumns + quarter % 4 * 8;
  const uint16_t* source = x + int64_t{line} * in_features + begin;
  uint4 v[4];
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    v[t] = uint4{};
    if (begin + t * 32 < in_features) v[t] = load_uncached(reinterpret_cast<const uint4*>(source + t * 32));
  }
  auto* target = reinterpret_cast<uint4*>(permuted + int64_t{line} * columns + quarter * 32);
  target[0] = {v[0].x, v[1].x, v[2].x, v[3].x};
  target[1] = {v[0].y, v[1].y, v[2].y, v[3].y};
  target[2] = {v[0].z, v[1].z, v[2].z, v[3].z};
  target[3] = {v[0].w, v[1].w, v[2].w, v[3].w};
}

// Activations transposed, as the sparse part wants them, with zeros in lines beyond the batch. A piece is 8 columns of
// two lines; the next threads have the next lines.
__device__ __forceinline__ void transpose_piece(const uint16_t* x, uint16_t* transposed, int piece, int batch,
                                                int lines, int in_features) {
  const int line = piece % (lines / 2) * 2;
  const int column = piece / (lines / 2) * 8;
  const uint16_t* source = x + int64_t{line} * in_features + column;
  uint4 v[2] = {};
  if (line < batch) v[0] = load_uncached(reinterpret_cast<const uint4*>(source));
  if (line + 1 < batch) v[1] = load_uncached(reinterpret_cast<const uint4*>(source + in_features));
  const uint32_t first[] = {v[0].x, v[0].y, v[0].z, v[0].w};
  const uint32_t second[] = {v[1].x, v[1].y, v[1].z, v[1].w};
  uint16_t* target = transposed + int64_t{column} * lines + line;
#pragma unroll
  for (int i = 0; i < 8; ++i)
    *reinterpret_cast<uint32_t*>(target + i * lines) =
        __byte_perm(first[i / 2], second[i / 2], i % 2 ? 0x7632 : 0x5410);
}

#endif

template <bool kTransposed>
__global__ void __launch_bounds__(kPermuteThreads, kPermuteBlocks)
    permute_activations_kernel(const uint16_t* x, uint16_t* permuted, int permuted_pieces, uint16_t* transposed,
                               int pieces, int batch, int lines, int in_features, int columns) {
#ifdef SQUEEZELLM_HF_WGMMA
  allow_next_kernel();
  wait_for_previous_kernel();
  for (int piece = blockIdx.x * blockDim.x + threadIdx.x; piece < pieces; piece += gridDim.x * blockDim.x) {
    if (!kTransposed || piece < permuted_pieces) {
      permute_piece(x, permuted, piece, in_features, columns);
    } else {
      transpose_piece(x, transposed, piece - permuted_pieces, batch, lines, in_features);
    }
  }
#endif
}

inline cudaError_t permute_activations(const LinearCall& call) {
  const int columns = static_cast<int>(permuted_columns(call));
  const int lines = static_cast<int>(transposed_batch(call.batch));
  const int permuted_pieces = call.batch * (columns / 32);
  const int transposed_pieces = call.transposed_x == nullptr ? 0 : lines / 2 * (call.weight.in_features / 8);
  const int pieces = permuted_pieces + transposed_pieces;
  // One block a multiprocessor fits beside the kernel before, so that it waits there and not for that one's last
  // blocks; with more than two to do, it is too slow.
  const int blocks = divide_up(pieces, kPermuteThreads);
  const int launched = blocks <= 2 * call.multiprocessors ? std::min(blocks, call.multiprocessors) : blocks;
  const auto kernel =
      call.transposed_x == nullptr ? permute_activations_kernel<false> : permute_activations_kernel<true>;
  return launch_clusters(kernel, launched, 1, kPermuteThreads, 0, call.stream, static_cast<const uint16_t*>(call.x),
                         static_cast<uint16_t*>(call.permuted_x), permuted_pieces,
                         static_cast<uint16_t*>(call.transposed_x), pieces, call.batch, lines, call.weight.in_features,
                         columns);
}

// The tensor map of permuted activations, 64 columns of `lines` lines a tile.
inline cudaError_t make_permuted_map(const LinearCall& call, uint32_t lines, CUtensorMap& map) {
  const auto columns = static_cast<uint64_t>(permuted_columns(call));
  return make_tensor_map({CU_TENSOR_MAP_DATA_TYPE_UINT16, call.permuted_x, columns, static_cast<uint64_t>(call.batch),
                          columns * 2, kLineColumns, lines, CU_TENSOR_MAP_SWIZZLE_128B},
                         map);
}

#ifdef SQUEEZELLM_HF_WGMMA

// By one thread: the block's activations, 64 columns a slot, in order.
//
// No wait is two phases early. This thread waits for every phase of `x_free`, and a phase of it ends only after the
// tile of that phase was there and multiplied. A warpgroup skips the tiles of others: it waits for tile i after one not
// earlier than i - kSlots, which this thread asked for after it had waited until the slot of i was free of tile
// i - 2 kSlots. Nor do waits close a circle: a tile is freed when its warpgroup goes on to one that is at most
// 2 kGroups - 1 later, and that one is asked for before any tile that waits for the slot.
template <class Tile>
__device__ __forceinline__ void request_activations(const CUtensorMap& map, PairShared<Tile>& shared, int batch,
                                                    int column, int stages) {
  static_assert(Tile::kSlots >= 2 * Tile::kGroups);
  Place<Tile::kSlots> place;
#pragma unroll 1
  for (int i = 0; i < stages * (kStageColumns / kLineColumns); ++i, place.advance(1)) {
    wait(shared.x_free[place.slot], place.parity ^ 1);
    arrive_expecting(shared.x_ready[place.slot], sizeof(shared.x[0]));
    copy_tile(shared.x[place.slot], map, column + i * kLineColumns, batch, shared.x_ready[place.slot]);
  }
}

// A warp's own indices: it asks for a stage once it has read the one before in that slot, and waits for every phase of
// its barriers. Loads from shared memory return in the order of a warp's instructions, those of indices before the
// look-ups that depend on them.
template <class Tile>
class WarpIndices {
  using Table = PairTable<Tile::kBits, Tile::kTileRows>;

 public:
  __device__ __forceinline__ WarpIndices(const CUtensorMap& map, PairShared<Tile>& shared, int row, int first_stage)
      : map_(map), shared_(shared), warp_(threadIdx.x / kWarpLanes), row_(row), first_stage_(first_stage) {
    constexpr int kBytes = 4 * Tile::kBits;  // of a lane, in each row
    const int lane = threadIdx.x % kWarpLanes;
    const int begin = lane % 4 * kBytes;
    const int row_in_tile = lane / 4 + Table::row(0, lane % 4);
    offset_ = warp_ * sizeof(shared.packed[0]) + row_in_tile * kPackedRowBytes<Tile::kBits> +
              packed_chunk<Tile::kBits>(row_in_tile, begin / 16) * 16 + begin % 16;
    asm volatile("" : "+r"(offset_));  // computed once
  }

  __device__ __forceinline__ void request(int stage, int slot) const {
    if (!elect_lane()) return;
    uint64_t& ready = shared_.packed_ready[warp_][slot];
    arrive_expecting(ready, sizeof(shared_.packed[0][0]));
    copy_tile(shared_.packed[warp_][slot], map_, (first_stage_ + stage) * (kPackedRowBytes<Tile::kBits> / 4), row_,
              ready);
  }

  // The 32 columns of lane % 4 of the lane's rows in the order of PairTable.
  __device__ __forceinline__ void load(uint32_t (&words)[Table::kLaneRows][Tile::kBits],
                                       const Place<Tile::kPackedSlots>& place) const {
    wait(shared_.packed_ready[warp_][place.slot], place.parity);
    const unsigned char* packed = shared_.packed[0][place.slot][0];
#pragma unroll
    for (int j = 0; j < Table::kLaneRows; ++j) {
      constexpr uint32_t kEightRows = 8 * kPackedRowBytes<Tile::kBits>;
      // Where lanes are at different rows these are a bit each.
      const uint32_t offset =
          PairLayout<Tile::kBits, Tile::kTileRows>::kCopies < 4 ? offset_ ^ j * kEightRows : offset_ + j * kEightRows;
      load_indices<Tile::kBits>(words[j], packed + offset);
    }
  }

 private:
  const CUtensorMap& map_;
  PairShared<Tile>& shared_;
  int warp_;
  int row_;
  int first_stage_;
  uint32_t offset_;
};

#endif

}  // namespace squeezellm_hf::cuda::warpgroup
