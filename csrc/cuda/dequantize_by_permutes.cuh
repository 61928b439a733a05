// W in a 16-bit dtype from 2 to 4 bits, of rows that are a multiple of 16 bytes.
//
// What bounds it are the writes to the L2 cache, as long as enough loads are on their way. So every warp works for
// itself, on a segment of a row: it waits for no other warp, keeps the row's table in registers, and all its addresses
// are one register and a constant. What a later warp will load is called into the L2 cache meanwhile.
#pragma once

#include "row_table.cuh"

namespace squeezellm_hf::cuda::permutes {

constexpr int kWarps = 4;                       // of a block; they share nothing
constexpr int kBlocks = 8;                      // of a multiprocessor: 64 registers a thread
constexpr int kRun = 8;                         // consecutive weights of a lane: a store of 16 bytes
constexpr int kRunWeights = kRun * kWarpLanes;  // of a warp
constexpr int kRuns = 8;                        // of a segment
constexpr int kSegment = kRuns * kRunWeights;   // of a row, a warp's
constexpr int kLineBytes = 128;                 // of the L2 cache
// Segments from one to that for which it calls: about as many warps are at work at a time on a large device.
constexpr int kAheadSegments = 4096;

// What is called into the L2 cache: what the segment `rows` rows further loads. `entries` is how many sparse values lie
// between, on average; neighbours' guesses differ, so that together they miss few.
struct Ahead {
  int rows;
  int64_t entries;
};

// The packed indices of a lane's runs. A run of 3-bit indices starts at any byte; the word in which it ends is the next
// lane's first one, and is not loaded twice: the L2 cache is what is busy.
template <int kBits>
struct LaneSource {
  static constexpr int kRunBytes = kRunWeights * kBits / 8;
  const unsigned char* first;
  int left;  // bytes to the end of the row
  int shift = 0;

  __device__ __forceinline__ LaneSource(const LutWeight& weight, int row, int column) {
    const uint32_t* words = weight.qweight + row * weight.words_per_row;
    first = reinterpret_cast<const unsigned char*>(words) + column / kRun * kBits;
    left = static_cast<int>(weight.words_per_row) * 4 - column / kRun * kBits;
    if constexpr (kBits == 3) {
      const int byte = column / kRun * kBits % 4;
      first -= byte;
      left += byte;
      shift = byte * 8;
    }
  }
  __device__ __forceinline__ uint32_t load(int run) const {
    const unsigned char* source = first + run * kRunBytes;
    if (run * kRunBytes >= left) return 0;
    if constexpr (kBits == 2) return __ldg(reinterpret_cast<const uint16_t*>(source));
    return __ldg(reinterpret_cast<const uint32_t*>(source));
  }
  // Of what was loaded; by all lanes. The last lane's runs end in their first word.
  __device__ __forceinline__ uint32_t indices(uint32_t loaded) const {
    if constexpr (kBits != 3) return loaded;
    return __funnelshift_r(loaded, __shfl_down_sync(~0u, loaded, 1), shift);
  }
};

// A row's sparse values, of which a lane has one at a time.
struct LaneEntry {
  const LutWeight& weight;
  int begin;
  int count;  // of the row's entries
  uint32_t place = 0;
  int column = INT32_MAX;  // where the row has no such entry

  __device__ __forceinline__ LaneEntry(const LutWeight& weight, int2 row)
      : weight(weight), begin(row.x), count(row.y - row.x) {}

  __device__ __forceinline__ void look_at(uint32_t entry) {
    place = entry;
    column = place < static_cast<uint32_t>(count) ? sparse_column(weight, begin + place) : INT32_MAX;
  }
  __device__ __forceinline__ uint32_t value() const {
    return column == INT32_MAX ? 0 : load_bits(weight.values, weight.values_dtype, begin + place);
  }
};

// A cell and its sparse value, rounded once: from the table's own value, not from the cell just written.
template <class T, int kBits>
__device__ __forceinline__ T merge(const LutWeight& weight, int row, int column, uint32_t value) {
  const uint32_t* words = weight.qweight + row * weight.words_per_row;
  const int64_t bit = int64_t{column} * kBits;
  const int shift = bit % 32;
  const uint32_t low = __ldg(words + bit / 32);
  const uint32_t high = kBits == 3 && shift > 32 - kBits ? __ldg(words + bit / 32 + 1) : 0;
  const uint32_t index = __funnelshift_r(low, high, shift) & ((1 << kBits) - 1);
  const float dense = load_float(weight.lookup_table, weight.table_dtype, (int64_t{row} << kBits) + index);
  return from_float<T>(dense + float_of_bits(value, weight.values_dtype));
}

template <int kBits>
__device__ __forceinline__ void prefetch_ahead(const LutWeight& weight, int row, int segment, int segments,
                                               int2 entries, int lane, Ahead ahead) {
  constexpr int kLines = kSegment * kBits / 8 / kLineBytes;
  static_assert(kLines <= kWarpLanes - 4);
  const int later = row + ahead.rows;
  if (later >= weight.out_features) return;
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

template <class T, int kBits>
__global__ void __launch_bounds__(kWarps* kWarpLanes, kBlocks)
    dequantize_by_permutes_kernel(const __grid_constant__ LutWeight weight, T* out, int segments, Ahead ahead) {
  const int lane = threadIdx.x % kWarpLanes;
  const uint32_t warp = blockIdx.x * kWarps + threadIdx.x / kWarpLanes;
  const int row = warp / segments;
  const int segment = warp % segments;
  if (row >= weight.out_features) return;
  const int begin = segment * kSegment;
  const int column = begin + lane * kRun;
  const int columns_left = weight.in_features - column;

  // All that does not depend on another load is asked for before anything is waited for.
  int2 pointers = {0, 0};
  if (weight.crow_indices != nullptr) pointers = {weight.crow_indices[row], weight.crow_indices[row + 1]};
  const LaneSource<kBits> source(weight, row, column);
  uint32_t runs[kRuns];
#pragma unroll
  for (int r = 0; r < kRuns; ++r) runs[r] = source.load(r);
  const RowTable<kBits> table = load_table<T, kBits>(weight, row);
#pragma unroll
  for (int r = 0; r < kRuns; ++r) runs[r] = source.indices(runs[r]);
  const int2 entries = clamped_sparse_row(weight, pointers);
  prefetch_ahead<kBits>(weight, row, segment, segments, entries, lane, ahead);

  T* out_row = out + int64_t{row} * weight.in_features;
  const auto write = [&](int first_run, int last_run) {
#pragma unroll
    for (int r = 0; r < kRuns; ++r) {
      if (r < first_run || r >= last_run) continue;
      const uint4 values = look_up_eight<kBits>(table, runs[r]);
      if (r * kRunWeights < columns_left) *reinterpret_cast<uint4*>(out_row + column + r * kRunWeights) = values;
    }
  };
  if (entries.x >= entries.y) {
    write(0, kRuns);
    return;
  }
  // The sparse values are on their way while the dense part is written. Those of a long row are searched by one look
  // at every n-th, which brings most columns into the L1 cache, too. Ascending columns are a promise that is not
  // checked: whatever they are, only the row's entries are read, each once.
  LaneEntry entry(weight, entries);
  const int stride = entry.count / kWarpLanes + 1;
  entry.look_at(lane * stride);
  uint32_t value = stride == 1 ? entry.value() : 0;
  write(0, kRuns / 2);
  if (stride > 1) {
    const int before = __popc(__ballot_sync(~0u, entry.column < begin));
    entry.look_at(max(before - 1, 0) * stride + lane);
    value = entry.value();
  }
  const auto is_here = [&] { return entry.column >= begin && entry.column < begin + kSegment; };
  T cell{};
  if (is_here()) cell = merge<T, kBits>(weight, row, entry.column, value);
  write(kRuns / 2, kRuns);
  __syncwarp();  // the whole segment is written
  for (;;) {
    if (is_here()) out_row[entry.column] = cell;
    // There are more if the last lane's is not beyond the segment.
    const int last_column = __shfl_sync(~0u, entry.column, kWarpLanes - 1);
    if (last_column >= begin + kSegment) break;
    entry.look_at(entry.place + kWarpLanes);
    if (is_here()) cell = merge<T, kBits>(weight, row, entry.column, entry.value());
  }
}

}  // namespace squeezellm_hf::cuda::permutes
