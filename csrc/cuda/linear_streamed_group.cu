// linear_streamed for several weights that share x, in one launch: what a launch takes beside its bytes, some 3 us,
// is paid once, and small matrices fill the multiprocessors together. A block goes through the tiles of all weights
// (streamed_weights.cuh). What stands between one group and the next in a transformer's block (an RMSNorm, the product
// of a gated MLP, a residual) is done on the way (streamed_input.cuh, streamed_sums.cuh): a kernel less, and the next
// group's start overlaps this one's end.
#include "dispatch.h"
#include "streamed_block.cuh"
#include "streamed_plan.cuh"

namespace squeezellm_hf::cuda {
namespace streamed {
namespace {

constexpr int kBatch = 1;

template <class T, int kBits, int kWarps, bool kPlanes>
__global__ void __launch_bounds__(Duties<kWarps>::kThreads, Duties<kWarps>::kBlocks)
    streamed_group_kernel(const Plan plan, const LinearCall call, const __grid_constant__ Group group) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  extern __shared__ __align__(1024) unsigned char memory[];
  run_block<T, kBits, kBatch, kWarps, kPlanes>(memory, SeveralWeights{call, group}, plan);
#endif
}

cudaError_t make_group(const LinearCall* calls, int count, const Fusion& fusion, Group& group) {
  group.fusion = fusion;
  for (int i = 0; i < count; ++i) {
    const LutWeight& weight = calls[i].weight;
    const cudaError_t error = map_weight(weight, group.maps[i]);
    if (error != cudaSuccess) return error;
    group.weights[i] = {weight.lookup_table, weight.crow_indices, weight.col_indices, weight.values,
                        calls[i].bias,       calls[i].y,          weight.nnz,         weight.out_features};
    if (i > 0) group.first_tile[i - 1] = group.tiles;
    group.tiles += tiles_of(weight.out_features);
  }
  return cudaSuccess;
}

// Nothing where x does not fit.
template <class T, int kBits>
cudaError_t launch(const LinearCall& call, const Group& group, bool& launched) {
  const auto kernel_of = [](auto warps, auto planes) {
    return streamed_group_kernel<T, kBits, warps.value, planes.value>;
  };
  cudaError_t error = cudaSuccess;
  launched = launch_where_x_fits<T, kBits, kBatch>(kernel_of, call, group, group.tiles, error);
  return error;
}

bool is_vector(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// How tables are read is decided once for the group.
bool has_vector_tables(const LutWeight& weight) {
  return weight.table_dtype == DType::kFloat32 || is_vector(weight.lookup_table);
}

}  // namespace
}  // namespace streamed

bool can_stream_group(const LinearCall* calls, int count, const Fusion& fusion) {
  const int least = fusion.is_none() ? 2 : 1;
  if (count < least || count > kMostGrouped || calls[0].batch != streamed::kBatch) return false;
  if (!streamed::is_vector(fusion.norm_weight) || !streamed::is_vector(fusion.factor)) return false;
  const LinearCall& first = calls[0];
  DType bias_dtype{};
  bool has_bias = false;
  for (int i = 0; i < count; ++i) {
    const LinearCall& call = calls[i];
    const LutWeight& weight = call.weight;
    if (!is_aligned(call) || !streamed::has_vector_tables(weight)) return false;
    if (call.x != first.x || call.batch != first.batch || call.dtype != first.dtype) return false;
    if (weight.bits != first.weight.bits || weight.in_features != first.weight.in_features) return false;
    if (weight.table_dtype != first.weight.table_dtype) return false;
    if ((weight.crow_indices == nullptr) != (first.weight.crow_indices == nullptr)) return false;
    if (weight.values_dtype != first.weight.values_dtype || weight.wide_columns != first.weight.wide_columns)
      return false;
    if (call.bias == nullptr) continue;
    if (has_bias && call.bias_dtype != bias_dtype) return false;
    has_bias = true;
    bias_dtype = call.bias_dtype;
  }
  return true;
}

cudaError_t linear_streamed_group(const LinearCall* calls, int count, const Fusion& fusion, bool& launched) {
  streamed::Group group{};
  launched = false;
  const cudaError_t error = streamed::make_group(calls, count, fusion, group);
  if (error != cudaSuccess) return error;
  LinearCall shared = calls[0];
  for (int i = 0; i < count; ++i)
    if (calls[i].bias != nullptr) shared.bias_dtype = calls[i].bias_dtype;
  return dispatch(shared, [&](auto type, auto bits) {
    return streamed::launch<typename decltype(type)::Type, bits.value>(shared, group, launched);
  });
}

}  // namespace squeezellm_hf::cuda
