// W[o, i] = lookup_table[o, index(o, i)] + sparse[o, i]: bound by the bytes written.
#include <algorithm>

#include "dequantize_by_permutes.cuh"

namespace squeezellm_hf::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRun = 8;  // consecutive weights of a thread: 16 bytes of a 16-bit dtype
constexpr int kRunsPerThread = 4;
constexpr int kBlockWeights = kThreads * kRun * kRunsPerThread;  // of one row

// Adds a row's sparse values to the block's piece of it, once that is written. The sum is rounded once:
// from the table's own value, not from the cell just written.
template <class T, int kBits>
__device__ void add_sparse_entries(const LutWeight& weight, int row, int2 entries, int64_t block_begin, T* out_row) {
  constexpr int kEntries = 1 << kBits;
  const uint32_t* words = weight.qweight + row * weight.words_per_row;
  for (int64_t entry = entries.x + int64_t{threadIdx.x}; entry < entries.y; entry += kThreads) {
    const int column = sparse_column(weight, entry);
    if (column < block_begin || column >= block_begin + kBlockWeights) continue;
    const int64_t bit = int64_t{column} * kBits;
    const int64_t word = bit / 32;
    const uint32_t high = word + 1 < weight.words_per_row ? __ldg(words + word + 1) : 0;
    const uint32_t index = __funnelshift_r(__ldg(words + word), high, bit % 32) & (kEntries - 1);
    const float dense = load_float(weight.lookup_table, weight.table_dtype, int64_t{row} * kEntries + index);
    out_row[column] = from_float<T>(dense + load_float(weight.values, weight.values_dtype, entry));
  }
}

template <class T, int kBits>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(const LutWeight weight, T* out, bool vector_stores) {
  constexpr int kEntries = 1 << kBits;
  // A run is kBits bytes that start on a byte: at most so many words.
  constexpr int kRunWords = kBits % 4 == 0 ? kBits / 4 : (kBits * kRun + 24 + 31) / 32;
  __shared__ T table[kEntries];
  const int row = blockIdx.y + gridDim.y * blockIdx.z;
  if (row >= weight.out_features) return;
  const int in_features = weight.in_features;
  const uint32_t* words = weight.qweight + row * weight.words_per_row;
  T* out_row = out + int64_t{row} * in_features;
  const int64_t block_begin = int64_t{blockIdx.x} * kBlockWeights;

  // All loads first, the table's among them.
  uint32_t runs[kRunsPerThread][kRunWords + 1];
#pragma unroll
  for (int r = 0; r < kRunsPerThread; ++r) {
    const int64_t first_word = (block_begin + (r * kThreads + threadIdx.x) * kRun) * kBits / 32;
#pragma unroll
    for (int i = 0; i < kRunWords; ++i)
      runs[r][i] = first_word + i < weight.words_per_row ? __ldg(words + first_word + i) : 0;
    runs[r][kRunWords] = 0;
  }
  for (int i = threadIdx.x; i < kEntries; i += kThreads)
    table[i] = from_float<T>(load_float(weight.lookup_table, weight.table_dtype, int64_t{row} * kEntries + i));
  __syncthreads();

#pragma unroll
  for (int r = 0; r < kRunsPerThread; ++r) {
    const int64_t begin = block_begin + (r * kThreads + threadIdx.x) * kRun;
    if (begin >= in_features) break;
    uint32_t (&run)[kRunWords + 1] = runs[r];
    const uint32_t offset = begin * kBits % 32;
#pragma unroll
    for (int i = 0; i < kRunWords; ++i) run[i] = __funnelshift_r(run[i], run[i + 1], offset);
    __align__(16) T values[kRun];
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const int word = i * kBits / 32;
      const uint32_t bits = __funnelshift_r(run[word], run[word + 1], i * kBits % 32);
      values[i] = table[bits & (kEntries - 1)];
    }
    if (vector_stores && begin + kRun <= in_features) {
      uint4* target = reinterpret_cast<uint4*>(out_row + begin);
#pragma unroll
      for (int i = 0; i < static_cast<int>(sizeof(values) / sizeof(uint4)); ++i)
        target[i] = reinterpret_cast<const uint4*>(values)[i];
    } else {
#pragma unroll
      for (int i = 0; i < kRun; ++i)
        if (begin + i < in_features) out_row[begin + i] = values[i];
    }
  }
  if (weight.crow_indices == nullptr) return;
  __syncthreads();
  add_sparse_entries<T, kBits>(weight, row, sparse_row(weight, row), block_begin, out_row);
}

// For widths whose tables fit registers, and aligned rows.
template <class T, int kBits>
cudaError_t launch_by_permutes(const DequantizeCall& call) {
  using namespace permutes;
  const LutWeight& weight = call.weight;
  const int segments = (weight.in_features + kSegment - 1) / kSegment;
  const int64_t warps = int64_t{weight.out_features} * segments;
  Ahead ahead{};
  ahead.rows = std::max(1, kAheadSegments / segments);
  ahead.entries = weight.nnz * ahead.rows / weight.out_features;
  const auto blocks = static_cast<unsigned>((warps + kWarps - 1) / kWarps);
  dequantize_by_permutes_kernel<T, kBits>
      <<<blocks, kWarps * kWarpLanes, 0, call.stream>>>(weight, static_cast<T*>(call.out), segments, ahead);
  return cudaGetLastError();
}

template <class T, int kBits>
cudaError_t launch(const DequantizeCall& call) {
  constexpr int kMaxY = 65535;
  const int rows = call.weight.out_features;
  const int y = rows < kMaxY ? rows : kMaxY;
  const dim3 grid((call.weight.in_features + int64_t{kBlockWeights} - 1) / kBlockWeights, y, (rows + y - 1) / y);
  const bool vector_stores =
      reinterpret_cast<uintptr_t>(call.out) % 16 == 0 && call.weight.in_features * int64_t{sizeof(T)} % 16 == 0;
  if constexpr (sizeof(T) == 2 && kBits >= 2 && kBits <= 4) {
    if (vector_stores) return launch_by_permutes<T, kBits>(call);
  }
  dequantize_kernel<T, kBits>
      <<<grid, kThreads, 0, call.stream>>>(call.weight, static_cast<T*>(call.out), vector_stores);
  return cudaGetLastError();
}

template <class T>
cudaError_t launch_bits(const DequantizeCall& call) {
  switch (call.weight.bits) {
    case 1:
      return launch<T, 1>(call);
    case 2:
      return launch<T, 2>(call);
    case 3:
      return launch<T, 3>(call);
    case 4:
      return launch<T, 4>(call);
    case 5:
      return launch<T, 5>(call);
    case 6:
      return launch<T, 6>(call);
    case 7:
      return launch<T, 7>(call);
    case 8:
      return launch<T, 8>(call);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t dequantize(const DequantizeCall& call) {
  switch (call.dtype) {
    case DType::kFloat32:
      return launch_bits<float>(call);
    case DType::kBFloat16:
      return launch_bits<__nv_bfloat16>(call);
    default:
      return launch_bits<__half>(call);
  }
}

}  // namespace squeezellm_hf::cuda
