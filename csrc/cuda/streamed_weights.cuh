// What linear_streamed multiplies x with: one weight, or a few.
//
// Of several, the tiles are numbered one weight after the other, and a block goes through them as through those of
// one. Kernels are compiled for either: with one weight nothing is looked for.
#pragma once

#include <climits>

#include "streamed_layout.cuh"

namespace squeezellm_hf::cuda::streamed {

__host__ __device__ constexpr int tiles_of(int out_features) { return (out_features + kRows - 1) / kRows; }

// What each weight of a group has of its own, as the kernel gets it: in constant memory. All else is as the first
// one's call has it.
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
    int first_tile = INT_MAX;  // beyond the group
  };
  CUtensorMap maps[kMostGrouped];
  Own weights[kMostGrouped];
  int tiles;
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

// Where a tile lies: in which weight, and the first of its rows there.
struct Tile {
  int weight;
  int row;
};

struct OneWeight {
  const LinearCall& call;
  const CUtensorMap& only_map;

  __device__ int tiles() const { return tiles_of(call.weight.out_features); }
  __device__ Tile tile(int number) const { return {0, number * kRows}; }
  __device__ const LutWeight& weight(int) const { return call.weight; }
  __device__ const CUtensorMap& map(int) const { return only_map; }
  __device__ const void* bias(int) const { return call.bias; }
  __device__ void* y(int) const { return call.y; }
  __device__ void prefetch_maps(int lane) const {
    if (lane == 0) prefetch_map(only_map);
  }
};

struct SeveralWeights {
  const LinearCall& call;  // the first one's
  const Group& group;

  __device__ int tiles() const { return group.tiles; }
  // A number beyond the last tile leads to rows beyond the last weight's.
  __device__ Tile tile(int number) const {
    int weight = 0;
#pragma unroll
    for (int i = 1; i < kMostGrouped; ++i) weight += number >= group.weights[i].first_tile;
    return {weight, (number - group.weights[weight].first_tile) * kRows};
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
  __device__ void prefetch_maps(int lane) const {
    if (lane < kMostGrouped && group.weights[lane].first_tile < group.tiles) prefetch_map(group.maps[lane]);
  }
};

#endif

}  // namespace squeezellm_hf::cuda::streamed
