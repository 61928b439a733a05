// Sorts the sparse part by pages: a block counts the entries of 64 rows by stage, and puts them there. Their order in a
// page is any: each cell is met once.
#include "sparse_pages.h"
#include "tensor_copy.cuh"

namespace squeezellm_hf::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kLoads = 4;  // of a thread that are on their way together

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

// body(entry, column) for all entries of [begin, end), each by one thread.
template <class Body>
__device__ __forceinline__ void for_each_entry(const LutWeight& weight, int begin, int end, const Body& body) {
  for (int64_t first = int64_t{begin} + threadIdx.x; first < end; first += kLoads * kThreads) {
    int columns[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
      if (first + i * kThreads < end) columns[i] = sparse_column(weight, first + i * kThreads);
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
      if (first + i * kThreads < end) body(static_cast<int>(first + i * kThreads), columns[i]);
  }
}

// By one warp: each of `counts` becomes `begin` and the sum of those before it.
__device__ __forceinline__ void add_counts(int* counts, int stages, int begin) {
  const int lane = threadIdx.x % kWarpLanes;
  for (int first = 0; first < stages; first += kWarpLanes) {
    const int own = first + lane < stages ? counts[first + lane] : 0;
    int sum = own;
#pragma unroll
    for (int distance = 1; distance < kWarpLanes; distance *= 2) {
      const int before = __shfl_up_sync(0xffffffff, sum, distance);
      if (lane >= distance) sum += before;
    }
    if (first + lane < stages) counts[first + lane] = begin + sum - own;
    begin += __shfl_sync(0xffffffff, sum, kWarpLanes - 1);
  }
}

// The last of the unit's rows that starts at or before the entry.
__device__ __forceinline__ int row_of(const int (&pointers)[kPageRows + 1], int entry) {
  int row = 0;
#pragma unroll
  for (int step = kPageRows / 2; step > 0; step /= 2)
    if (pointers[row + step] <= entry) row += step;
  return row;
}

#endif

template <class T>
__global__ void __launch_bounds__(kThreads) sort_pages_kernel(const LutWeight weight, const SparsePages pages) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  __shared__ int pointers[kPageRows + 1];
  extern __shared__ int places[];  // by stage: how many entries, then where the next one goes
  allow_next_kernel();
  const int thread = threadIdx.x;
  if (thread <= kPageRows) {
    const int row = min(static_cast<int>(blockIdx.x) * kPageRows + thread, weight.out_features);
    pointers[thread] = min(max(weight.crow_indices[row], 0), static_cast<int>(weight.nnz));
  }
  for (int i = thread; i < pages.stages; i += kThreads) places[i] = 0;
  __syncthreads();
  const int begin = pointers[0];
  const int end = max(pointers[kPageRows], begin);
  const int value_bytes = weight.values_dtype == DType::kFloat32 ? 4 : 2;
  for_each_entry(weight, begin, end, [&](int entry, int column) {
    if (entry % kWarpLanes == 0) prefetch_l2(static_cast<const char*>(weight.values) + int64_t{entry} * value_bytes);
    atomicAdd(&places[column / kPageColumns], 1);
  });
  __syncthreads();
  if (thread < kWarpLanes) add_counts(places, pages.stages, begin);
  // The pages may still be those of the kernel before.
  wait_for_previous_kernel();
  __syncthreads();
  int32_t* begins = pages.begins + int64_t{blockIdx.x} * (pages.stages + 1);
  for (int i = thread; i <= pages.stages; i += kThreads) begins[i] = i < pages.stages ? places[i] : end;
  __syncthreads();
  for_each_entry(weight, begin, end, [&](int entry, int column) {
    const float value = load_float(weight.values, weight.values_dtype, entry);
    const T rounded = from_float<T>(value);
    const uint32_t cell = page_cell(row_of(pointers, entry), column % kPageColumns);
    const int place = atomicAdd(&places[column / kPageColumns], 1);
    pages.entries[place] = uint32_t{reinterpret_cast<const uint16_t&>(rounded)} << 16 | cell;
  });
#endif
}

template <class T>
cudaError_t launch(const LinearCall& call) {
  const SparsePages pages = sparse_pages(call);
  if (!can_page(call.weight)) return cudaErrorInvalidValue;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(pages.units));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = pages.stages * sizeof(int);
  config.stream = call.stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, sort_pages_kernel<T>, call.weight, pages);
}

}  // namespace

cudaError_t sort_sparse_pages(const LinearCall& call) {
  return call.dtype == DType::kFloat16 ? launch<__half>(call) : launch<__nv_bfloat16>(call);
}

}  // namespace squeezellm_hf::cuda
