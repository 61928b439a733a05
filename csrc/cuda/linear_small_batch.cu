// y = x W^T for a batch of 1 to 8: the weights are read once, straight from their stored layout.
//
// A block owns tiles of 16 or 32 rows, one after the other; its warps take turns along the rows. The
// tensor core multiplies 16 weights of each of 16 rows with 8 columns of activations, so that
// multiplying costs next to nothing even at batch 1; what is left is to turn indices into values.
// Two neighbouring indices select one 32-bit entry of a table of all pairs of the row's values, in
// shared memory. In the tensor core's layout lane l meets the rows l / 4 and l / 4 + 8 only: four
// copies of every table give each lane a bank of its own, and no look-up waits for another.
//
// What a tile needs (weights, table, sparse entries) is loaded while the previous one is worked on.
#include "dispatch.h"
#include "small_batch_unit.cuh"

namespace squeezellm_hf::cuda {
namespace small_batch {
namespace {

constexpr int kHeavyRow = 512;  // sparse values of a row beyond which all warps share it
// 32 warps of 64 registers a thread, or 16 of 128 where a warp has two tiles.
constexpr int blocks_per_multiprocessor(int tiles, int warps) { return 32 / tiles / warps; }

template <class T, int kBits, int kTiles, int kBatch, int kWarps>
struct SharedMemory {
  static constexpr int kRows = kTiles * kTileRows;
  static constexpr int kEntries = 1 << kBits;
  // Entry e of row r holds the values of the indices e % 2^bits (low half) and e / 2^bits, four times.
  struct alignas(128) Table {
    uint32_t pairs[Unit<kBits>::kPairs][2][8][4];
  } tables[kTiles];
  float sums[kWarps][kBatch][kRows];
  // Of the tile in work and the next one.
  alignas(16) T values[2][kRows][kEntries + 8];  // eight more, so that rows start in different banks
  int2 sparse_rows[2][kRows];
};

template <class T, int kBits, int kTiles, int kBatch, int kWarps, bool kVector>
__global__ void __launch_bounds__(kWarps* kWarpLanes, blocks_per_multiprocessor(kTiles, kWarps))
    small_batch_kernel(const LinearCall call) {
  using U = Unit<kBits>;
  using Shared = SharedMemory<T, kBits, kTiles, kBatch, kWarps>;
  constexpr int kThreads = kWarps * kWarpLanes;
  constexpr int kRows = Shared::kRows;
  constexpr int kEntries = Shared::kEntries;
  constexpr int kWarpRows = kRows / kWarps;
  constexpr int kSubloads = U::kLaneWords / 4;
  // With fewer than 8 activations a column each of the tensor core's takes every kSlices-th group of
  // a lane's weights, so that one load brings activations for all lanes.
  constexpr int kSlices = kColumns / kBatch;
  constexpr int kLoads = (U::kGroups + kSlices - 1) / kSlices;
  extern __shared__ __align__(128) unsigned char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);

  const LutWeight& weight = call.weight;
  const int lane = threadIdx.x % kWarpLanes;
  // The shuffle tells the compiler that a warp's lanes agree on it.
  const int warp = __shfl_sync(0xffffffff, threadIdx.x / kWarpLanes, 0);
  const int last_row = weight.out_features - 1;
  const int tiles = (weight.out_features + kRows - 1) / kRows;
  const int words_per_row = static_cast<int>(weight.words_per_row);
  const int units = (words_per_row + U::kWords - 1) / U::kWords;
  const int rounds = (units + kWarps * U::kAhead - 1) / (kWarps * U::kAhead);
  const bool has_sparse = weight.crow_indices != nullptr;

  // The loads' position, ahead of the work's. Rows beyond the last are computed like it and not
  // written.
  const int lane_word = warp * U::kWords + lane % 4 * (kBits == 3 ? U::kLaneWords : 4);
  int load_tile = blockIdx.x;
  int load_round = 0;
  int load_remaining;
  const uint32_t* load_rows[kTiles][2];
  auto begin_tile = [&] {
    load_remaining = load_tile < tiles ? words_per_row - lane_word : 0;
#pragma unroll
    for (int m = 0; m < kTiles; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = min(load_tile * kRows + m * kTileRows + h * 8 + lane / 4, last_row);
        load_rows[m][h] = weight.qweight + row * weight.words_per_row + lane_word;
      }
  };
  uint32_t words[U::kAhead][kTiles][2][kSubloads][4] = {};
  auto load_subload = [&](int ahead, int subload) {
    const int word = ahead * kWarps * U::kWords + subload * 4;
#pragma unroll
    for (int m = 0; m < kTiles; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        load_words<kVector, kBits == 3>(words[ahead][m][h][subload], load_rows[m][h] + word, load_remaining - word);
  };
  auto next_round = [&] {
    constexpr int kRoundWords = kWarps * U::kAhead * U::kWords;
    if (++load_round < rounds) {
      load_remaining -= kRoundWords;
#pragma unroll
      for (int m = 0; m < kTiles; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) load_rows[m][h] += kRoundWords;
    } else {
      load_round = 0;
      load_tile += gridDim.x;
      begin_tile();
    }
  };

  // A thread's share of the next tile's table and row pointers, as loaded: converting would wait.
  constexpr int kThreadValues = (kRows * kEntries + kThreads - 1) / kThreads;
  uint32_t next_values[kThreadValues] = {};
  int2 next_sparse_row = {0, 0};
  auto load_tile_data = [&](int tile) {
    if (tile >= tiles) return;
#pragma unroll
    for (int i = 0; i < kThreadValues; ++i) {
      const int position = i * kThreads + threadIdx.x;
      if (position >= kRows * kEntries) break;
      const int row = min(tile * kRows + position / kEntries, last_row);
      next_values[i] =
          load_bits(weight.lookup_table, weight.table_dtype, int64_t{row} * kEntries + position % kEntries);
    }
    if (has_sparse && threadIdx.x < kRows) {
      const int row = tile * kRows + threadIdx.x;
      next_sparse_row = {0, 0};
      if (row <= last_row) next_sparse_row = {weight.crow_indices[row], weight.crow_indices[row + 1]};
    }
  };
  auto store_tile_data = [&](int buffer) {
#pragma unroll
    for (int i = 0; i < kThreadValues; ++i) {
      const int position = i * kThreads + threadIdx.x;
      if (position < kRows * kEntries)
        shared.values[buffer][position / kEntries][position % kEntries] =
            from_float<T>(float_of_bits(next_values[i], weight.table_dtype));
    }
    if (has_sparse && threadIdx.x < kRows)
      shared.sparse_rows[buffer][threadIdx.x] = clamped_sparse_row(weight, next_sparse_row);
  };

  load_tile_data(blockIdx.x);
  begin_tile();
#pragma unroll
  for (int a = 0; a < U::kAhead; ++a)
#pragma unroll
    for (int s = 0; s < kSubloads; ++s) load_subload(a, s);
  next_round();
  store_tile_data(0);

  const int slice = lane / 4 / kBatch;
  const int column = lane / 4 % kBatch;
  const int lane_k = lane % 4 * U::kLaneWeights + slice * 8;
  const T* x = static_cast<const T*>(call.x) + int64_t{column} * weight.in_features + lane_k;
  const int remaining_x = column < call.batch && slice < U::kGroups ? weight.in_features - lane_k : 0;
  const uint32_t lane_offset = lane * 4;

  int buffer = 0;
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x, buffer ^= 1) {
    load_tile_data(tile + gridDim.x);
    __syncthreads();  // the last tile's tables are not in use any more, this one's values are there
    {
      // A thread writes entries of one row with the same low index, and high indices in a row.
      constexpr int kThreadPairs = U::kPairs * kRows > kThreads ? U::kPairs * kRows / kThreads : 1;
      const int row = threadIdx.x % kRows;
      const int low = threadIdx.x / kRows % kEntries;
      const int high = threadIdx.x / (kRows * kEntries) * kThreadPairs;
      if (high < kEntries) {
        struct alignas(kThreadPairs < 8 ? 2 * kThreadPairs : 16) High {
          uint16_t values[kThreadPairs];
        };
        const uint16_t* values = reinterpret_cast<const uint16_t*>(shared.values[buffer][row]);
        const uint32_t low_value = values[low];
        const High high_values = *reinterpret_cast<const High*>(values + high);
#pragma unroll
        for (int j = 0; j < kThreadPairs; ++j) {
          const uint32_t pair = low_value | uint32_t{high_values.values[j]} << 16;
          *reinterpret_cast<uint4*>(
              shared.tables[row / kTileRows].pairs[(high + j) * kEntries + low][row / 8 % 2][row % 8]) =
              make_uint4(pair, pair, pair, pair);
        }
      }
    }
    // The sparse entries of this warp's rows are wanted after the dense part.
    if (has_sparse) {
#pragma unroll
      for (int m = 0; m < kWarpRows; ++m) {
        const int2 row = shared.sparse_rows[buffer][m * kWarps + warp];
        const int entry = row.x + lane * kWarpLanes;
        if (entry < row.y) {
          const int64_t column_bytes = weight.wide_columns ? 4 : 2;
          const int64_t value_bytes = weight.values_dtype == DType::kFloat32 ? 4 : 2;
          prefetch_l2(static_cast<const unsigned char*>(weight.col_indices) + entry * column_bytes);
          prefetch_l2(static_cast<const unsigned char*>(weight.values) + entry * value_bytes);
        }
      }
    }
    __syncthreads();

    // Where registers allow two sums in turn, so that a product need not wait for the one before it.
    constexpr int kSums = kBits == 4 && kTiles == 1 ? 2 : 1;
    float products[kSums][kTiles][4] = {};
    for (int round = 0; round < rounds; ++round) {
#pragma unroll
      for (int a = 0; a < U::kAhead; ++a) {
        const int unit = (round * U::kAhead + a) * kWarps + warp;
        if (unit >= units) {
#pragma unroll
          for (int s = 0; s < kSubloads; ++s) load_subload(a, s);
          continue;
        }
        const int k = unit * U::kWeights;
#pragma unroll
        for (int load = 0; load < kLoads; ++load) {
          const int ahead = k + load * kSlices * 8;
          const uint4 loaded = load_activations<T, kVector>(x + ahead, remaining_x - ahead);
#pragma unroll
          for (int i = load * kSlices; i < min((load + 1) * kSlices, U::kGroups); ++i) {
            const bool mine = kSlices == 1 || slice == i % kSlices;
            const uint4 b = {mine ? loaded.x : 0, mine ? loaded.y : 0, mine ? loaded.z : 0, mine ? loaded.w : 0};
#pragma unroll
            for (int m = 0; m < kTiles; ++m) {
              uint32_t pairs[2][4];
#pragma unroll
              for (int h = 0; h < 2; ++h)
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                  const uint32_t offset = pair_offset<kBits>(words[a][m][h], 4 * i + j, lane_offset);
                  pairs[h][j] = *reinterpret_cast<const uint32_t*>(
                      memory + (m * sizeof(typename Shared::Table) + h * (kEntryBytes / 2)) + offset);
                }
              multiply_accumulate<T>(products[0][m], pairs[0][0], pairs[1][0], pairs[0][1], pairs[1][1], b.x, b.y);
              multiply_accumulate<T>(products[kSums - 1][m], pairs[0][2], pairs[1][2], pairs[0][3], pairs[1][3], b.z,
                                     b.w);
            }
            // Words whose last index was just used make room for those of a later unit.
            constexpr int kGroupBits = 8 * kBits;
            const int used_subloads = (i + 1) * kGroupBits / 128;
            if (used_subloads > i * kGroupBits / 128) load_subload(a, used_subloads - 1);
          }
        }
      }
      next_round();
    }

    // A warp's sums over its columns' slices, then the sums of all warps, each in a fixed order.
#pragma unroll
    for (int m = 0; m < kTiles; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float even = products[0][m][2 * h];
        float odd = products[0][m][2 * h + 1];
        if (kSums == 2) even += products[kSums - 1][m][2 * h], odd += products[kSums - 1][m][2 * h + 1];
        if (kBatch == 1) even += odd;
#pragma unroll
        for (int distance = 2; distance * 2 >= (kBatch > 2 ? kBatch : 2) && kBatch < kColumns; distance /= 2) {
          even += __shfl_xor_sync(0xffffffff, even, distance);
          odd += __shfl_xor_sync(0xffffffff, odd, distance);
        }
        const int n = lane % 4 * 2;
        const int row = m * kTileRows + h * 8 + lane / 4;
        if (n < kBatch) shared.sums[warp][n][row] = even;
        if (n + 1 < kBatch) shared.sums[warp][n + 1][row] = odd;
      }
    if (has_sparse) {
      __syncwarp();
      auto add_warp_sum = [&](float (&lane_sums)[kBatch], int r) {
#pragma unroll
        for (int n = 0; n < kBatch; ++n) {
#pragma unroll
          for (int distance = 16; distance > 0; distance /= 2)
            lane_sums[n] += __shfl_xor_sync(0xffffffff, lane_sums[n], distance);
          if (lane == 0) shared.sums[warp][n][r] += lane_sums[n];
        }
      };
#pragma unroll
      for (int m = 0; m < kWarpRows; ++m) {
        const int2 row = shared.sparse_rows[buffer][m * kWarps + warp];
        float lane_sums[kBatch] = {};
        if (row.y - row.x <= kHeavyRow) {
#pragma unroll 4
          for (int entry = row.x + lane; entry < row.y; entry += kWarpLanes)
            add_sparse<T, kBatch>(lane_sums, call, entry);
        }
        add_warp_sum(lane_sums, m * kWarps + warp);
      }
      const int2 lane_row = lane < kRows ? shared.sparse_rows[buffer][lane] : int2{0, 0};
      uint32_t heavy = __ballot_sync(0xffffffff, lane_row.y - lane_row.x > kHeavyRow);
      for (; heavy != 0; heavy &= heavy - 1) {
        const int r = __ffs(heavy) - 1;
        const int2 row = shared.sparse_rows[buffer][r];
        float lane_sums[kBatch] = {};
#pragma unroll 2
        for (int entry = row.x + threadIdx.x; entry < row.y; entry += kThreads)
          add_sparse<T, kBatch>(lane_sums, call, entry);
        add_warp_sum(lane_sums, r);
      }
    }
    store_tile_data(buffer ^ 1);
    __syncthreads();
    for (int i = threadIdx.x; i < call.batch * kRows; i += kThreads) {
      const int n = i / kRows;
      const int row = tile * kRows + i % kRows;
      if (row > last_row) continue;
      float sum = call.bias == nullptr ? 0.0f : load_float(call.bias, call.bias_dtype, row);
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += shared.sums[w][n][i % kRows];
      static_cast<T*>(call.y)[int64_t{n} * weight.out_features + row] = from_float<T>(sum);
    }
  }
}

template <class T, int kBits, int kTiles, int kBatch, int kWarps, bool kVector>
cudaError_t launch(const LinearCall& call) {
  using Shared = SharedMemory<T, kBits, kTiles, kBatch, kWarps>;
  if constexpr (kTiles > 1) {
    if (sizeof(Shared) > static_cast<size_t>(call.shared_memory))
      return launch<T, kBits, 1, kBatch, kWarps, kVector>(call);
  }
  const auto kernel = small_batch_kernel<T, kBits, kTiles, kBatch, kWarps, kVector>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared));
  if (error != cudaSuccess) return error;
  const int tiles = (call.weight.out_features + Shared::kRows - 1) / Shared::kRows;
  const int resident = blocks_per_multiprocessor(kTiles, kWarps) * call.multiprocessors;
  const int blocks = tiles < resident ? tiles : resident;
  kernel<<<blocks, kWarps * kWarpLanes, sizeof(Shared), call.stream>>>(call);
  return cudaGetLastError();
}

template <class T, int kBits>
cudaError_t launch_batch(const LinearCall& call) {
  const bool vector = is_aligned(call);
  if (!vector)
    return call.batch == 1 ? launch<T, kBits, 1, 1, 16, false>(call) : launch<T, kBits, 2, 8, 16, false>(call);
  if (call.batch <= 2) {
    // Measured: blocks of 8 warps overlap each other's phases better where four of them fit, unless
    // rows are long and few.
    if constexpr (kBits < 4) {
      const bool many_tiles = call.weight.out_features > 3 * kTileRows * call.multiprocessors;
      if (many_tiles || call.weight.in_features <= 8192)
        return call.batch == 1 ? launch<T, kBits, 1, 1, 8, true>(call) : launch<T, kBits, 1, 2, 8, true>(call);
    }
    return call.batch == 1 ? launch<T, kBits, 1, 1, 16, true>(call) : launch<T, kBits, 1, 2, 16, true>(call);
  }
  return call.batch <= 4 ? launch<T, kBits, 2, 4, 16, true>(call) : launch<T, kBits, 2, 8, 16, true>(call);
}

}  // namespace
}  // namespace small_batch

cudaError_t linear_small_batch(const LinearCall& call) {
  return dispatch(call, [&](auto type, auto bits) {
    return small_batch::launch_batch<typename decltype(type)::Type, bits.value>(call);
  });
}

}  // namespace squeezellm_hf::cuda
