// Copies to shared memory by the bulk-copy engine of compute capability 9.0, and the barriers in shared
// memory (mbarrier) on which they and warps of different duties wait for each other.
//
// A barrier's phase ends when all arrivals and all announced bytes are there; phases alternate between
// parity 0 and 1, and a wait returns once the phase of that parity has ended. A barrier before its first
// phase counts as one whose phase of parity 1 has ended.
#pragma once

#include "common.cuh"

namespace squeezellm_hf::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

// True for one lane of a converged warp. The compiler knows that it is one, and then needs no loop over
// lanes around copies, whose operands are the same for a warp.
__device__ __forceinline__ bool elect_lane() {
  uint32_t elected;
  asm volatile("{.reg .pred elected; elect.sync _|elected, 0xffffffff; selp.u32 %0, 1, 0, elected;}" : "=r"(elected));
  return elected != 0;
}

// For kernels launched to overlap the end of the previous one of their stream: lets the next one start
// as blocks end; and waits until all that the previous one wrote is there.
__device__ __forceinline__ void allow_next_kernel() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
__device__ __forceinline__ void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// What the previous kernel may have written while this one ran: not through the read-only path.
__device__ __forceinline__ uint4 load_uncached(const uint4* source) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(source));
  return v;
}

__device__ __forceinline__ unsigned short load_uncached(const unsigned short* source) {
  unsigned short v;
  asm volatile("ld.global.L1::no_allocate.u16 %0, [%1];" : "=h"(v) : "l"(source));
  return v;
}

// Calls `bytes` bytes into the L2 cache; both are multiples of 16.
__device__ __forceinline__ void prefetch_l2(const void* source, uint32_t bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(source), "r"(bytes));
}

// By one thread, before fence_barriers() and a barrier of the block.
__device__ __forceinline__ void initialize_barrier(uint64_t& barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals) : "memory");
}

// Makes initialized barriers visible to the copy engine and to other blocks of the cluster.
__device__ __forceinline__ void fence_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Lanes of a warp that arrive when the warp is done: after __syncwarp() one arrives for all. Racecheck does not follow
// that, and is given all lanes' arrivals.
#ifdef SQUEEZELLM_HF_SANITIZE
constexpr int kArrivingLanes = kWarpLanes;
#else
constexpr int kArrivingLanes = 1;
#endif

__device__ __forceinline__ void arrive(uint64_t& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
}

// After __syncwarp(), for all that the warp's lanes did.
__device__ __forceinline__ void arrive_for_warp(uint64_t& barrier) {
  __syncwarp();
  if (threadIdx.x % kWarpLanes < kArrivingLanes) arrive(barrier);
}

// Arrives and announces bytes that copies will bring in this phase.
__device__ __forceinline__ void arrive_expecting(uint64_t& barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)), "r"(bytes)
               : "memory");
}

// Of a wait for what other threads did before they arrived: those of the block, or of its cluster (".acquire.cluster").
#define SQUEEZELLM_HF_WAIT(scope)         \
  "{.reg .pred done;\n"                   \
  "again: mbarrier.try_wait.parity" scope \
  ".shared::cta.b64 done, [%0], %1;\n"    \
  "@!done bra again;}"

// wait() for a barrier whose address in shared memory is at hand.
__device__ __forceinline__ void wait_at(uint32_t barrier, uint32_t parity) {
  asm volatile(SQUEEZELLM_HF_WAIT("")::"r"(barrier), "r"(parity) : "memory");
}

__device__ __forceinline__ void wait(uint64_t& barrier, uint32_t parity) { wait_at(shared_address(&barrier), parity); }

#endif

// A barrier of `threads` threads of the block (whole warps); id 0 is that of __syncthreads.
__device__ __forceinline__ void synchronize(int id, int threads) {
  asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace squeezellm_hf::cuda
