// The sparse part of a tile in linear_streamed.
#pragma once

#include "streamed_layout.cuh"

namespace squeezellm_hf::cuda::streamed {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

// The sparse part of a tile by the service warps, each its own rows: lane l keeps the ends of row l, and
// the first entries of the warp's rows are loaded a tile ahead.
template <class T, int kBatch>
struct SparsePart {
  static constexpr int kWarpRows = kRows / kServiceWarps;
  const LinearCall& call;
  const unsigned char* x;  // in shared memory
  int x_stride;
  int warp;
  int lane;
  int2 rows = {0, 0};
  int2 next_rows = {0, 0};
  int2 own[kWarpRows];  // the warp's; empty where a row is left to all warps

  // Entries of the warp's rows, a lane's each, as they lie in memory: nothing is done with what is loaded,
  // lest one load wait for another. There is at least one entry in all.
  struct Entries {
    uint32_t columns[kWarpRows];
    uint32_t values[kWarpRows];
  } first;

  __device__ void load_rows(int tile) {
    const int row = tile * kRows + lane % kRows;
    next_rows = {0, 0};
    if (row < call.weight.out_features) next_rows = {call.weight.crow_indices[row], call.weight.crow_indices[row + 1]};
  }

  __device__ void load(Entries& entries, int ahead) const {
    const LutWeight& weight = call.weight;
#pragma unroll
    for (int i = 0; i < kWarpRows; ++i) {
      const int entry = own[i].x + ahead < own[i].y ? own[i].x + ahead : 0;
      entries.columns[i] = weight.wide_columns ? __ldg(static_cast<const uint32_t*>(weight.col_indices) + entry)
                                               : __ldg(static_cast<const uint16_t*>(weight.col_indices) + entry);
      entries.values[i] = load_bits(weight.values, weight.values_dtype, entry);
    }
  }

  // Goes on to the tile whose rows were loaded.
  __device__ void load_first() {
    rows = clamped_sparse_row(call.weight, next_rows);
#pragma unroll
    for (int i = 0; i < kWarpRows; ++i) {
      const int r = i * kServiceWarps + warp;
      own[i] = {__shfl_sync(0xffffffff, rows.x, r), __shfl_sync(0xffffffff, rows.y, r)};
      if (own[i].y - own[i].x > kHeavyRow) own[i] = {0, 0};
    }
    load(first, lane);
  }

  __device__ void add(float (&total)[kBatch], uint32_t column, uint32_t value) const {
    column = min(column, call.weight.in_features - 1u);
    const float factor = float_of_bits(value, call.weight.values_dtype);
    const unsigned char* source = x + x_piece(column / 8) * 16 + column % 8 * 2;
#pragma unroll
    for (int n = 0; n < kBatch; ++n)
      if (n < call.batch) total[n] += factor * to_float(*reinterpret_cast<const T*>(source + n * x_stride));
  }

  __device__ void add(float (&totals)[kWarpRows][kBatch], const Entries& entries, int ahead) const {
#pragma unroll
    for (int i = 0; i < kWarpRows; ++i)
      if (own[i].x + ahead < own[i].y) add(totals[i], entries.columns[i], entries.values[i]);
  }

  // The sums of the warp's rows in `sums`, zeros for the others.
  __device__ void multiply(float (&sums)[kBatch][kRows]) const {
    float totals[kWarpRows][kBatch] = {};
    add(totals, first, lane);
    int longest = 0;
#pragma unroll
    for (int i = 0; i < kWarpRows; ++i) longest = max(longest, own[i].y - own[i].x);
    for (int ahead = kWarpLanes; ahead < longest; ahead += 2 * kWarpLanes) {
      Entries more[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) load(more[i], ahead + i * kWarpLanes + lane);
#pragma unroll
      for (int i = 0; i < 2; ++i) add(totals, more[i], ahead + i * kWarpLanes + lane);
    }
    float mine[kBatch] = {};  // of row `lane`
#pragma unroll
    for (int n = 0; n < kBatch; ++n) {
#pragma unroll
      for (int distance = 16; distance > 0; distance /= 2)
#pragma unroll
        for (int i = 0; i < kWarpRows; ++i) totals[i][n] += __shfl_xor_sync(0xffffffff, totals[i][n], distance);
#pragma unroll
      for (int i = 0; i < kWarpRows; ++i)
        if (lane == i * kServiceWarps + warp) mine[n] = totals[i][n];
    }
    add_heavy_rows(mine);
    if (lane < kRows)
#pragma unroll
      for (int n = 0; n < kBatch; ++n) sums[n][lane] = mine[n];
  }

  // A share of every row that is left to all warps.
  __device__ void add_heavy_rows(float (&mine)[kBatch]) const {
    uint32_t heavy = __ballot_sync(0xffffffff, lane < kRows && rows.y - rows.x > kHeavyRow);
    for (; heavy != 0; heavy &= heavy - 1) {
      const int r = __ffs(heavy) - 1;
      const int2 row = {__shfl_sync(0xffffffff, rows.x, r), __shfl_sync(0xffffffff, rows.y, r)};
      float total[kBatch] = {};
#pragma unroll 4
      for (int entry = row.x + warp * kWarpLanes + lane; entry < row.y; entry += kServiceWarps * kWarpLanes)
        add(total, sparse_column(call.weight, entry), load_bits(call.weight.values, call.weight.values_dtype, entry));
#pragma unroll
      for (int n = 0; n < kBatch; ++n) {
#pragma unroll
        for (int distance = 16; distance > 0; distance /= 2)
          total[n] += __shfl_xor_sync(0xffffffff, total[n], distance);
        if (lane == r) mine[n] += total[n];
      }
    }
  }
};

#endif

}  // namespace squeezellm_hf::cuda::streamed
