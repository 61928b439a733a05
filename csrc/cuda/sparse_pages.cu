// Sorts the sparse part by pages. A block has the entries of 64 rows, or those of them that some of the stages have: it
// counts them by stage, puts them in order in shared memory, and writes them from there in one piece. Their order in a
// page is any: each cell is met once.
#include <algorithm>

#include "sparse_pages.h"
#include "tensor_copy.cuh"

namespace squeezellm_hf::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / kWarpLanes;
constexpr uint32_t kAllLanes = 0xffffffff;
// Entries of a thread that are on their way together: when they are counted, and when they are put in order.
constexpr int kCounted = 9;
constexpr int kPlaced = 5;
// Entries that a block has in shared memory. Others go to memory one by one.
constexpr int kGathered = kCounted * kThreads;
constexpr int kMostParts = 8;  // of a unit's stages

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

// The entries of a unit's rows, within [0, nnz) whatever the row pointers say, and a part of its stages.
struct Part {
  uint32_t begin;
  uint32_t end;
  uint32_t last_column;  // of the weight
  int first_stage;
  int stages;

  // Counted from the part's first one; columns are not trusted.
  __device__ __forceinline__ int stage_of(uint32_t column) const {
    return static_cast<int>(min(column, last_column) / kPageColumns) - first_stage;
  }
};

// body(columns), as they are stored.
template <class Body>
__device__ __forceinline__ void with_columns(const LutWeight& weight, const Body& body) {
  if (weight.wide_columns) return body(static_cast<const uint32_t*>(weight.col_indices));
  body(static_cast<const uint16_t*>(weight.col_indices));
}

// body(values), as they are stored.
template <class Body>
__device__ __forceinline__ void with_values(const LutWeight& weight, const Body& body) {
  if (weight.values_dtype == DType::kFloat32) return body(static_cast<const float*>(weight.values));
  if (weight.values_dtype == DType::kFloat16) return body(static_cast<const __half*>(weight.values));
  body(static_cast<const __nv_bfloat16*>(weight.values));
}

// Counts the part's entries by stage, and calls their values into the L2 cache. Returns how many of the thread's lie in
// stages before.
template <class Column>
__device__ __forceinline__ int count_entries(const Column* columns, const char* values, int value_bytes,
                                             const Part& part, int* counts) {
  constexpr int kSectorEntries = 16;  // of 16 bits
  int before = 0;
#pragma unroll 1
  for (uint32_t first = part.begin + threadIdx.x; first < part.end; first += kCounted * kThreads) {
    Column loaded[kCounted];
#pragma unroll
    for (int i = 0; i < kCounted; ++i)
      if (first + i * kThreads < part.end) loaded[i] = columns[first + i * kThreads];
    if (threadIdx.x % kSectorEntries == 0)
#pragma unroll
      for (int i = 0; i < kCounted; ++i)
        if (first + i * kThreads < part.end) prefetch_l2(values + uint64_t{first + i * kThreads} * value_bytes);
#pragma unroll
    for (int i = 0; i < kCounted; ++i) {
      if (first + i * kThreads >= part.end) continue;
      const int stage = part.stage_of(loaded[i]);
      if (stage < 0) {
        ++before;
      } else if (stage < part.stages) {
        atomicAdd(&counts[stage], 1);
      }
    }
  }
  return before;
}

// By all threads of the block: each count becomes the sum of those before it. Returns the sum of all.
__device__ __forceinline__ int add_counts(int* counts, int stages, int (&warp_sums)[kWarps]) {
  const int lane = threadIdx.x % kWarpLanes;
  const int warp = threadIdx.x / kWarpLanes;
  int before = 0;
#pragma unroll 1
  for (int first = 0; first < stages; first += kThreads) {
    const int i = first + threadIdx.x;
    const int own = i < stages ? counts[i] : 0;
    int sum = own;
#pragma unroll
    for (int distance = 1; distance < kWarpLanes; distance *= 2) {
      const int other = __shfl_up_sync(kAllLanes, sum, distance);
      if (lane >= distance) sum += other;
    }
    if (lane == kWarpLanes - 1) warp_sums[warp] = sum;
    __syncthreads();
    const int warp_sum = lane < kWarps ? warp_sums[lane] : 0;
    const int warps_before = __reduce_add_sync(kAllLanes, lane < warp ? warp_sum : 0);
    if (i < stages) counts[i] = before + warps_before + sum - own;
    before += __reduce_add_sync(kAllLanes, warp_sum);
    __syncthreads();
  }
  return before;
}

// The row of each lane's entry of 32 in sequence, all before the unit's end: how many rows end at or before it. A lane
// has the ends of two rows, and looks at those among the 32 entries again.
struct RowFinder {
  const int* ends;  // of 64 rows
  int own;
  int other;

  __device__ __forceinline__ explicit RowFinder(const int* ends)
      : ends(ends), own(ends[threadIdx.x % kWarpLanes]), other(ends[kWarpLanes + threadIdx.x % kWarpLanes]) {}

  __device__ __forceinline__ int ended(int entry) const {
    return __popc(__ballot_sync(kAllLanes, own <= entry)) + __popc(__ballot_sync(kAllLanes, other <= entry));
  }

  __device__ __forceinline__ int find(int first) const {
    int row = ended(first);
    const int last = ended(first + kWarpLanes - 1);
#pragma unroll 1
    for (int i = row; i < last; ++i) row += ends[i] <= first + static_cast<int>(threadIdx.x % kWarpLanes);
    return row;
  }
};

template <class T, class Value>
__device__ __forceinline__ uint32_t bits_as(Value value) {
  T rounded;
  if constexpr (__is_same(T, Value)) {
    rounded = value;
  } else if constexpr (__is_same(Value, float)) {
    rounded = from_float<T>(value);
  } else {
    rounded = from_float<T>(to_float(value));
  }
  return reinterpret_cast<const uint16_t&>(rounded);
}

// Puts the part's entries where `places` has them: those of each stage from there on, of which it is the end then.
template <class T, class Column, class Value>
__device__ __forceinline__ void place_entries(const Column* columns, const Value* values, const Part& part,
                                              const RowFinder& rows, int* places, uint32_t* gathered,
                                              uint32_t first_place, uint32_t* entries) {
  const uint32_t lane = threadIdx.x % kWarpLanes;
#pragma unroll 1
  for (uint32_t first = part.begin + threadIdx.x - lane; first < part.end; first += kPlaced * kThreads) {
    Column loaded[kPlaced];
    Value loaded_values[kPlaced];
#pragma unroll
    for (int i = 0; i < kPlaced; ++i)
      if (const uint32_t entry = first + i * kThreads + lane; entry < part.end) {
        loaded[i] = columns[entry];
        loaded_values[i] = values[entry];
      }
#pragma unroll
    for (int i = 0; i < kPlaced; ++i) {
      const uint32_t warp_first = first + i * kThreads;
      if (warp_first >= part.end) break;
      const int row = rows.find(static_cast<int>(warp_first));
      if (warp_first + lane >= part.end) continue;
      const int stage = part.stage_of(loaded[i]);
      if (stage < 0 || stage >= part.stages) continue;
      const uint32_t cell = page_cell(row, min(uint32_t{loaded[i]}, part.last_column) % kPageColumns);
      const uint32_t word = bits_as<T>(loaded_values[i]) << 16 | cell;
      const int place = atomicAdd(&places[stage], 1);
      if (place < kGathered) {
        gathered[place] = word;
      } else {
        entries[first_place + place] = word;
      }
    }
  }
}

#endif

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kBlocks = 1;  // of a multiprocessor: other devices have no room for two, and run none
#else
constexpr int kBlocks = 2;
#endif

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    sort_pages_kernel(const __grid_constant__ LutWeight weight, const SparsePages pages, int part_stages) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  __shared__ int pointers[kPageRows + 1];
  __shared__ int warp_sums[kWarps];
  __shared__ int before;  // entries in the stages before the part's
  extern __shared__ uint32_t memory[];
  uint32_t* gathered = memory;
  int* places = reinterpret_cast<int*>(memory + kGathered);  // by stage: how many entries, then where the next one goes
  allow_next_kernel();
  const int thread = threadIdx.x;
  const int first_stage = blockIdx.y * part_stages;
  const int stages = min(part_stages, pages.stages - first_stage);
  if (thread <= kPageRows) {
    const int row = min(static_cast<int>(blockIdx.x) * kPageRows + thread, weight.out_features);
    pointers[thread] = min(max(weight.crow_indices[row], 0), static_cast<int>(weight.nnz));
  }
#pragma unroll 1
  for (int i = thread; i < stages; i += kThreads) places[i] = 0;
  if (thread == 0) before = 0;
  __syncthreads();
  const uint32_t begin = pointers[0];
  const Part part{begin, max(static_cast<uint32_t>(pointers[kPageRows]), begin),
                  static_cast<uint32_t>(weight.in_features) - 1, first_stage, stages};
  with_columns(weight, [&](auto columns) {
    const int value_bytes = weight.values_dtype == DType::kFloat32 ? 4 : 2;
    int own = count_entries(columns, static_cast<const char*>(weight.values), value_bytes, part, places);
    own = __reduce_add_sync(kAllLanes, own);
    if (thread % kWarpLanes == 0 && own > 0) atomicAdd(&before, own);
  });
  __syncthreads();
  const int count = add_counts(places, stages, warp_sums);
  const uint32_t first_place = begin + before;
  // Until then the pages may still be those of the kernel before.
  if (count > kGathered) wait_for_previous_kernel();
  const RowFinder rows(pointers + 1);
  with_columns(weight, [&](auto columns) {
    with_values(weight, [&](auto values) {
      place_entries<T>(columns, values, part, rows, places, gathered, first_place, pages.entries);
    });
  });
  wait_for_previous_kernel();
  __syncthreads();
  int32_t* begins = pages.begins + int64_t{blockIdx.x} * (pages.stages + 1);
  if (first_stage == 0 && thread == 0) begins[0] = static_cast<int>(begin);
#pragma unroll 1
  for (int i = thread; i < stages; i += kThreads)
    begins[first_stage + i + 1] = static_cast<int>(first_place) + places[i];
#pragma unroll 4
  for (int i = thread; i < min(count, kGathered); i += kThreads) pages.entries[first_place + i] = gathered[i];
#endif
}

template <class T>
cudaError_t launch(const LinearCall& call) {
  const SparsePages pages = sparse_pages(call);
  if (!can_page(call.weight)) return cudaErrorInvalidValue;
  // Where units are few, several blocks share one: each looks at all columns.
  const int parts = std::min({std::max(call.multiprocessors / pages.units, 1), pages.stages, kMostParts});
  const int part_stages = (pages.stages + parts - 1) / parts;
  const size_t shared_bytes = sizeof(uint32_t) * kGathered + sizeof(int) * part_stages;
  const cudaError_t error = cudaFuncSetAttribute(sort_pages_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                 static_cast<int>(shared_bytes));
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim =
      dim3(static_cast<unsigned>(pages.units), static_cast<unsigned>((pages.stages + part_stages - 1) / part_stages));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = call.stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, sort_pages_kernel<T>, call.weight, pages, part_stages);
}

}  // namespace

cudaError_t sort_sparse_pages(const LinearCall& call) {
  return call.dtype == DType::kFloat16 ? launch<__half>(call) : launch<__nv_bfloat16>(call);
}

}  // namespace squeezellm_hf::cuda
