// What the kernels of compute capability 9.0 for larger batches do: copy tiles of packed indices, take places in
// rings of buffers, and add a cluster's sums on their way to y.
#pragma once

#include <algorithm>

#include "tensor_copy.cuh"
#include "wgmma.cuh"

namespace squeezellm_hf::cuda::warpgroup {

constexpr int kRows = 128;           // of a block
constexpr int kPackedColumns = 128;  // of a tile of packed indices
constexpr int kMostSlices = 8;       // blocks of a portable cluster

template <int kBits>
constexpr int kPackedRowBytes = kPackedColumns * kBits / 8;

inline int divide_up(int a, int b) { return (a + b - 1) / b; }

// The tensor map of packed indices, `rows` rows a tile.
template <int kBits>
cudaError_t make_packed_map(const LutWeight& weight, uint32_t rows, CUtensorMap& map) {
  constexpr auto kSwizzle = kBits == 4   ? CU_TENSOR_MAP_SWIZZLE_64B
                            : kBits == 3 ? CU_TENSOR_MAP_SWIZZLE_NONE
                                         : CU_TENSOR_MAP_SWIZZLE_32B;
  const auto words = static_cast<uint64_t>(weight.words_per_row);
  return make_tensor_map(
      {CU_TENSOR_MAP_DATA_TYPE_UINT32, weight.qweight, words, static_cast<uint64_t>(weight.out_features), words * 4,
       kPackedRowBytes<kBits> / 4, rows, kSwizzle},
      map);
}

// The tensor map of activations: tiles of `lines` lines of 64 columns, as matrix_descriptor wants them.
inline cudaError_t make_x_map(const LinearCall& call, uint32_t lines, CUtensorMap& map) {
  const auto columns = static_cast<uint64_t>(call.weight.in_features);
  return make_tensor_map({CU_TENSOR_MAP_DATA_TYPE_UINT16, call.x, columns, static_cast<uint64_t>(call.batch),
                          columns * 2, 64, lines, CU_TENSOR_MAP_SWIZZLE_128B},
                         map);
}

// Both, of `rows` rows and of `lines` lines a tile.
struct InputMaps {
  CUtensorMap packed;
  CUtensorMap x;
};

template <int kBits>
cudaError_t make_input_maps(const LinearCall& call, uint32_t rows, uint32_t lines, InputMaps& maps) {
  const cudaError_t error = make_packed_map<kBits>(call.weight, rows, maps.packed);
  return error != cudaSuccess ? error : make_x_map(call, lines, maps.x);
}

// Blocks that the device holds at a time in clusters of `slices`, given what 132 multiprocessors (of an H100 or
// H200) hold: the groups in which these are made hold whole clusters only.
inline int held_blocks(const LinearCall& call, int slices, const int (&held)[kMostSlices + 1]) {
  constexpr int kMultiprocessors = 132;
  return std::max(slices, held[slices] * call.multiprocessors / kMultiprocessors);
}

// One block a multiprocessor.
inline int resident_blocks(const LinearCall& call, int slices) {
  return held_blocks(call, slices, {0, 132, 132, 117, 120, 110, 102, 105, 120});
}

// Two blocks a multiprocessor.
inline int resident_pairs(const LinearCall& call, int slices) {
  return held_blocks(call, slices, {0, 264, 264, 234, 240, 220, 204, 224, 240});
}

// Launches a kernel in clusters of `slices` blocks, so that it may start while the one before it ends.
template <class... Parameters, class... Arguments>
cudaError_t launch_clusters(void (*kernel)(Parameters...), int clusters, int slices, int threads, int shared_bytes,
                            cudaStream_t stream, Arguments... arguments) {
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {static_cast<unsigned>(slices), 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(clusters * slices));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

#ifdef SQUEEZELLM_HF_WGMMA

// A place in a ring of buffers: the next one, and the parity of the phase in which it becomes ready.
template <int kSlots>
struct Place {
  int slot = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance(int steps) {  // at most kSlots
    slot += steps;
    if (slot < kSlots) return;
    slot -= kSlots;
    parity ^= 1;
  }
};

// Where the copy engine puts a 16-byte chunk of a row of packed indices: eight rows' chunks in different banks.
template <int kBits>
__device__ __forceinline__ int packed_chunk(int row, int chunk) {
  if constexpr (kBits == 4) return chunk ^ row / 2 % 4;
  if constexpr (kBits == 2) return chunk ^ row / 4 % 2;
  return chunk;
}

// Lays a warpgroup's sums out as [batch][row].
template <int kStride, int kProducts, int kLines>
__device__ __forceinline__ void store_sums(float* target, const float (&sums)[kProducts][kLines][4]) {
  const int lane = threadIdx.x % kWarpLanes;
  const int row = threadIdx.x / kWarpLanes * 16 + lane / 4;
  const int batch = lane % 4 * 2;
#pragma unroll
  for (int n = 0; n < kProducts * kLines; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      target[(n * 8 + batch + i % 2) * kStride + row + i / 2 * 8] = sums[n / kLines][n % kLines][i];
}

// Four neighbouring outputs; `row` is a multiple of 4.
template <class T>
__device__ __forceinline__ void store_outputs(const LinearCall& call, int batch, int row, float4 sum) {
  const int out_features = call.weight.out_features;
  const float sums[4] = {sum.x, sum.y, sum.z, sum.w};
  __align__(8) T values[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const bool biased = call.bias != nullptr && row + i < out_features;
    values[i] = from_float<T>(sums[i] + (biased ? load_float(call.bias, call.bias_dtype, row + i) : 0.0f));
  }
  T* y = static_cast<T*>(call.y) + int64_t{batch} * out_features + row;
  if (out_features % 4 == 0) {
    if (row < out_features) *reinterpret_cast<uint2*>(y) = *reinterpret_cast<const uint2*>(values);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (row + i < out_features) y[i] = values[i];
  }
}

// A block's share of the outputs: the sums of all blocks of the cluster, in their order, each as [batch][row] with
// Tile::kSumStride between lines.
template <class Tile, int kTileRows = kRows>
__device__ __forceinline__ void add_slices(const LinearCall& call, const float* sums, int first_row, int first_batch) {
  constexpr int kRowQuads = kTileRows / 4;
  const int slices = cluster_size();
  const int lines = min(Tile::kBatch, call.batch - first_batch);
  const uint32_t own = shared_address(sums);
  for (int i = cluster_rank() * Tile::kProductThreads + threadIdx.x; i < lines * kRowQuads;
       i += slices * Tile::kProductThreads) {
    const int line = i / kRowQuads;
    const int tile_row = i % kRowQuads * 4;
    const uint32_t address = own + (line * Tile::kSumStride + tile_row) * sizeof(float);
    float4 loaded[kMostSlices];
#pragma unroll
    for (int s = 0; s < kMostSlices; ++s)
      if (s < slices) loaded[s] = load_from_block(address_in_block(address, s));
    float4 sum = {0, 0, 0, 0};
#pragma unroll
    for (int s = 0; s < kMostSlices; ++s)
      if (s < slices) sum.x += loaded[s].x, sum.y += loaded[s].y, sum.z += loaded[s].z, sum.w += loaded[s].w;
    store_outputs<typename Tile::T>(call, first_batch + line, first_row + tile_row, sum);
  }
}

#endif

}  // namespace squeezellm_hf::cuda::warpgroup
