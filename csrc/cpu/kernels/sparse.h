// The sparse part of one row. Row pointers and columns come from a file and may lie: pointers are
// clamped to [0, nnz] and entries outside the matrix are left out, so nothing is read or written
// out of bounds.
#pragma once

#include "convert.h"
#include "unroll.h"

namespace squeezellm_hf {

static inline int64_t clamp(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : value > high ? high : value;
}

// Prefetches what lies a little behind [from, to): the entries are two more streams from memory, too
// slow ones for the hardware prefetcher to follow.
SQ_INLINE void prefetch_behind(const void* from, const void* to) {
  const char* end = static_cast<const char*>(to);
  for (const char* line = static_cast<const char*>(from); line < end; line += 64) prefetch(line, 1024);
}

struct SparseRange {
  int64_t begin;
  int64_t end;
};

static inline SparseRange sparse_range(const LutWeight& weight, int64_t row) {
  if (weight.crow_indices == nullptr) return {0, 0};
  const int64_t begin = clamp(weight.crow_indices[row], 0, weight.nnz);
  const int64_t end = clamp(weight.crow_indices[row + 1], 0, weight.nnz);
  return {begin, end};  // empty where begin >= end
}

// Calls visit(column, value) for the row's entries that lie inside the matrix.
template <class Column, class Value, class Visit>
static inline void visit_entries(const LutWeight& weight, SparseRange range, Visit visit) {
  const Column* columns = static_cast<const Column*>(weight.col_indices);
  const Value* values = static_cast<const Value*>(weight.values);
  // A negative int32 column becomes a huge unsigned one.
  const uint64_t in_features = static_cast<uint64_t>(weight.in_features);
  prefetch_behind(columns + range.begin, columns + range.end);
  prefetch_behind(values + range.begin, values + range.end);
  for (int64_t i = range.begin; i < range.end; ++i) {
    const uint64_t column = static_cast<uint64_t>(columns[i]);
    if (column < in_features) visit(static_cast<int64_t>(column), to_float(values[i]));
  }
}

template <class Visit>
static inline void for_each_entry(const LutWeight& weight, int64_t row, Visit visit) {
  const SparseRange range = sparse_range(weight, row);
  if (range.begin >= range.end) return;
  if (weight.wide_columns) {
    switch (weight.values_dtype) {
      case DType::kBFloat16:
        return visit_entries<int32_t, bf16>(weight, range, visit);
      case DType::kFloat16:
        return visit_entries<int32_t, fp16>(weight, range, visit);
      default:
        return visit_entries<int32_t, float>(weight, range, visit);
    }
  }
  switch (weight.values_dtype) {
    case DType::kBFloat16:
      return visit_entries<uint16_t, bf16>(weight, range, visit);
    case DType::kFloat16:
      return visit_entries<uint16_t, fp16>(weight, range, visit);
    default:
      return visit_entries<uint16_t, float>(weight, range, visit);
  }
}

// Adds the sparse part to a decoded row. `bits` is the weight's, given once more because callers
// know it as a constant.
static inline void add_sparse(const LutWeight& weight, int /*bits*/, int64_t row, float* decoded) {
  for_each_entry(weight, row, [=](int64_t column, float value) { decoded[column] += value; });
}

// 16-bit rows are rounded already, so the dense value is looked up once more and the sum is rounded
// once.
template <class Out>
static inline void add_sparse(const LutWeight& weight, int bits, int64_t row, Out* decoded) {
  const SparseRange range = sparse_range(weight, row);
  if (range.begin >= range.end) return;
  float table[256];
  load_floats(weight.lookup_table, weight.table_dtype, row << bits, int64_t{1} << bits, table);
  const uint8_t* bytes = reinterpret_cast<const uint8_t*>(weight.qweight + row * weight.words_per_row);
  const int64_t last = weight.words_per_row * 4 - 2;
  const uint32_t mask = (1u << bits) - 1;
  for_each_entry(weight, row, [=, &table](int64_t column, float value) {
    const int64_t bit = column * bits;
    // Two bytes hold any index; the last two bytes of the row are the last that may be read.
    const int64_t byte = (bit >> 3) < last ? bit >> 3 : last;
    const uint32_t pair = bytes[byte] | uint32_t{bytes[byte + 1]} << 8;
    from_float(table[pair >> (bit - 8 * byte) & mask] + value, &decoded[column]);
  });
}

}  // namespace squeezellm_hf
