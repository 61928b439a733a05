// What the host decides for linear_streamed: how many blocks there are, and how each divides its shared memory.
#pragma once

#include <algorithm>
#include <type_traits>

#include "streamed_layout.cuh"

namespace squeezellm_hf::cuda::streamed {

// Of a block; each takes a kilobyte more than it may use.
template <int kWarps>
int block_memory(const LinearCall& call) {
  constexpr int kReserved = 1024;
  return (call.shared_memory + kReserved) / Duties<kWarps>::kBlocks - kReserved;
}

// Beyond these a row has few ends of tiles to cover, and half of it takes longer than a cluster's start.
constexpr int kManyColumns = 8192;

// Whether two blocks a multiprocessor are faster than one. While one of them ends a tile, or waits for a sparse
// part, the other goes on; but a tile takes each of them twice as long, and the last tiles may leave many idle.
inline bool prefers_narrow(const LinearCall& call, int tiles) {
  const auto rounds = [&](int blocks) { return (tiles + blocks - 1) / blocks; };
  // Of the other's time; measured.
  const int percent = call.weight.crow_indices == nullptr ? 110 : call.weight.bits == 2 ? 125 : 100;
  return call.weight.in_features <= kManyColumns &&
         2 * rounds(2 * call.multiprocessors) * 100 <= rounds(call.multiprocessors) * percent;
}

// The ring is empty where x does not fit.
template <class T, int kBits, int kBatch, int kWarps, bool kPlanes>
Plan make_plan(const LinearCall& call) {
  using U = Unit<kBits>;
  Plan plan{};
  plan.stages = (call.weight.in_features + U::kStageWeights - 1) / U::kStageWeights;
  // Between columns of x: lest the lanes of a load meet in a bank.
  const int64_t x_stride = int64_t{plan.stages} * U::kStageWeights * 2 + (kBatch > 1 ? 128 / kBatch : 0);
  const int64_t used = sizeof(Shared<T, kBits, kBatch, kWarps, kPlanes>) + x_bytes<kBatch, kPlanes>(x_stride);
  const int64_t room = block_memory<kWarps>(call) - (used + 1023) / 1024 * 1024;
  if (room < 0) return plan;
  plan.x_stride = static_cast<int>(x_stride);
  plan.ring = static_cast<int>(room / U::kSlotBytes);
  if (plan.ring > kMaxStages) plan.ring = kMaxStages;
  plan.ring -= plan.ring % Duties<kWarps>::kStageStride;
  return plan;
}

// Of a weight's packed rows, in boxes.
inline cudaError_t map_weight(const LutWeight& weight, CUtensorMap& map) {
  return make_tensor_map({CU_TENSOR_MAP_DATA_TYPE_INT32, weight.qweight, static_cast<uint64_t>(weight.words_per_row),
                          static_cast<uint64_t>(weight.out_features), static_cast<uint64_t>(weight.words_per_row) * 4,
                          kBoxRowBytes / 4, kRows, CU_TENSOR_MAP_SWIZZLE_128B},
                         map);
}

// Whether an odd number of tiles, for each two blocks, is the most that any have (Work).
inline bool shares_tiles(const LinearCall& call, int tiles, int blocks) {
  const int pairs = blocks / 2;
  return call.weight.in_features > kManyColumns && blocks % 2 == 0 && (tiles + pairs - 1) / pairs % 2 == 1;
}

// Launches kernel(plan, call, weights), which goes through `tiles` tiles, to overlap the previous one's end.
template <int kWarps, class Weights>
cudaError_t launch_blocks(void (*kernel)(Plan, LinearCall, Weights), Plan plan, const LinearCall& call,
                          const Weights& weights, int tiles) {
  const int bytes = block_memory<kWarps>(call);
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  const int blocks = call.multiprocessors * Duties<kWarps>::kBlocks;
  plan.pairs = shares_tiles(call, tiles, blocks);
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {2, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = plan.pairs ? 2 * std::min(tiles, blocks / 2) : std::min(tiles, blocks);
  config.blockDim = Duties<kWarps>::kThreads;
  config.dynamicSmemBytes = bytes;
  config.stream = call.stream;
  config.attrs = attributes;
  config.numAttrs = plan.pairs ? 2 : 1;
  return cudaLaunchKernelEx(&config, kernel, plan, call, weights);
}

// Whether 2-bit indices are counted (streamed_planes.cuh): not where few weights do not repay what x costs then, nor on
// devices beyond compute capability 9, to which a product of bits is eight products.
inline bool prefers_planes(const LinearCall& call, int tiles) {
  constexpr int64_t kLeastWeights = int64_t{24} << 20;  // measured
  return call.capability == 9 && int64_t{tiles} * kRows * call.weight.in_features >= kLeastWeights;
}

// Launches kernel_of(looking-up warps, whether they count bits) as suits the call. Whether it was launched: not where
// x does not fit.
template <class T, int kBits, int kBatch, class KernelOf, class Weights>
bool launch_where_x_fits(KernelOf kernel_of, const LinearCall& call, const Weights& weights, int tiles,
                         cudaError_t& error) {
  const auto launch = [&](auto warps, auto planes) {
    const Plan plan = make_plan<T, kBits, kBatch, warps.value, planes.value>(call);
    if (plan.ring < kLeastRing) return false;
    error = launch_blocks<warps.value>(kernel_of(warps, planes), plan, call, weights, tiles);
    return true;
  };
  constexpr std::integral_constant<int, kNarrowBlock> narrow;
  constexpr std::integral_constant<int, kWideBlock> wide;
  const auto launch_either = [&](auto planes) {
    // Not with 3 bits, nor with several activations; measured.
    if constexpr (kBits != 3 && kBatch == 1)
      if (prefers_narrow(call, tiles) && launch(narrow, planes)) return true;
    return launch(wide, planes);
  };
  if constexpr (kBits == 2 && kBatch == 1) {
    constexpr std::true_type planes;
    if (prefers_planes(call, tiles) && launch_either(planes)) return true;
  }
  return launch_either(std::false_type{});
}

}  // namespace squeezellm_hf::cuda::streamed
