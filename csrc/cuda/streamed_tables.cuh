// The tables of all pairs of a row's values in linear_streamed.
#pragma once

#include "streamed_layout.cuh"

namespace squeezellm_hf::cuda::streamed {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

// What a thread needs to fill its part of a tile's tables, as it lies in memory: loaded a tile ahead.
// A job is 8 rows and 4 upper indices: of a row lane % 8 all values, and the value of upper index lane / 8.
template <int kBits>
struct TablePart {
  static constexpr int kEntries = 1 << kBits;
  static constexpr int kAllJobs = kRows / 8 * kEntries / 4;
  static constexpr int kJobs = (kAllJobs + kServiceWarps - 1) / kServiceWarps;  // of a warp
  uint32_t low[kJobs][kEntries / 2];                                            // pairs of 16-bit values
  uint32_t high[kJobs];

  __device__ static int half(int job) { return job / (kEntries / 4); }
  __device__ static int upper(int job, int lane) { return job % (kEntries / 4) * 4 + lane / 8; }
};

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

template <class T, int kBits>
__device__ void load_tables(TablePart<kBits>& part, const LutWeight& weight, int tile, int warp, int lane) {
  using Part = TablePart<kBits>;
  constexpr int kEntries = Part::kEntries;
  const bool vector = vector_tables(weight);
#pragma unroll
  for (int j = 0; j < Part::kJobs; ++j) {
    const int job = j * kServiceWarps + warp;
    if (job >= Part::kAllJobs) break;
    const int row = min(tile * kRows + Part::half(job) * 8 + tile_row<kBits>(lane % 8), weight.out_features - 1);
    const int64_t first = int64_t{row} * kEntries;
    uint32_t (&low)[kEntries / 2] = part.low[j];
    if (!vector) {
#pragma unroll
      for (int i = 0; i < kEntries / 2; ++i) low[i] = load_pair<T>(weight, first + 2 * i);
    } else if constexpr (kEntries == 4) {
      const uint2 v = __ldg(reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(weight.lookup_table) + first));
      low[0] = v.x, low[1] = v.y;
    } else {
#pragma unroll
      for (int i = 0; i < kEntries / 8; ++i) {
        const uint4 v =
            __ldg(reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(weight.lookup_table) + first) + i);
        low[4 * i] = v.x, low[4 * i + 1] = v.y, low[4 * i + 2] = v.z, low[4 * i + 3] = v.w;
      }
    }
    part.high[j] = load_bits(weight.lookup_table, weight.table_dtype, first + Part::upper(job, lane));
  }
}

template <class T, int kBits, int kBatch, int kBuffers>
__device__ void fill_tables(Shared<T, kBits, kBatch, kBuffers>& shared, const TablePart<kBits>& part,
                            const LutWeight& weight, int buffer, uint32_t parity, int warp, int lane) {
  using Part = TablePart<kBits>;
  constexpr DType kOwn = __is_same(T, __nv_bfloat16) ? DType::kBFloat16 : DType::kFloat16;
  const bool convert = vector_tables(weight) && weight.table_dtype != kOwn;
  wait(shared.tables_empty[buffer], parity ^ 1);
#pragma unroll
  for (int j = 0; j < Part::kJobs; ++j) {
    const int job = j * kServiceWarps + warp;
    if (job >= Part::kAllJobs) break;
    const T high = from_float<T>(float_of_bits(part.high[j], weight.table_dtype));
    const uint32_t high_bits = *reinterpret_cast<const uint16_t*>(&high);
#pragma unroll
    for (int i = 0; i < Part::kEntries; i += 2) {
      const uint32_t low = convert ? convert_pair<T>(part.low[j][i / 2], weight.table_dtype) : part.low[j][i / 2];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const uint32_t pair = __byte_perm(low, high_bits, k ? 0x5432 : 0x5410);
        const int entry = Part::upper(job, lane) * Part::kEntries + i + k;
        *reinterpret_cast<uint4*>(shared.tables[buffer].pairs[entry][Part::half(job)][lane % 8]) =
            make_uint4(pair, pair, pair, pair);
      }
    }
  }
  __syncwarp();
  if (lane < kArrivingLanes) arrive(shared.tables_full[buffer]);
}

#endif

}  // namespace squeezellm_hf::cuda::streamed
