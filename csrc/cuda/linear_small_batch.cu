// y = x W^T for a batch of 1 to 8: the weights are read once, straight from their stored layout.
//
// A block owns 16 rows, its warps take turns along them. The tensor core multiplies 16 weights of
// each of 16 rows with up to 8 activations, so that multiplying costs next to nothing even at batch
// 1; what is left is to turn indices into values. Two neighbouring indices select one 32-bit entry
// of a table of all pairs of the row's values, in shared memory. In the tensor core's layout lane l
// meets the rows l / 4 and l / 4 + 8 only: four copies of every table give each lane a bank of its
// own, and no look-up waits for another.
#include <type_traits>

#include "common.cuh"

namespace squeezellm_hf::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpLanes;
constexpr int kRows = 16;
constexpr int kColumns = 8;  // of the tensor core's right operand: the largest batch
constexpr int kEntryShift = 7;  // log2 of the bytes between two entries of a table: 32 banks of 4
// A row of more sparse values is shared by all warps of the block.
constexpr int64_t kHeavyRow = 512;

// How a warp takes a row: each of 4 lanes a piece of consecutive words that holds a whole number of
// indices, `kPieces` times; all of them are in flight while the previous ones are worked on.
template <int kBits>
struct Piece {
  static constexpr int kWords = kBits == 3 ? 12 : 4;
  static constexpr int kWeights = kWords * 32 / kBits;
  static constexpr int kPieces = kBits == 3 ? 1 : 2;
  static constexpr int kStepWeights = 4 * kPieces * kWeights;  // of a row, a warp's step
  static constexpr int kStepWords = 4 * kPieces * kWords;
  static constexpr int kPairs = 1 << (2 * kBits);
  static constexpr int kTableBytes = kRows * 4 * kPairs * 4;
};

struct RowWords {
  const uint32_t* words;
  int count;
};

template <int kBits, bool kVector>
__device__ __forceinline__ void load_piece(uint32_t (&piece)[Piece<kBits>::kWords], const RowWords& row, int first) {
  constexpr int kWords = Piece<kBits>::kWords;
  if constexpr (kVector) {
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
      uint4 v = make_uint4(0, 0, 0, 0);
      const uint4* source = reinterpret_cast<const uint4*>(row.words + first + i);
      if (first + i < row.count) v = kWords == 4 ? load_streamed(source) : load_shared_sector(source);
      piece[i] = v.x, piece[i + 1] = v.y, piece[i + 2] = v.z, piece[i + 3] = v.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kWords; ++i) piece[i] = first + i < row.count ? __ldg(row.words + first + i) : 0;
  }
}

// Eight consecutive activations; zero beyond the row, and for columns beyond the batch (null).
template <class T, bool kVector>
__device__ __forceinline__ uint4 load_activations(const T* x, int k, int in_features) {
  uint4 v = make_uint4(0, 0, 0, 0);
  if (x == nullptr) return v;
  if constexpr (kVector) {
    if (k < in_features) v = __ldg(reinterpret_cast<const uint4*>(x + k));
  } else {
    const uint16_t* bits = reinterpret_cast<const uint16_t*>(x);
    uint32_t halves[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) halves[i] = k + i < in_features ? __ldg(bits + k + i) : 0;
    v = make_uint4(halves[0] | halves[1] << 16, halves[2] | halves[3] << 16, halves[4] | halves[5] << 16,
                   halves[6] | halves[7] << 16);
  }
  return v;
}

// The byte offset of the entry for pair `j` of a piece: its index, times the entries' distance.
template <int kBits>
__device__ __forceinline__ uint32_t pair_offset(const uint32_t (&piece)[Piece<kBits>::kWords], int j) {
  constexpr int kPairBits = 2 * kBits;
  constexpr uint32_t kMask = ((1u << kPairBits) - 1) << kEntryShift;
  const int word = j * kPairBits / 32;
  const int shift = j * kPairBits % 32;
  uint32_t bits;
  if (shift + kPairBits > 32) {
    bits = __funnelshift_r(piece[word], piece[word + 1], shift - kEntryShift);
  } else if (shift >= kEntryShift) {
    bits = piece[word] >> (shift - kEntryShift);
  } else {
    bits = piece[word] << (kEntryShift - shift);
  }
  return bits & kMask;
}

// Fills the tables of pairs: entry e of row r holds the values of the indices e % 2^bits (low half)
// and e / 2^bits, four times, at [r / 8][e][r % 8][4]. Eight neighbouring threads write 128
// consecutive bytes.
template <class T, int kBits>
__device__ void fill_tables(unsigned char* tables, T (*entries)[(1 << kBits) + 8], const LutWeight& weight,
                            int first_row) {
  constexpr int kEntries = 1 << kBits;
  for (int i = threadIdx.x; i < kRows * kEntries; i += kThreads) {
    const int row = min(first_row + i / kEntries, weight.out_features - 1);
    const float value = load_float(weight.lookup_table, weight.table_dtype, int64_t{row} * kEntries + i % kEntries);
    entries[i / kEntries][i % kEntries] = from_float<T>(value);
  }
  __syncthreads();
  const int row = threadIdx.x % kRows;
  const uint16_t* row_entries = reinterpret_cast<const uint16_t*>(entries[row]);
  unsigned char* table =
      tables + (row / 8) * (Piece<kBits>::kTableBytes / 2) + (row % 8) * 16;
#pragma unroll
  for (int j = 0; j < Piece<kBits>::kPairs / (kThreads / kRows); ++j) {
    const int e = j * (kThreads / kRows) + threadIdx.x / kRows;
    const uint32_t pair = row_entries[e % kEntries] | uint32_t{row_entries[e / kEntries]} << 16;
    *reinterpret_cast<uint4*>(table + (e << kEntryShift)) = make_uint4(pair, pair, pair, pair);
  }
}

// Adds `lanes` lanes' share of a row's sparse products to sums[n], n < batch.
template <class T, int kBatch>
__device__ __forceinline__ void add_sparse(float (&sums)[kBatch], const LinearCall& call, const SparseRow& row,
                                           int lane, int lanes) {
  const T* x = static_cast<const T*>(call.x);
#pragma unroll 2
  for (int64_t entry = row.begin + lane; entry < row.end; entry += lanes) {
    const int column = sparse_column(call.weight, entry);
    const float value = load_float(call.weight.values, call.weight.values_dtype, entry);
#pragma unroll
    for (int n = 0; n < kBatch; ++n)
      if (n < call.batch) sums[n] += value * to_float(x[int64_t{n} * call.weight.in_features + column]);
  }
}

template <class T, int kBits, int kBatch, bool kVector>
__global__ void __launch_bounds__(kThreads, kBits == 3 ? 2 : 3) small_batch_kernel(const LinearCall call) {
  using P = Piece<kBits>;
  extern __shared__ __align__(128) unsigned char tables[];
  __shared__ __align__(16) T entries[kRows][(1 << kBits) + 8];
  const LutWeight& weight = call.weight;
  const int lane = threadIdx.x % kWarpLanes;
  const int warp = threadIdx.x / kWarpLanes;
  const int first_row = blockIdx.x * kRows;
  const int in_features = weight.in_features;

  // The rows of this lane; those beyond the last are computed like the last and not written.
  RowWords rows[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = min(first_row + lane / 4 + 8 * h, weight.out_features - 1);
    rows[h] = {weight.qweight + row * weight.words_per_row, static_cast<int>(weight.words_per_row)};
  }
  uint32_t next[P::kPieces][2][P::kWords];
  auto load_step = [&](int step) {
#pragma unroll
    for (int p = 0; p < P::kPieces; ++p)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        load_piece<kBits, kVector>(next[p][h], rows[h], step * P::kStepWords + (4 * p + lane % 4) * P::kWords);
  };
  load_step(warp);

  // Half a warp a row; its sum is ready in all of its lanes.
  float sparse[kBatch] = {};
  const int sparse_row_index = warp * 2 + lane / 16;
  if (weight.crow_indices != nullptr) {
    const int row = min(first_row + sparse_row_index, weight.out_features - 1);
    const SparseRow entries_of_row = sparse_row(weight, row);
    if (entries_of_row.end - entries_of_row.begin <= kHeavyRow)
      add_sparse<T, kBatch>(sparse, call, entries_of_row, lane % 16, 16);
#pragma unroll
    for (int n = 0; n < kBatch; ++n)
#pragma unroll
      for (int distance = 8; distance > 0; distance /= 2)
        sparse[n] += __shfl_xor_sync(0xffffffff, sparse[n], distance);
  }

  fill_tables<T, kBits>(tables, entries, weight, first_row);
  __syncthreads();

  const int column = lane / 4;
  const T* x = column < call.batch ? static_cast<const T*>(call.x) + int64_t{column} * in_features : nullptr;
  const unsigned char* table[2] = {tables + lane * 4, tables + P::kTableBytes / 2 + lane * 4};
  auto look_up = [&](const uint32_t (&piece)[P::kWords], int h, int j) {
    return *reinterpret_cast<const uint32_t*>(table[h] + pair_offset<kBits>(piece, j));
  };

  float products[4] = {};
  const int steps = (in_features + P::kStepWeights - 1) / P::kStepWeights;
  for (int step = warp; step < steps; step += kWarps) {
    uint32_t current[P::kPieces][2][P::kWords];
#pragma unroll
    for (int p = 0; p < P::kPieces; ++p)
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int i = 0; i < P::kWords; ++i) current[p][h][i] = next[p][h][i];
    load_step(step + kWarps);
#pragma unroll
    for (int p = 0; p < P::kPieces; ++p) {
      const int k = step * P::kStepWeights + (4 * p + lane % 4) * P::kWeights;
#pragma unroll
      for (int i = 0; i < P::kWeights / 8; ++i) {
        const uint4 b = load_activations<T, kVector>(x, k + 8 * i, in_features);
        multiply_accumulate<T>(products, look_up(current[p][0], 0, 4 * i), look_up(current[p][1], 1, 4 * i),
                               look_up(current[p][0], 0, 4 * i + 1), look_up(current[p][1], 1, 4 * i + 1), b.x, b.y);
        multiply_accumulate<T>(products, look_up(current[p][0], 0, 4 * i + 2), look_up(current[p][1], 1, 4 * i + 2),
                               look_up(current[p][0], 0, 4 * i + 3), look_up(current[p][1], 1, 4 * i + 3), b.z, b.w);
      }
    }
  }

  // The warps' sums meet in shared memory, where the tables were, and are added in a fixed order.
  __syncthreads();
  float(*sums)[kColumns][kRows] = reinterpret_cast<float(*)[kColumns][kRows]>(tables);
#pragma unroll
  for (int i = 0; i < 4; ++i) sums[warp][lane % 4 * 2 + i % 2][lane / 4 + i / 2 * 8] = products[i];
  if (weight.crow_indices != nullptr) {
    __syncwarp();
    if (lane % 16 == 0) {
#pragma unroll
      for (int n = 0; n < kBatch; ++n) sums[warp][n][sparse_row_index] += sparse[n];
    }
    for (int r = 0; r < min(kRows, weight.out_features - first_row); ++r) {
      const SparseRow entries_of_row = sparse_row(weight, first_row + r);
      if (entries_of_row.end - entries_of_row.begin <= kHeavyRow) continue;
      float heavy[kBatch] = {};
      add_sparse<T, kBatch>(heavy, call, entries_of_row, threadIdx.x, kThreads);
      __syncwarp();
#pragma unroll
      for (int n = 0; n < kBatch; ++n) {
#pragma unroll
        for (int distance = 16; distance > 0; distance /= 2)
          heavy[n] += __shfl_xor_sync(0xffffffff, heavy[n], distance);
        if (lane == 0) sums[warp][n][r] += heavy[n];
      }
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < call.batch * kRows; i += kThreads) {
    const int n = i / kRows;
    const int row = first_row + i % kRows;
    if (row >= weight.out_features) continue;
    float sum = call.bias == nullptr ? 0.0f : load_float(call.bias, call.bias_dtype, row);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += sums[w][n][i % kRows];
    static_cast<T*>(call.y)[int64_t{n} * weight.out_features + row] = from_float<T>(sum);
  }
}

template <class T, int kBits, int kBatch, bool kVector>
cudaError_t launch(const LinearCall& call) {
  const auto kernel = small_batch_kernel<T, kBits, kBatch, kVector>;
  constexpr int kSharedBytes = Piece<kBits>::kTableBytes;
  static_assert(kSharedBytes >= kWarps * kColumns * kRows * static_cast<int>(sizeof(float)));
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return error;
  kernel<<<(call.weight.out_features + kRows - 1) / kRows, kThreads, kSharedBytes, call.stream>>>(call);
  return cudaGetLastError();
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <class T, int kBits>
cudaError_t launch_batch(const LinearCall& call) {
  const bool vector = aligned(call.x) && aligned(call.weight.qweight) && call.weight.in_features % 8 == 0 &&
                      call.weight.words_per_row % 4 == 0;
  if (call.batch == 1) return vector ? launch<T, kBits, 1, true>(call) : launch<T, kBits, 1, false>(call);
  return vector ? launch<T, kBits, kColumns, true>(call) : launch<T, kBits, kColumns, false>(call);
}

template <class T>
cudaError_t launch_bits(const LinearCall& call) {
  switch (call.weight.bits) {
    case 2:
      return launch_batch<T, 2>(call);
    case 3:
      return launch_batch<T, 3>(call);
    case 4:
      return launch_batch<T, 4>(call);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t linear_small_batch(const LinearCall& call) {
  return call.dtype == DType::kFloat16 ? launch_bits<__half>(call) : launch_bits<__nv_bfloat16>(call);
}

}  // namespace squeezellm_hf::cuda
