// How linear_warpgroup_dense divides a call: the division that takes the least time by a model whose numbers are
// measured on an H200.
#pragma once

#include "persistent_schedule.cuh"

namespace squeezellm_hf::cuda::warpgroup {

struct DensePlan {
  int batch;         // of a tile
  int slices;        // blocks of a cluster, which take a slice of the columns each; none: persistent blocks
  int slice_stages;  // of such a slice
  Schedule schedule;
};

// What a block takes, in nanoseconds: for its first loads and the sums' way to y, and for each stage; by bits (2 to 4),
// alone on a multiprocessor and beside another block.
struct Cost {
  int start;
  int stage;
};
struct TileShape {
  int batch;
  Cost alone[3];
  Cost beside[3];
};
constexpr TileShape kTileShapes[] = {
    {64, {{3510, 620}, {3300, 700}, {3020, 820}}, {{4170, 1110}, {4250, 1300}, {3980, 1470}}},
    {128, {{6200, 660}, {6200, 780}, {6200, 890}}, {}},
    {256, {{8400, 1170}, {8400, 1180}, {8400, 1210}}, {}},
};

// Nanoseconds that `blocks` blocks of `stages` stages take on a device that holds `resident` of them, one each
// multiprocessor: rounds of as many as it holds, then the rest.
inline int64_t time_of(const TileShape& shape, int bits, int64_t blocks, int stages, int resident,
                       int resident_beside) {
  const auto time = [stages](Cost cost) { return int64_t{stages} * cost.stage + cost.start; };
  const int64_t alone = time(shape.alone[bits - 2]);
  if (shape.beside[0].stage == 0) return (blocks + resident - 1) / resident * alone;
  const int64_t beside = time(shape.beside[bits - 2]);
  const int64_t rest = blocks % resident_beside;
  return blocks / resident_beside * beside + (rest == 0 ? 0 : rest <= resident ? alone : beside);
}

// What a persistent block takes: for its start and the last tile's way to y, for each tile before, for each stage, and
// for a part that it leaves to another block or adds to its own.
struct PersistentCost {
  int start;
  int tile;
  int stage[3];  // by bits
  int leave;
  int add;
};
struct PersistentShape {
  int batch;
  PersistentCost cost;
};
constexpr PersistentShape kPersistentShapes[] = {
    {128, {3000, 2000, {740, 840, 960}, 1500, 1500}},
    {256, {3500, 2500, {1300, 1330, 1380}, 2500, 3000}},
};
// Tiles that a helper helps with: of three, the parts cost what they save.
constexpr int kMostRounds = 2;

// The schedule with or without helpers, and its time; INT64_MAX where there is none.
inline int64_t make_schedule(const LinearCall& call, const PersistentShape& shape, bool helped, Schedule& schedule) {
  const PersistentCost& cost = shape.cost;
  const int64_t stage = cost.stage[call.weight.bits - 2];
  const int stages = divide_up(call.weight.in_features, kPackedColumns);
  const int batch_tiles = divide_up(call.batch, shape.batch);
  const int tiles = divide_up(call.weight.out_features, kRows) * batch_tiles;
  const int whole = tiles / call.multiprocessors;
  const int rest = tiles % call.multiprocessors;
  const int places = call.multiprocessors - rest;
  // Blocks with nothing to do are left out.
  const int helpers = whole > 0 ? places : helped ? std::min(places, rest) : 0;
  schedule = {tiles, stages, batch_tiles, rest + helpers, whole, rest, 0};
  const int64_t before = cost.start + whole * stages * stage + (whole - (rest == 0)) * int64_t{cost.tile};
  if (!helped) return before + (rest > 0 ? stages * stage : 0);
  if (rest == 0 || stages == 1) return INT64_MAX;
  const int rounds = divide_up(rest, helpers);
  if (rounds > kMostRounds) return INT64_MAX;
  // Owners and helpers are to end at the same time.
  const int64_t even = (stages * stage - rounds * int64_t{cost.leave}) / (stage * (1 + rounds));
  schedule.helped_stages = static_cast<int>(std::min(std::max(even, int64_t{1}), int64_t{stages - 1}));
  const int64_t owner = (stages - schedule.helped_stages) * stage;
  const int64_t helper = rounds * (schedule.helped_stages * stage + cost.leave);
  return before + std::max(owner, helper) + cost.add;
}

// The division that takes the least time, by that measure.
inline DensePlan make_plan(const LinearCall& call) {
  DensePlan best{};
  int64_t least = INT64_MAX;
  for (const TileShape& shape : kTileShapes) {
    const int64_t tiles = int64_t{divide_up(call.weight.out_features, kRows)} * divide_up(call.batch, shape.batch);
    // With all multiprocessors at work, persistent blocks were never slower.
    for (int slices = shape.batch == 64 ? 1 : 3; slices <= kMostSlices; ++slices) {
      const int slice_stages = divide_up(divide_up(call.weight.in_features, kPackedColumns), slices);
      const int64_t time = time_of(shape, call.weight.bits, tiles * slices, slice_stages, resident_blocks(call, slices),
                                   resident_pairs(call, slices));
      if (time >= least) continue;
      least = time;
      best = {shape.batch, slices, slice_stages, {}};
    }
  }
  for (const PersistentShape& shape : kPersistentShapes)
    for (const bool helped : {false, true}) {
      Schedule schedule;
      const int64_t time = make_schedule(call, shape, helped, schedule);
      if (time >= least) continue;
      least = time;
      best = {shape.batch, 0, 0, schedule};
    }
  return best;
}

}  // namespace squeezellm_hf::cuda::warpgroup
