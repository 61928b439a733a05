// The sparse part in pages: the entries of 64 rows and 128 columns together, for linear_warpgroup_sparse. An entry is a
// word: its cell in the lower half, its value in the dtype of x in the upper one.
#pragma once

#include "weight.h"

namespace squeezellm_hf::cuda {

constexpr int kPageRows = 64;
constexpr int kPageColumns = 128;
constexpr int kPageCells = kPageRows * kPageColumns;

struct SparsePages {
  int32_t* begins;    // [units, stages + 1]: a unit is 64 rows, a stage 128 columns
  uint32_t* entries;  // [nnz]
  int units;
  int stages;
};

inline SparsePages sparse_pages(const LinearCall& call) {
  // A block of linear_warpgroup_sparse has two units of rows.
  const int units = (call.weight.out_features + 2 * kPageRows - 1) / (2 * kPageRows) * 2;
  const int stages = (call.weight.in_features + kPageColumns - 1) / kPageColumns;
  auto* begins = static_cast<int32_t*>(call.pages);
  return {begins, reinterpret_cast<uint32_t*>(begins + int64_t{units} * (stages + 1)), units, stages};
}

// Where a cell lies among those of its page, counted in values: as linear_warpgroup_sparse's threads hold W
// (fragment_table.cuh), [32 columns][warp: 16 rows][16 columns][lane][register][2].
#ifdef __CUDACC__
__host__ __device__
#endif
    constexpr uint32_t page_cell(uint32_t row, uint32_t column) {
  const uint32_t warp = row / 16;
  const uint32_t lane = row % 8 * 4 + column % 8 / 2;
  const uint32_t held = column % 16 / 8 * 2 + row % 16 / 8;
  return ((((column / 32 * 4 + warp) * 2 + column / 16 % 2) * 32 + lane) * 4 + held) * 2 + column % 2;
}

// Writes the pages of a call, whatever its row pointers and columns hold: each of the unit's rows' entries from the
// first one's first to the last one's last is one, and lies within the row.
cudaError_t sort_sparse_pages(const LinearCall& call);

}  // namespace squeezellm_hf::cuda
