// W in a 16-bit dtype from 2 to 4 bits, of rows that are a multiple of 16 bytes.
//
// What bounds it are the writes to the L2 cache, as long as enough loads are on their way. So every warp works for
// itself, on a segment of a row: it waits for no other warp, keeps the row's table in registers, and all its addresses
// are one register and a constant. What a later warp will load is called into the L2 cache meanwhile.
#pragma once

#include "row_table.cuh"

namespace squeezellm_hf::cuda::permutes {

constexpr int kWarps = 4;                       // of a block; they share nothing
constexpr int kRun = 8;                         // consecutive weights of a lane: a store of 16 bytes
constexpr int kRunWeights = kRun * kWarpLanes;  // of a warp
constexpr int kRuns = 8;                        // of a segment
constexpr int kSegment = kRuns * kRunWeights;   // of a row, a warp's
constexpr int kLineBytes = 128;                 // of the L2 cache
// Segments from one to that for which it calls: about as many warps are at work at a time on a large device.
constexpr int kAheadSegments = 4096;
constexpr int kNoColumn = -1;

// What is called into the L2 cache: what the segment `rows` rows further loads. `entries` is how many sparse values lie
// between, on average; neighbours' guesses differ, so that together they miss few.
struct Ahead {
  int rows;
  int64_t entries;
};

// The packed indices of a lane's runs. A run of 3-bit indices starts at any byte.
template <int kBits>
struct LaneSource {
  static constexpr int kRunBytes = kRunWeights * kBits / 8;
  const unsigned char* first;
  int shift = 0;
  bool crosses = false;  // into the next word

  __device__ __forceinline__ LaneSource(const uint32_t* words, int column)
      : first(reinterpret_cast<const unsigned char*>(words) + column / 8 * kBits) {
    if constexpr (kBits == 3) {
      const int byte = column / 8 * kBits % 4;
      first -= byte;
      shift = byte * 8;
      crosses = byte > 1;
    }
  }
  __device__ __forceinline__ uint32_t load(int run) const {
    const unsigned char* source = first + run * kRunBytes;
    if constexpr (kBits == 2) return __ldg(reinterpret_cast<const uint16_t*>(source));
    const auto* word = reinterpret_cast<const uint32_t*>(source);
    if constexpr (kBits == 4) return __ldg(word);
    return __funnelshift_r(__ldg(word), crosses ? __ldg(word + 1) : 0, shift);
  }
};

// A row's sparse values that lie in a warp's segment, a lane each.
struct SegmentEntries {
  int2 row;  // the row's entries
  int begin;
  int end;  // of the columns

  __device__ __forceinline__ int count() const { return row.y - row.x; }
  // Also of an `i` that has passed the end of int32.
  __device__ __forceinline__ bool has(int i) const { return static_cast<uint32_t>(i) < static_cast<uint32_t>(count()); }

  // An entry of the row no later than the segment's first one, from one look at every n-th: that brings most of the
  // columns into the L1 cache, too. Ascending columns are a promise that is not checked: whatever they are, this is
  // one of the row's entries.
  __device__ __forceinline__ int sample(const LutWeight& weight, int lane) const {
    const int at = lane * stride();
    return at < count() ? sparse_column(weight, row.x + at) : INT32_MAX;
  }
  __device__ __forceinline__ int first(int sampled) const {
    const int before = __popc(__ballot_sync(~0u, sampled < begin));
    return before > 0 ? (before - 1) * stride() : 0;
  }
  __device__ __forceinline__ int stride() const { return count() / kWarpLanes + 1; }

  // The column of the row's i-th entry if it is in the segment.
  __device__ __forceinline__ int column(const LutWeight& weight, int i) const {
    if (!has(i)) return kNoColumn;
    const int column = sparse_column(weight, row.x + i);
    return column >= begin && column < end ? column : kNoColumn;
  }
};

// A cell with the row's i-th sparse value, rounded once: from the table's own value, not from the cell just written.
template <class T, int kBits>
__device__ __forceinline__ T merge(const LutWeight& weight, int row, const SegmentEntries& entries, int i, int column) {
  const uint32_t value = load_bits(weight.values, weight.values_dtype, entries.row.x + i);
  const uint32_t* words = weight.qweight + row * weight.words_per_row;
  const int64_t bit = int64_t{column} * kBits;
  const uint32_t low = __ldg(words + bit / 32);
  const int shift = bit % 32;
  const uint32_t high = kBits == 3 && shift > 32 - kBits ? __ldg(words + bit / 32 + 1) : 0;
  const uint32_t index = __funnelshift_r(low, high, shift) & ((1 << kBits) - 1);
  const float dense = load_float(weight.lookup_table, weight.table_dtype, (int64_t{row} << kBits) + index);
  return from_float<T>(dense + float_of_bits(value, weight.values_dtype));
}

template <int kBits, int kSegment>
__device__ __forceinline__ void prefetch_ahead(const LutWeight& weight, int row, int segment, int segments,
                                               int2 entries, int lane, Ahead ahead) {
  constexpr int kLines = kSegment * kBits / 8 / kLineBytes;
  static_assert(kLines <= kWarpLanes - 4);
  const int later = row + ahead.rows;
  if (ahead.rows == 0 || later >= weight.out_features) return;
  const void* address = nullptr;
  if (lane < kLines) {
    const int64_t word = segment * (kSegment / 32 * kBits) + lane * (kLineBytes / 4);
    address = weight.qweight + later * weight.words_per_row + min(word, weight.words_per_row - 1);
  } else if (lane == kLines) {
    const int64_t entry = int64_t{later} << kBits;
    address = static_cast<const char*>(weight.lookup_table) + entry * (weight.table_dtype == DType::kFloat32 ? 4 : 2);
  } else if (weight.nnz > 0) {
    const int64_t guess = entries.x + ahead.entries + int64_t{entries.y - entries.x} * segment / segments;
    const int64_t entry = min(max(guess, int64_t{0}), weight.nnz - 1);
    if (lane == kLines + 1) address = weight.crow_indices + later;
    if (lane == kLines + 2)
      address = static_cast<const char*>(weight.col_indices) + entry * (weight.wide_columns ? 4 : 2);
    if (lane == kLines + 3)
      address = static_cast<const char*>(weight.values) + entry * (weight.values_dtype == DType::kFloat32 ? 4 : 2);
  }
  if (address != nullptr) prefetch_l2(address);
}

// A segment is kRuns runs.
template <class T, int kBits, int kRuns = permutes::kRuns, int kBlocks = 8>
__global__ void __launch_bounds__(kWarps* kWarpLanes, kBlocks)
    dequantize_by_permutes_kernel(const __grid_constant__ LutWeight weight, T* out, int segments, Ahead ahead) {
  constexpr int kSegment = kRuns * kRunWeights;
  const int lane = threadIdx.x % kWarpLanes;
  const uint32_t warp = blockIdx.x * kWarps + threadIdx.x / kWarpLanes;
  const int row = warp / segments;
  const int segment = warp % segments;
  if (row >= weight.out_features) return;
  const int begin = segment * kSegment;
  const int column = begin + lane * kRun;
  const bool whole = begin + kSegment <= weight.in_features;

  const LaneSource<kBits> source(weight.qweight + row * weight.words_per_row, column);
  uint32_t runs[kRuns];
#pragma unroll
  for (int r = 0; r < kRuns; ++r) runs[r] = whole || column + r * kRunWeights < weight.in_features ? source.load(r) : 0;
  SegmentEntries entries{{0, 0}, begin, begin + kSegment};
  if (weight.crow_indices != nullptr) entries.row = sparse_row(weight, row);
  const RowTable<kBits> table = load_table<T, kBits>(weight, row);
  prefetch_ahead<kBits, kSegment>(weight, row, segment, segments, entries.row, lane, ahead);

  T* out_row = out + int64_t{row} * weight.in_features;
  const auto write = [&](int r) {
    if (whole || column + r * kRunWeights < weight.in_features)
      *reinterpret_cast<uint4*>(out_row + column + r * kRunWeights) = look_up_eight<kBits>(table, runs[r]);
  };
  if (entries.count() <= 0) {
#pragma unroll
    for (int r = 0; r < kRuns; ++r) write(r);
    return;
  }
  // The sparse values are on their way while the dense part is written.
  const int sampled = entries.sample(weight, lane);
#pragma unroll
  for (int r = 0; r < kRuns / 2; ++r) write(r);
  int entry = entries.first(sampled) + lane;
  int target = entries.column(weight, entry);
  T cell{};
  if (target != kNoColumn) cell = merge<T, kBits>(weight, row, entries, entry, target);
#pragma unroll
  for (int r = kRuns / 2; r < kRuns; ++r) write(r);
  __syncwarp();  // the whole segment is written
  for (;;) {
    if (target != kNoColumn) out_row[target] = cell;
    // There are more where the last lane's entry is not beyond the segment.
    const bool more = entries.has(entry) && sparse_column(weight, entries.row.x + entry) < entries.end;
    if (!__shfl_sync(~0u, static_cast<int>(more), kWarpLanes - 1)) break;
    entry += kWarpLanes;
    target = entries.column(weight, entry);
    if (target != kNoColumn) cell = merge<T, kBits>(weight, row, entries, entry, target);
  }
}

}  // namespace squeezellm_hf::cuda::permutes
