// y = x W^T for small batches on compute capability 9.0: the weights stream through shared memory.
//
// One block a multiprocessor, or two smaller ones, whose warps have duties of their own:
//  - most turn indices into values and multiply, a unit of the columns of 16 rows at a time (streamed_dense.cuh).
//    Two neighbouring indices select one 32-bit entry of a table of all pairs of the row's values;
//  - some fill the next tile's tables (streamed_tables.cuh);
//  - one or two multiply the sparse part, add the warps' sums and write y (streamed_sums.cuh, streamed_sparse.cuh);
//  - one thread orders copies of packed rows into a ring of stages.
// They meet on barriers in shared memory only. x stays in shared memory.
#include "dispatch.h"
#include "streamed_block.cuh"
#include "streamed_plan.cuh"

namespace squeezellm_hf::cuda {
namespace streamed {
namespace {

template <class T, int kBits, int kBatch, int kWarps>
__global__ void __launch_bounds__(Duties<kWarps>::kThreads, Duties<kWarps>::kBlocks)
    streamed_kernel(const LinearCall call, const __grid_constant__ CUtensorMap weights, const Plan plan) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  extern __shared__ __align__(1024) unsigned char memory[];
  run_block<T, kBits, kBatch, kWarps>(memory, OneWeight{call, weights}, plan);
#endif
}

template <class T, int kBits, int kBatch, int kWarps>
cudaError_t launch(const LinearCall& call, const Plan& plan, int tiles) {
  CUtensorMap weights;
  const cudaError_t error = map_weight(call.weight, weights);
  if (error != cudaSuccess) return error;
  return launch_blocks<kWarps>(streamed_kernel<T, kBits, kBatch, kWarps>, call, weights, plan, tiles);
}

template <class T, int kBits, int kBatch>
cudaError_t launch(const LinearCall& call) {
  const int tiles = tiles_of(call.weight.out_features);
  if (prefers_narrow(call, tiles)) {
    const Plan narrow = make_plan<T, kBits, kBatch, kNarrowBlock>(call);
    if (narrow.ring >= kLeastRing) return launch<T, kBits, kBatch, kNarrowBlock>(call, narrow, tiles);
  }
  const Plan wide = make_plan<T, kBits, kBatch, kWideBlock>(call);
  if (wide.ring >= kLeastRing) return launch<T, kBits, kBatch, kWideBlock>(call, wide, tiles);
  return linear_small_batch(call);
}

template <class T, int kBits>
cudaError_t launch_batch(const LinearCall& call) {
  if (call.batch == 1) return launch<T, kBits, 1>(call);
  if (call.batch == 2) return launch<T, kBits, 2>(call);
  if (call.batch <= 4) return launch<T, kBits, 4>(call);
  return launch<T, kBits, 8>(call);
}

}  // namespace
}  // namespace streamed

bool can_stream() {
  static const bool compiled = [] {
    cudaFuncAttributes attributes;
    const auto kernel = streamed::streamed_kernel<__half, 4, 1, streamed::kWideBlock>;
    return cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90;
  }();
  return compiled;
}

cudaError_t linear_streamed(const LinearCall& call) {
  return dispatch(call, [&](auto type, auto bits) {
    return streamed::launch_batch<typename decltype(type)::Type, bits.value>(call);
  });
}

}  // namespace squeezellm_hf::cuda
