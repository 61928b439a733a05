// Copies of two-dimensional tiles to shared memory by the bulk-copy engine of compute capability 9.0, and
// thread-block clusters. A tensor map says what the tensor is and how its tiles lie in shared memory.
#pragma once

#include <cuda.h>

#include "bulk_copy.cuh"

namespace squeezellm_hf::cuda {

// A matrix of `rows` rows, `row_bytes` (a multiple of 16) apart, and its tiles; what a tile has
// beyond the matrix becomes zeros.
struct TiledMatrix {
  CUtensorMapDataType type;
  const void* data;
  uint64_t columns;
  uint64_t rows;
  uint64_t row_bytes;
  uint32_t tile_columns;
  uint32_t tile_rows;
  CUtensorMapSwizzle swizzle;
};

// The driver's function, found at run time: the library is not linked against the driver.
inline cudaError_t make_tensor_map(const TiledMatrix& matrix, CUtensorMap& map) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
    cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  if (encode == nullptr) return cudaErrorNotSupported;
  const cuuint64_t sizes[] = {matrix.columns, matrix.rows};
  const cuuint64_t strides[] = {matrix.row_bytes};
  const cuuint32_t tile[] = {matrix.tile_columns, matrix.tile_rows};
  const cuuint32_t steps[] = {1, 1};
  const CUresult result = encode(&map, matrix.type, 2, const_cast<void*>(matrix.data), sizes, strides, tile, steps,
                                 CU_TENSOR_MAP_INTERLEAVE_NONE, matrix.swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                 CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

// arrive() at a barrier whose address in shared memory is at hand.
__device__ __forceinline__ void arrive_at(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void prefetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Copies the tile that starts at `column` and `row`, and counts its bytes (zeros too) off `barrier`.
__device__ __forceinline__ void copy_tile(void* target, const CUtensorMap& map, int column, int row,
                                          uint64_t& barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
          "r"(shared_address(target)),
      "l"(&map), "r"(column), "r"(row), "r"(shared_address(&barrier))
      : "memory");
}

// The same of what no other block reads, as each weight of a small batch: L2 gives it up first. It is not to displace
// what the next kernels need, their instructions foremost.
__device__ __forceinline__ void copy_tile_once(void* target, const CUtensorMap& map, int column, int row,
                                               uint64_t& barrier) {
  asm volatile(
      "{.reg .b64 policy;\n"
      "createpolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%2, %3}], [%4], policy;}" ::"r"(shared_address(target)),
      "l"(&map), "r"(column), "r"(row), "r"(shared_address(&barrier))
      : "memory");
}

__device__ __forceinline__ int cluster_rank() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ int cluster_size() {
  int size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

// For a kernel launched while the one before it in the stream still ran: returns when that is done and
// its writes can be seen, and lets the next one come as early.
__device__ __forceinline__ void wait_for_last_kernel() {
  asm volatile("griddepcontrol.wait;\ngriddepcontrol.launch_dependents;" ::: "memory");
}

// All threads of the cluster's blocks that have not ended.
__device__ __forceinline__ void synchronize_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Its two halves, for what fence_barriers() is of: the second one waits until all have come by the first one.
__device__ __forceinline__ void arrive_in_cluster() { asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory"); }
__device__ __forceinline__ void wait_in_cluster() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

// Shared memory of another block of the cluster, at the address that it has in this one.
__device__ __forceinline__ uint32_t address_in_block(uint32_t address, int rank) {
  uint32_t remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  return remote;
}

__device__ __forceinline__ void store_in_block(uint32_t address, float value) {
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}

// Arrives at another block's barrier, for what this thread stored there.
__device__ __forceinline__ void arrive_in_block(uint32_t barrier) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// wait() for what other blocks stored.
__device__ __forceinline__ void wait_for_cluster(uint64_t& barrier, uint32_t parity) {
  asm volatile(SQUEEZELLM_HF_WAIT(".acquire.cluster")::"r"(shared_address(&barrier)), "r"(parity) : "memory");
}

__device__ __forceinline__ float4 load_from_block(uint32_t address) {
  float4 v;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

#endif

}  // namespace squeezellm_hf::cuda
