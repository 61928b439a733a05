// y = x W^T for small batches on compute capability 9.0: the weights stream through shared memory.
//
// One block a multiprocessor, or two smaller ones, whose warps have duties of their own:
//  - most turn indices into values and multiply, a unit of the columns of 16 rows at a time (streamed_dense.cuh).
//    Two neighbouring indices select one 32-bit entry of a table of all pairs of the row's values. Of many 2-bit
//    weights and one activation, bits are counted instead (streamed_planes.cuh);
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

template <class T, int kBits, int kBatch, int kWarps, bool kPlanes>
__global__ void __launch_bounds__(Duties<kWarps>::kThreads, Duties<kWarps>::kBlocks)
    streamed_kernel(const Plan plan, const LinearCall call, const __grid_constant__ CUtensorMap weights) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  extern __shared__ __align__(1024) unsigned char memory[];
  run_block<T, kBits, kBatch, kWarps, kPlanes>(memory, OneWeight{call, weights}, plan);
#endif
}

template <class T, int kBits, int kBatch>
cudaError_t launch(const LinearCall& call) {
  CUtensorMap weights;
  cudaError_t error = map_weight(call.weight, weights);
  if (error != cudaSuccess) return error;
  const auto kernel_of = [](auto warps, auto planes) {
    return streamed_kernel<T, kBits, kBatch, warps.value, planes.value>;
  };
  const bool fits =
      launch_where_x_fits<T, kBits, kBatch>(kernel_of, call, weights, tiles_of(call.weight.out_features), error);
  return fits ? error : linear_small_batch(call);
}

// run(the batch that a kernel is compiled for).
template <class Run>
auto with_batch(int batch, const Run& run) {
  if (batch == 1) return run(std::integral_constant<int, 1>{});
  if (batch == 2) return run(std::integral_constant<int, 2>{});
  if (batch <= 4) return run(std::integral_constant<int, 4>{});
  return run(std::integral_constant<int, 8>{});
}

}  // namespace
}  // namespace streamed

bool can_stream(int capability) {
  const auto is_compiled = [] {
    cudaFuncAttributes attributes;
    const auto kernel = streamed::streamed_kernel<__half, 4, 1, streamed::kWideBlock, false>;
    return cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90;
  };
  // Later devices run other code of the library than those of 9.0.
  if (capability == 9) {
    static const bool compiled = is_compiled();
    return compiled;
  }
  static const bool compiled_for_later = is_compiled();
  return compiled_for_later;
}

bool fits_streamed(const LinearCall& call) {
  bool fits = false;
  const cudaError_t error = dispatch(call, [&](auto type, auto bits) {
    using T = typename decltype(type)::Type;
    fits = streamed::with_batch(call.batch, [&](auto batch) {
      return streamed::make_plan<T, bits.value, batch.value, streamed::kWideBlock, false>(call).ring >=
             streamed::kLeastRing;
    });
    return cudaSuccess;
  });
  return error == cudaSuccess && fits;
}

cudaError_t linear_streamed(const LinearCall& call) {
  return dispatch(call, [&](auto type, auto bits) {
    using T = typename decltype(type)::Type;
    return streamed::with_batch(call.batch,
                                [&](auto batch) { return streamed::launch<T, bits.value, batch.value>(call); });
  });
}

}  // namespace squeezellm_hf::cuda
