// The sparse part of a tile in linear_streamed.
#pragma once

#include "streamed_weights.cuh"

namespace squeezellm_hf::cuda::streamed {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

// The sparse part of a warp's tiles, two lanes for a row. The ends of the rows are loaded two of its tiles ahead, their
// first entries one: nothing is done with what is loaded, lest one load wait for another.
template <class T, int kBatch, class Weights>
struct SparsePart {
  static constexpr int kRowLanes = kWarpLanes / kRows;
  static constexpr int kAhead = kBatch == 1 ? 20 : 12;  // entries of a lane in flight
  static constexpr int kLongRow = 256;                  // entries from which a row may be left to the whole warp
  const Weights weights;
  const unsigned char* x;  // in shared memory
  int x_stride;
  int lane;
  int2 row = {0, 0};  // of the lane, empty where it is left to the warp
  int2 next_row = {0, 0};
  int2 long_row = {0, 0};
  uint32_t columns[kAhead];
  uint32_t values[kAhead];
  int weight = 0;  // of the row
  int next_weight = 0;

  __device__ int own_row() const { return lane / kRowLanes; }

  __device__ void load_row(int number) {
    const Tile tile = weights.tile(number);
    const LutWeight& own = weights.weight(tile.weight);
    const int r = tile.row + own_row();
    next_weight = tile.weight;
    next_row = {0, 0};
    if (r < own.out_features) next_row = {own.crow_indices[r], own.crow_indices[r + 1]};
  }

  // How many entries the lane's row has from its own first one of the round `ahead` on.
  __device__ int left(int ahead) const { return row.y - row.x - lane % kRowLanes - ahead; }

  __device__ void load(int ahead) {
    const LutWeight& own = weights.weight(weight);
    const int present = left(ahead);
    const int entry = row.x + lane % kRowLanes + ahead;
    if (!own.wide_columns && own.values_dtype != DType::kFloat32) {
      const auto* column = static_cast<const uint16_t*>(own.col_indices) + entry;
      const auto* value = static_cast<const uint16_t*>(own.values) + entry;
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        columns[i] = values[i] = 0;
        if (i * kRowLanes < present)
          columns[i] = __ldg(column + i * kRowLanes), values[i] = __ldg(value + i * kRowLanes);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        columns[i] = values[i] = 0;
        if (i * kRowLanes < present) {
          columns[i] = sparse_column(own, entry + i * kRowLanes);
          values[i] = load_bits(own.values, own.values_dtype, entry + i * kRowLanes);
        }
      }
    }
  }

  // Goes on to the tile whose rows were loaded.
  __device__ void load_first() {
    weight = next_weight;
    row = clamped_sparse_row(weights.weight(weight), next_row);
    long_row = {0, 0};
    const int length = row.y - row.x;
    if (__any_sync(0xffffffff, length > kLongRow)) {
      // A row with more than a quarter of the warp's entries would keep its few lanes busy for too long.
      const int quarter = __reduce_add_sync(0xffffffff, max(length, 0) / kWarpLanes) / (4 * kRowLanes);
      if (length > kLongRow && length / kWarpLanes > quarter) long_row = row, row = {0, 0};
    }
    load(0);
  }

  __device__ __forceinline__ void add(float (&total)[kBatch], bool present, uint32_t column, uint32_t value) const {
    column = min(column, weights.call.weight.in_features - 1u);
    const float factor = float_of_bits(value, weights.call.weight.values_dtype);
    const unsigned char* source = x + x_piece(column / 8) * 16 + column % 8 * 2;
#pragma unroll
    for (int n = 0; n < kBatch; ++n) {
      const float sum = total[n] + factor * to_float(*reinterpret_cast<const T*>(source + n * x_stride));
      if (present) total[n] = sum;
    }
  }

  // The sums of the tile's rows.
  __device__ void multiply(float (&sums)[kBatch][kRows]) {
    float total[kBatch] = {};
    for (int ahead = 0;;) {
      const int present = left(ahead);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) add(total, i * kRowLanes < present, columns[i], values[i]);
      ahead += kAhead * kRowLanes;
      if (!__any_sync(0xffffffff, left(ahead) > 0)) break;
      load(ahead);
    }
#pragma unroll
    for (int n = 0; n < kBatch; ++n)
#pragma unroll
      for (int distance = kRowLanes / 2; distance > 0; distance /= 2)
        total[n] += __shfl_xor_sync(0xffffffff, total[n], distance);
    add_long_rows(total);
    if (lane % kRowLanes == 0)
#pragma unroll
      for (int n = 0; n < kBatch; ++n) sums[n][own_row()] = total[n];
  }

  // The rows that are left to all lanes.
  __device__ void add_long_rows(float (&total)[kBatch]) const {
    const LutWeight& own = weights.weight(weight);
    uint32_t rows = __ballot_sync(0xffffffff, lane % kRowLanes == 0 && long_row.x < long_row.y);
    for (; rows != 0; rows &= rows - 1) {
      const int owner = __ffs(rows) - 1;
      const int2 entries = {__shfl_sync(0xffffffff, long_row.x, owner), __shfl_sync(0xffffffff, long_row.y, owner)};
      float part[kBatch] = {};
#pragma unroll 8
      for (int entry = entries.x + lane; entry < entries.y; entry += kWarpLanes)
        add(part, true, sparse_column(own, entry), load_bits(own.values, own.values_dtype, entry));
#pragma unroll
      for (int n = 0; n < kBatch; ++n) {
#pragma unroll
        for (int distance = 16; distance > 0; distance /= 2) part[n] += __shfl_xor_sync(0xffffffff, part[n], distance);
        if (lane / kRowLanes == owner / kRowLanes) total[n] += part[n];
      }
    }
  }
};

#endif

}  // namespace squeezellm_hf::cuda::streamed
