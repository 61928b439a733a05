// What linear_streamed multiplies x with: one weight, or a few.
//
// Of several, the tiles are numbered one weight after the other, and a block goes through them as through those of
// one. Kernels are compiled for either: with one weight nothing is looked for, and nothing else done.
#pragma once

#include <climits>
#include <cstddef>

#include "streamed_work.cuh"

namespace squeezellm_hf::cuda::streamed {

__host__ __device__ constexpr int tiles_of(int out_features) { return (out_features + kRows - 1) / kRows; }

// What each weight of a group has of its own, as the kernel gets it: in constant memory. All else is as the first
// one's call has it. A launch finds none of it in the caches, and each line of them takes its turn: what all warps
// begin with is in one of 64 bytes.
struct Group {
  struct Own {
    const void* lookup_table;
    const int32_t* crow_indices;
    const void* col_indices;
    const void* values;
    const void* bias;
    void* y;
    int64_t nnz;
    int out_features;
  };
  Fusion fusion;
  int tiles;
  int first_tile[kMostGrouped - 1] = {INT_MAX, INT_MAX, INT_MAX};  // of all but the first; beyond the group
  CUtensorMap maps[kMostGrouped];
  Own weights[kMostGrouped];
};
static_assert(offsetof(Group, first_tile) + sizeof(Group::first_tile) <= 64 && alignof(Group) >= 64);

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

// Where a tile lies: in which weight, and the first of its rows there.
struct Tile {
  int weight;
  int row;
};

struct OneWeight {
  static constexpr bool kFuses = false;
  const LinearCall& call;
  const CUtensorMap& only_map;

  __device__ int tiles() const { return tiles_of(call.weight.out_features); }
  __device__ Tile tile(int number) const { return {0, number * kRows}; }
  __device__ const LutWeight& weight(int) const { return call.weight; }
  __device__ const CUtensorMap& map(int) const { return only_map; }
  __device__ const void* bias(int) const { return call.bias; }
  __device__ void* y(int) const { return call.y; }
  __device__ bool has_silu(int) const { return false; }
  __device__ const void* residual() const { return nullptr; }
  __device__ void prefetch_maps(int lane) const {
    if (lane == 0) prefetch_map(only_map);
  }
};

struct SeveralWeights {
  static constexpr bool kFuses = true;
  const LinearCall& call;  // the first one's
  const Group& group;

  __device__ int tiles() const { return group.tiles; }
  // A number beyond the last tile leads to rows beyond the last weight's.
  __device__ Tile tile(int number) const {
    int weight = 0;
    int first = 0;
#pragma unroll
    for (int i = 0; i + 1 < kMostGrouped; ++i)
      if (number >= group.first_tile[i]) weight = i + 1, first = group.first_tile[i];
    return {weight, (number - first) * kRows};
  }
  __device__ LutWeight weight(int index) const {
    const Group::Own& own = group.weights[index];
    LutWeight weight = call.weight;
    weight.lookup_table = own.lookup_table;
    weight.crow_indices = own.crow_indices;
    weight.col_indices = own.col_indices;
    weight.values = own.values;
    weight.nnz = own.nnz;
    weight.out_features = own.out_features;
    return weight;
  }
  __device__ const CUtensorMap& map(int weight) const { return group.maps[weight]; }
  __device__ const void* bias(int weight) const { return group.weights[weight].bias; }
  __device__ void* y(int weight) const { return group.weights[weight].y; }
  __device__ bool has_silu(int weight) const { return weight == group.fusion.silu; }
  __device__ const void* residual() const { return group.fusion.residual; }
  __device__ void prefetch_maps(int lane) const {
    if (lane == 0) prefetch_map(group.maps[0]);
#pragma unroll
    for (int i = 0; i + 1 < kMostGrouped; ++i)
      if (lane == 0 && group.first_tile[i] < group.tiles) prefetch_map(group.maps[i + 1]);
  }
};

#endif

}  // namespace squeezellm_hf::cuda::streamed
