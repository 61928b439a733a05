// The sparse part of one row. Row pointers and columns come from a file and may lie: pointers are
// clamped to [0, nnz] and entries outside the matrix are left out, so nothing is read or written
// out of bounds.
#pragma once

#include "convert.h"
#include "unroll.h"

namespace squeezellm_hf {

struct SparseRange {
  int64_t begin;
  int64_t end;
};

static inline SparseRange sparse_range(const LutWeight& weight, int64_t row) {
  if (weight.crow_indices == nullptr) return {0, 0};
  int64_t begin = weight.crow_indices[row];
  int64_t end = weight.crow_indices[row + 1];
  begin = begin < 0 ? 0 : begin;
  end = end > weight.nnz ? weight.nnz : end;
  return {begin, end};  // empty where begin >= end
}

// Calls visit(slot, column, value) for the row's entries that lie inside the matrix. `slot` counts
// 0, 1, 2, 3, 0, ... as a compile-time constant, for callers that keep several sums.
template <class Column, class Value, class Visit>
static inline void visit_entries(const LutWeight& weight, SparseRange range, Visit visit) {
  const Column* columns = static_cast<const Column*>(weight.col_indices);
  const Value* values = static_cast<const Value*>(weight.values);
  // A negative int32 column becomes a huge unsigned one.
  const uint64_t in_features = static_cast<uint64_t>(weight.in_features);
  // Two more streams from memory, too slow ones for the hardware prefetcher to follow.
  constexpr int64_t kAhead = 256;
  __builtin_prefetch(columns + range.end + kAhead);
  __builtin_prefetch(values + range.end + kAhead);
  int64_t i = range.begin;
  for (; i + 4 <= range.end; i += 4) {
    unroll<0, 4>([&](auto slot) SQ_INLINE_LAMBDA {
      const uint64_t column = static_cast<uint64_t>(columns[i + slot]);
      if (column < in_features) visit(slot, static_cast<int64_t>(column), to_float(values[i + slot]));
    });
  }
  for (; i < range.end; ++i) {
    const uint64_t column = static_cast<uint64_t>(columns[i]);
    if (column < in_features) visit(Constant<0>{}, static_cast<int64_t>(column), to_float(values[i]));
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

// Index `column` of a packed row of `words` words.
static inline uint32_t packed_index(const uint32_t* row, int64_t words, int bits, int64_t column) {
  const int64_t bit = column * bits;
  const int64_t word = bit >> 5;
  const uint64_t low = row[word];
  const uint64_t high = word + 1 < words ? row[word + 1] : 0;
  return static_cast<uint32_t>((low | high << 32) >> (bit & 31)) & ((1u << bits) - 1);
}

// Adds the sparse part to a decoded row. 16-bit rows are rounded already, so the dense value is
// looked up once more and the sum is rounded once.
static inline void add_sparse(const LutWeight& weight, int64_t row, float* decoded) {
  for_each_entry(weight, row, [=](auto, int64_t column, float value) { decoded[column] += value; });
}

template <class Out>
static inline void add_sparse(const LutWeight& weight, int64_t row, Out* decoded) {
  const uint32_t* words = weight.qweight + row * weight.words_per_row;
  const int64_t table = row << weight.bits;
  for_each_entry(weight, row, [&](auto, int64_t column, float value) {
    const uint32_t index = packed_index(words, weight.words_per_row, weight.bits, column);
    from_float(element(weight.lookup_table, weight.table_dtype, table + index) + value, &decoded[column]);
  });
}

}  // namespace squeezellm_hf
