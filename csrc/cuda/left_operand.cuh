// W in registers, where the tensor core takes its left operand from: what the kernels share that look it up there, for
// larger batches. A stage has 128 columns; while the tensor core multiplies 32 of them, a thread looks up the next 32.
#pragma once

#include "fragment_table.cuh"
#include "warpgroup_tile.cuh"

namespace squeezellm_hf::cuda::warpgroup {

constexpr int kStageColumns = kPackedColumns;
constexpr int kLineColumns = 64;   // of a tile of x: 128 bytes
constexpr int kChunkColumns = 32;  // looked up at a time
constexpr int kChunks = kStageColumns / kChunkColumns;
constexpr int kSteps = kChunkColumns / kProductDepth;

#ifdef SQUEEZELLM_HF_WGMMA

// The tables of the two rows that a thread meets. Rows beyond the last are computed like it and not written.
template <class Tile>
__device__ __forceinline__ void load_tables(RowTable<Tile::kBits> (&tables)[2], const LutWeight& weight,
                                            int first_row) {
  const int row = first_row + threadIdx.x / kWarpLanes * 16 + threadIdx.x % kWarpLanes / 4;
#pragma unroll
  for (int h = 0; h < 2; ++h)
    tables[h] = load_table<typename Tile::T, Tile::kBits>(weight, min(row + 8 * h, weight.out_features - 1));
}

// The indices of a chunk of columns of a row.
template <int kBits>
__device__ __forceinline__ void load_chunk(uint32_t (&words)[kBits], const unsigned char* packed, int row, int chunk) {
  constexpr int kBytes = kChunkColumns * kBits / 8;
  const int begin = chunk * kBytes;
  const unsigned char* line = packed + row * kPackedRowBytes<kBits>;
  load_indices<kBits>(words, line + packed_chunk<kBits>(row, begin / 16) * 16 + begin % 16);
}

// Writes y: the sums of the cluster's blocks, each a slice's. `memory` is the block's, which stages have left.
template <class Tile>
__device__ __forceinline__ void finish_slice(const LinearCall& call, void* memory, const typename Tile::Sums& sums,
                                             int first_row, int first_batch) {
  synchronize(1, Tile::kProductThreads);
  float* slice_sums = static_cast<float*>(memory);
  store_sums<Tile::kSumStride>(slice_sums, sums);
  synchronize_cluster();
  add_slices<Tile>(call, slice_sums, first_row, first_batch);
  synchronize_cluster();
}

#endif

}  // namespace squeezellm_hf::cuda::warpgroup
