// The sparse part in linear_warpgroup_pairs: the blocks of a cluster share the rows of their tile among them, and each
// multiplies its own with all warps of the dense product, after it.
//
// x lies transposed in memory, so that an entry's activations are neighbours: a few lanes take 16 bytes each. What is
// asked for ahead is what counts: the entries of the next round, and the activations of a round at once.
#pragma once

#include "pair_stages.cuh"

namespace squeezellm_hf::cuda::warpgroup {

#ifdef SQUEEZELLM_HF_WGMMA

// Of the tile's rows, [begin, end): multiples of 4.
struct RowRange {
  int begin;
  int end;

  __device__ __forceinline__ bool has(int row) const { return row >= begin && row < end; }
};

template <class Tile>
__device__ __forceinline__ RowRange sparse_share() {
  constexpr int kQuads = Tile::kTileRows / 4;
  const int rows = (kQuads + cluster_size() - 1) / cluster_size() * 4;
  const int begin = min(cluster_rank() * rows, Tile::kTileRows);
  return {begin, min(begin + rows, Tile::kTileRows)};
}

// Where the entries of a row begin, within the tensors; those of rows beyond the last, at the end.
__device__ __forceinline__ int row_pointer(const LutWeight& weight, int row) {
  return min(max(__ldg(weight.crow_indices + min(row, weight.out_features)), 0), static_cast<int>(weight.nnz));
}

// Calls entries [begin, end) of a tensor of the sparse part into the L2 cache, by a warpgroup. A hint: it stops
// somewhere.
__device__ __forceinline__ void prefetch_entries(const void* data, int bytes, int begin, int end) {
  constexpr int kLine = 128;
  constexpr int kMostLines = 1024;
  const char* first = static_cast<const char*>(data) + int64_t{begin} * bytes;
  const int lines = min((end - begin - 1) / (kLine / bytes) + 1, kMostLines);
  if (begin >= end) return;
  for (int i = threadIdx.x % kGroupThreads; i < lines; i += kGroupThreads) prefetch_l2(first + i * kLine);
}

template <class Tile>
__device__ __forceinline__ void prefetch_sparse_part(const LutWeight& weight, int first_row) {
  const RowRange rows = sparse_share<Tile>();
  const int begin = row_pointer(weight, first_row + rows.begin);
  const int end = row_pointer(weight, first_row + rows.end);
  prefetch_entries(weight.col_indices, weight.wide_columns ? 4 : 2, begin, end);
  prefetch_entries(weight.values, weight.values_dtype == DType::kFloat32 ? 4 : 2, begin, end);
}

// Two neighbours of a register. bf16 is the upper half of fp32.
template <class T>
__device__ __forceinline__ float2 to_floats(uint32_t pair) {
  if constexpr (__is_same(T, __half)) return __half22float2(*reinterpret_cast<const __half2*>(&pair));
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000)};
}

// Computed once: the compiler would do it for each use.
template <class P>
__device__ __forceinline__ void keep(P*& pointer) {
  asm volatile("" : "+l"(pointer));
}

// begin + i * bytes, for which the compiler does not find the one instruction.
__device__ __forceinline__ const char* offset(const char* begin, uint32_t i, uint32_t bytes) {
  const char* result;
  asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(result) : "r"(i), "r"(bytes), "l"(begin));
  return result;
}

template <class Tile>
class SparseRows {
  using T = typename Tile::T;
  static constexpr int kVector = 8;                      // activations of a lane: 16 bytes
  static constexpr int kLanes = Tile::kBatch / kVector;  // of an entry
  static constexpr int kParts = Tile::kSparseParts;      // entries of a row at a time
  static constexpr int kRowLanes = kLanes * kParts;
  static constexpr int kWarpRows = kWarpLanes / kRowLanes;  // at a time
  static constexpr int kTeams = Tile::kWarps * kWarpRows;
  static constexpr int kAhead = Tile::kSparseAhead;  // entries of a lane in flight
  static constexpr int kLongRow = 256;               // entries from which a row may be left to all warps
  static constexpr int kWarpEntries = kWarpLanes / kLanes;
  static constexpr int kBlockEntries = Tile::kWarps * kWarpEntries;
  static_assert(kParts <= kVector && kRowLanes <= kWarpLanes);

 public:
  static constexpr int kPartialSums = 2 * Tile::kWarps * Tile::kBatch;

  __device__ __forceinline__ SparseRows(const LinearCall& call, const PairShared<Tile>& shared, RowRange rows,
                                        int first_batch)
      : weight_(call.weight),
        pointers_(shared.row_pointers),
        rows_(rows),
        line_bytes_(static_cast<uint32_t>(transposed_batch(call.batch) * sizeof(T))),
        last_column_(call.weight.in_features - 1u),
        value_shift_(call.weight.values_dtype == DType::kBFloat16 ? 16 : 0),
        warp_(threadIdx.x / kWarpLanes),
        lane_(threadIdx.x % kWarpLanes) {
    const uint32_t begin = (first_batch + lane_ % kLanes * kVector) * sizeof(T);
    needed_ = begin < line_bytes_;
    x_ = static_cast<const char*>(call.transposed_x) + begin;
    keep(x_);
    const int entries = max(pointers_[rows.end] - pointers_[rows.begin], 0);
    // A row that is more than two teams' share would keep one busy for too long.
    longest_ = max(kLongRow, entries / kTeams * 2);
    first_ = rows.begin + warp_ * kWarpRows;
    begin_row();
  }

  // Asks for the first entries.
  __device__ __forceinline__ void load_first() { load<kParts>(entry_, left_); }

  // The sums of the share's rows, [batch][row], by all threads of the dense product.
  __device__ __forceinline__ void multiply(float* target, float* partials) {
    float sums[kVector] = {};
    while (first_ < rows_.end) {
      const int row = first_ + lane_ / kRowLanes;
      const int most = most_left(left_);
      uint4 x[kAhead];
      float factors[kAhead];
      gather<kParts>(x, factors, left_);
      entry_ += kAhead * kParts;
      left_ -= kAhead * kParts;
      const bool last = most <= kAhead * kParts;
      if (last) {
        first_ += kTeams;
        begin_row();
      }
      load<kParts>(entry_, left_);
      add<kParts>(sums, x, factors, most);
      if (last) store(target, row, sums);
    }
    multiply_long_rows(target, partials);
  }

 private:
  __device__ __forceinline__ int length(int row) const { return pointers_[row + 1] - pointers_[row]; }

  // The same for all lanes.
  __device__ __forceinline__ static int most_left(int left) { return __reduce_max_sync(~0u, left); }

  // The lane's entries of its row among those from first_ on: none where the row is left to all warps, or the lane's
  // activations are beyond the batch.
  __device__ __forceinline__ void begin_row() {
    const int row = first_ + lane_ / kRowLanes;
    const int part = lane_ / kLanes % kParts;
    entry_ = left_ = 0;
    if (!needed_ || row >= rows_.end || length(row) > longest_) return;
    entry_ = pointers_[row] + part;
    left_ = length(row) - part;
  }

  // Entries entry, entry + kStep, ..., of which those before `left` are there.
  template <int kStep>
  __device__ __forceinline__ void load(int entry, int left) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) values_[i] = 0;
    if (!weight_.wide_columns && weight_.values_dtype != DType::kFloat32) {
      const auto* column = static_cast<const uint16_t*>(weight_.col_indices) + entry;
      const auto* value = static_cast<const uint16_t*>(weight_.values) + entry;
      keep(column);
      keep(value);
#pragma unroll
      for (int i = 0; i < kAhead; ++i)
        if (i * kStep < left) columns_[i] = __ldg(column + i * kStep), values_[i] = __ldg(value + i * kStep);
    } else {
#pragma unroll
      for (int i = 0; i < kAhead; ++i)
        if (i * kStep < left) {
          // Clamped later: nothing waits here.
          columns_[i] = weight_.wide_columns
                            ? __ldg(static_cast<const uint32_t*>(weight_.col_indices) + entry + i * kStep)
                            : __ldg(static_cast<const uint16_t*>(weight_.col_indices) + entry + i * kStep);
          values_[i] = load_bits(weight_.values, weight_.values_dtype, entry + i * kStep);
        }
    }
  }

  // The values of the entries that were loaded, and their activations; zeros for those that are not there.
  template <int kStep>
  __device__ __forceinline__ void gather(uint4 (&x)[kAhead], float (&factors)[kAhead], int left) const {
    const bool half = weight_.values_dtype == DType::kFloat16;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const auto* source = reinterpret_cast<const uint4*>(offset(x_, min(columns_[i], last_column_), line_bytes_));
      x[i] = uint4{};
      if (i * kStep < left) x[i] = load_uncached(source);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const float value = __uint_as_float(values_[i] << value_shift_);
      factors[i] = half ? float_of_bits(values_[i], DType::kFloat16) : value;
    }
  }

  // Of the entries that were there for some lane.
  template <int kStep>
  __device__ __forceinline__ void add(float (&sums)[kVector], const uint4 (&x)[kAhead], const float (&factors)[kAhead],
                                      int most) const {
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
      if (i * kStep < most) {
        const uint32_t pairs[] = {x[i].x, x[i].y, x[i].z, x[i].w};
#pragma unroll
        for (int n = 0; n < kVector / 2; ++n) {
          const float2 pair = to_floats<T>(pairs[n]);
          sums[2 * n] += factors[i] * pair.x;
          sums[2 * n + 1] += factors[i] * pair.y;
        }
      }
  }

  // Adds the parts of a row: with each exchange a lane keeps half of the activations.
  __device__ __forceinline__ void store(float* target, int row, float (&sums)[kVector]) const {
    int line = lane_ % kLanes * kVector;
#pragma unroll
    for (int parts = kParts; parts > 1; parts /= 2) {
      const int kept = kVector / 2 * parts / kParts;
      const int distance = kLanes * parts / 2;
      const bool upper = lane_ & distance;
#pragma unroll
      for (int n = 0; n < kept; ++n) {
        const float given = upper ? sums[n] : sums[n + kept];
        sums[n] = (upper ? sums[n + kept] : sums[n]) + __shfl_xor_sync(~0u, given, distance);
      }
      line += upper ? kept : 0;
    }
#pragma unroll
    for (int n = 0; n < kVector / kParts; ++n)
      if (row < rows_.end) target[(line + n) * Tile::kSumStride + row] = sums[n];
#pragma unroll
    for (float& sum : sums) sum = 0;
  }

  // The rows that are left to all warps, one after the other. Partial sums of two take turns: who writes those of a row
  // has met all threads since they read those of the row before the last.
  __device__ __forceinline__ void multiply_long_rows(float* target, float* partials) {
    int turn = 0;
    for (int base = rows_.begin; base < rows_.end; base += kWarpLanes) {
      const int own = base + lane_;
      uint32_t found = __ballot_sync(~0u, own < rows_.end && length(own) > longest_);
      for (; found != 0; found &= found - 1) {
        const int row = base + __ffs(found) - 1;
        float sums[kVector] = {};
        const int first = warp_ * kWarpEntries + lane_ / kLanes;
        int entry = pointers_[row] + first;
        int left = needed_ ? length(row) - first : 0;
        for (int most; (most = most_left(left)) > 0;) {
          uint4 x[kAhead];
          float factors[kAhead];
          load<kBlockEntries>(entry, left);
          gather<kBlockEntries>(x, factors, left);
          add<kBlockEntries>(sums, x, factors, most);
          entry += kAhead * kBlockEntries;
          left -= kAhead * kBlockEntries;
        }
#pragma unroll
        for (int n = 0; n < kVector; ++n)
#pragma unroll
          for (int distance = kLanes; distance < kWarpLanes; distance *= 2)
            sums[n] += __shfl_xor_sync(~0u, sums[n], distance);
        float* turn_sums = partials + turn * Tile::kWarps * Tile::kBatch;
        if (lane_ < kLanes) {
#pragma unroll
          for (int n = 0; n < kVector; ++n) turn_sums[warp_ * Tile::kBatch + lane_ * kVector + n] = sums[n];
        }
        synchronize(1, Tile::kProductThreads);
        if (threadIdx.x < Tile::kBatch) {
          float sum = 0;
          for (int warp = 0; warp < Tile::kWarps; ++warp) sum += turn_sums[warp * Tile::kBatch + threadIdx.x];
          target[threadIdx.x * Tile::kSumStride + row] = sum;
        }
        turn ^= 1;
      }
    }
  }

  const LutWeight& weight_;
  const int* pointers_;
  RowRange rows_;
  uint32_t line_bytes_;
  uint32_t last_column_;
  int value_shift_;
  int warp_;
  int lane_;
  bool needed_;
  const char* x_;
  int longest_;
  int first_;  // of the warp's rows
  int entry_;  // of the lane's row, the next to be loaded
  int left_;   // how many the row has from it on
  uint32_t columns_[kAhead];
  uint32_t values_[kAhead];
};

#endif

}  // namespace squeezellm_hf::cuda::warpgroup
