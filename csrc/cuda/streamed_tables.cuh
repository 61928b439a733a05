// The tables of all pairs of a row's values in linear_streamed.
#pragma once

#include "streamed_weights.cuh"

namespace squeezellm_hf::cuda::streamed {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

// Two neighbouring values of a table as T, whatever their dtype.
template <class T>
__device__ __forceinline__ uint32_t load_pair(const LutWeight& weight, int64_t first) {
  uint32_t pair = 0;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const T value = from_float<T>(load_float(weight.lookup_table, weight.table_dtype, first + i));
    pair |= uint32_t{*reinterpret_cast<const uint16_t*>(&value)} << 16 * i;
  }
  return pair;
}

template <class T>
__device__ __forceinline__ uint32_t convert_pair(uint32_t pair, DType dtype) {
  uint32_t converted = 0;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const T value = from_float<T>(float_of_bits(pair >> 16 * i & 0xffff, dtype));
    converted |= uint32_t{*reinterpret_cast<const uint16_t*>(&value)} << 16 * i;
  }
  return converted;
}

// Whether rows of the tables can be read as vectors; otherwise they are converted where they are loaded.
__device__ __forceinline__ bool vector_tables(const LutWeight& weight) {
  return weight.table_dtype != DType::kFloat32 && reinterpret_cast<uintptr_t>(weight.lookup_table) % 16 == 0;
}

// A thread's part of a tile's tables: of the row lane % 16 some consecutive entries, by the half of a warp.
// Loaded a tile ahead, and not touched before the tables before it have been filled.
template <class T, int kBits, int kFillWarps, class Weights>
struct TablePart {
  static constexpr int kEntries = 1 << kBits;
  static constexpr int kStores = Unit<kBits>::kPairs / (2 * kFillWarps);  // entries of the pairs' table
  static constexpr int kLows = kStores < kEntries ? kStores : kEntries;   // lower indices
  static constexpr int kHighs = kStores / kLows;                          // upper indices
  const Weights weights;
  int lane_row;
  int first;                // entry
  uint32_t low[kLows / 2];  // pairs of 16-bit values
  uint32_t high[kHighs];

  __device__ TablePart(Weights weights, int warp, int lane)
      : weights(weights), lane_row(lane % kRows), first((warp * 2 + lane / kRows) * kStores) {}

  __device__ void load(int number) {
    const Tile tile = weights.tile(number);
    const LutWeight& weight = weights.weight(tile.weight);
    const int row = min(tile.row + tile_row<kBits>(lane_row), weight.out_features - 1);
    const int64_t values = int64_t{row} * kEntries;
    const int64_t first_low = values + first % kEntries;
    if (!vector_tables(weight)) {
#pragma unroll
      for (int i = 0; i < kLows / 2; ++i) low[i] = load_pair<T>(weight, first_low + 2 * i);
    } else {
      const auto* source = static_cast<const uint16_t*>(weight.lookup_table) + first_low;
      if constexpr (kLows % 8 == 0) {
#pragma unroll
        for (int i = 0; i < kLows / 8; ++i) {
          const uint4 v = __ldg(reinterpret_cast<const uint4*>(source) + i);
          low[4 * i] = v.x, low[4 * i + 1] = v.y, low[4 * i + 2] = v.z, low[4 * i + 3] = v.w;
        }
      } else {
#pragma unroll
        for (int i = 0; i < kLows / 2; ++i) low[i] = __ldg(reinterpret_cast<const uint32_t*>(source) + i);
      }
    }
#pragma unroll
    for (int i = 0; i < kHighs; ++i)
      high[i] = load_bits(weight.lookup_table, weight.table_dtype, values + first / kEntries + i);
  }

  // What was loaded as T.
  __device__ void convert() {
    const LutWeight& weight = weights.call.weight;  // alike in all weights: the dtype, and whether rows are vectors
    constexpr DType kOwn = __is_same(T, __nv_bfloat16) ? DType::kBFloat16 : DType::kFloat16;
    if (weight.table_dtype == kOwn) return;
    if (vector_tables(weight))
#pragma unroll
      for (int i = 0; i < kLows / 2; ++i) low[i] = convert_pair<T>(low[i], weight.table_dtype);
#pragma unroll
    for (int i = 0; i < kHighs; ++i) {
      const T value = from_float<T>(float_of_bits(high[i], weight.table_dtype));
      high[i] = *reinterpret_cast<const uint16_t*>(&value);
    }
  }

  __device__ void store(unsigned char* tables, int buffer) const {
    unsigned char* target = tables + table_offset(buffer, first, lane_row);
#pragma unroll
    for (int i = 0; i < kStores; ++i) {
      const uint32_t pair = __byte_perm(low[i % kLows / 2], high[i / kLows], i % 2 ? 0x5432 : 0x5410);
      *reinterpret_cast<uint2*>(target + i * kEntryBytes) = make_uint2(pair, pair);
    }
  }
};

// The duties of a filling warp, for all tiles of the block; the first one's part has been loaded.
template <class T, int kBits, int kBatch, int kWarps, class Weights>
__device__ void fill_tables(Shared<T, kBits, kBatch, kWarps>& shared,
                            TablePart<T, kBits, Duties<kWarps>::kFillWarps, Weights>& part, const Work& work,
                            int lane) {
  for (int count = 0; count < work.tiles; ++count) {
    const int buffer = count % kTableBuffers;
    part.convert();
    wait(shared.tables_empty[buffer], (count / kTableBuffers & 1) ^ 1);
    part.store(shared.tables, buffer);
    __syncwarp();
    if (lane < kArrivingLanes) arrive(shared.tables_full[buffer]);
    if (count + 1 < work.tiles) part.load(work.tile(count + 1));
  }
}

#endif

}  // namespace squeezellm_hf::cuda::streamed
