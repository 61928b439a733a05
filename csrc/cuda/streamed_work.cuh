// Which tiles a block of linear_streamed goes through.
#pragma once

#include "streamed_layout.cuh"

namespace squeezellm_hf::cuda::streamed {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

// A block's tiles: every step-th. Tiles that are one too many for the blocks to have as many each would leave most of
// them idle for as long as one takes. So two blocks, a cluster, go through tiles together: of an odd number they begin
// with one of which each has half of the columns, and what the second one sums up goes to the first one.
struct Work {
  int tiles;
  bool halved;  // the first tile
  bool second;  // of its cluster

  __device__ Work(int all_tiles, const Plan& plan) : stages_(plan.stages) {
    const int sharing = plan.pairs ? 2 : 1;
    const int cluster = blockIdx.x / sharing;
    const int clusters = gridDim.x / sharing;
    const int rank = blockIdx.x % sharing;
    const int together = (all_tiles - cluster + clusters - 1) / clusters;
    second = rank == 1;
    halved = together % sharing == 1;
    least_ = cluster;
    first_ = cluster + (rank - halved) * clusters;
    step_ = sharing * clusters;
    tiles = (together + sharing - 1) / sharing;
  }
  // Beyond the last of these counts, one beyond all tiles.
  __device__ int tile(int count) const { return max(first_ + count * step_, least_); }
  // Of a tile's stages, those that are the block's.
  __device__ int first_stage(int count) const { return halved && second && count == 0 ? half() : 0; }
  __device__ int end_stage(int count) const { return halved && !second && count == 0 ? half() : stages_; }
  __device__ int all_stages() const { return tiles * stages_ - (halved ? second ? half() : stages_ - half() : 0); }

 private:
  __device__ int half() const { return (stages_ + 1) / 2; }

  int least_;
  int first_;
  int step_;
  int stages_;
};

#endif

}  // namespace squeezellm_hf::cuda::streamed
