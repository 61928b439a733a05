// How one block a multiprocessor does all tiles of a call, and what the blocks that share a tile leave in memory.
#pragma once

#include "warpgroup_tile.cuh"

namespace squeezellm_hf::cuda::warpgroup {

// Each block has the same number of whole tiles. Of the tiles that are left, each has a block of its own, its owner.
// Where these are few, the other blocks help: they take the last stages of these tiles, all of the same number. So all
// owners are at the same columns at any time, and all helpers, and what they read of x at the same time leaves the L2
// cache once for several.
struct Schedule {
  int tiles;
  int stages;  // of a tile
  int batch_tiles;
  int blocks;
  int whole;          // tiles of each block
  int rest;           // tiles left
  int helped_stages;  // of each of these; 0 where there are no helpers

  // Neighbouring tiles share rows of W: all but one find them in the L2 cache.
  __host__ __device__ int row_tile(int tile) const { return tile / batch_tiles; }
  __host__ __device__ int batch_tile(int tile) const { return tile % batch_tiles; }
  __host__ __device__ int helpers() const { return blocks - rest; }
  __host__ __device__ int parts() const { return helped_stages > 0 ? rest : 0; }
};

constexpr int kFlags = 8;  // of a part: one a warp that multiplies

// Of the flags, which lie before the parts' sums.
__host__ __device__ constexpr int64_t flag_bytes(int parts) { return (int64_t{parts} * kFlags * 4 + 127) / 128 * 128; }

inline int64_t schedule_bytes(const Schedule& schedule, int tile_batch) {
  const int parts = schedule.parts();
  return parts == 0 ? 0 : flag_bytes(parts) + int64_t{parts} * tile_batch * kRows * 4;
}

#ifdef SQUEEZELLM_HF_WGMMA

// Successive stages of a tile.
struct Segment {
  int tile;
  int first_stage;
  int stages;
  int part;  // the number of what its helper takes, if it has one, or -1
};

// What a block does, segment by segment. Helpers are the blocks that start first: an owner waits only for blocks that
// have started when it has, and that wait for none.
class Segments {
 public:
  __device__ __forceinline__ explicit Segments(const Schedule& schedule)
      : schedule_(schedule),
        whole_(blockIdx.x),
        left_(helps() ? blockIdx.x : static_cast<int>(blockIdx.x) - schedule.helpers()) {}

  // Whether what follows whole tiles belongs to other blocks' tiles.
  __device__ __forceinline__ bool helps() const { return static_cast<int>(blockIdx.x) < schedule_.helpers(); }

  __device__ __forceinline__ bool next(Segment& segment) {
    const int first_rest = schedule_.whole * schedule_.blocks;
    if (whole_ < first_rest) {
      segment = {whole_, 0, schedule_.stages, -1};
      whole_ += schedule_.blocks;
      return true;
    }
    if (left_ >= (helps() ? schedule_.parts() : schedule_.rest)) return false;
    const int owned = schedule_.stages - schedule_.helped_stages;
    const int part = schedule_.parts() > 0 ? left_ : -1;
    segment = helps() ? Segment{first_rest + left_, owned, schedule_.helped_stages, part}
                      : Segment{first_rest + left_, 0, owned, part};
    left_ += helps() ? schedule_.helpers() : schedule_.rest;
    return true;
  }

 private:
  const Schedule& schedule_;
  int whole_;
  int left_;  // of the tiles left
};

// The same, stage by stage.
class Stages {
 public:
  __device__ __forceinline__ explicit Stages(const Schedule& schedule) : segments_(schedule) {}

  __device__ __forceinline__ bool next() {
    if (++done_ < segment_.stages) return true;
    done_ = 0;
    return segments_.next(segment_);
  }
  __device__ __forceinline__ int tile() const { return segment_.tile; }
  __device__ __forceinline__ int stage() const { return segment_.first_stage + done_; }
  __device__ __forceinline__ bool first() const { return done_ == 0; }

 private:
  Segments segments_;
  Segment segment_{};
  int done_ = 0;
};

#endif

}  // namespace squeezellm_hf::cuda::warpgroup
