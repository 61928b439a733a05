// The sparse part of a block of rows for a batch of one.
//
// Rows have some 20 entries: a loop over each row's would end in a mispredicted branch every time,
// which costs as much as the entries. So the products of a whole block of rows are made in one
// loop, and a row's run of them is then added, as whole vectors, to the lanes of its sum.
#pragma once

#include "sparse.h"

namespace squeezellm_hf {

template <class Lanes>
class SparseProducts {
 public:
  using Float = typename Lanes::Float;

  // Products of rows [first_row, end_row) with x, which has a zero behind its last feature.
  SparseProducts(const LutWeight& weight, int64_t first_row, int64_t end_row, const float* x) : weight_(weight) {
    if (weight.crow_indices == nullptr) return;
    begin_ = clamp(weight.crow_indices[first_row], 0, weight.nnz);
    end_ = clamp(weight.crow_indices[end_row], begin_, weight.nnz);
    const int64_t n = end_ - begin_;
    covers_ = n <= kCapacity && !weight.wide_columns && weight.values_dtype != DType::kFloat32;
    if (!covers_) return;

    const uint16_t* columns = static_cast<const uint16_t*>(weight.col_indices) + begin_;
    const uint16_t* values = static_cast<const uint16_t*>(weight.values) + begin_;
    prefetch_behind(columns, columns + n);
    prefetch_behind(values, values + n);
    load_floats(weight.values, weight.values_dtype, begin_, n, products_);
    // Columns outside the matrix meet the zero behind x.
    const uint16_t limit = static_cast<uint16_t>(weight.in_features < 65535 ? weight.in_features : 65535);
    int64_t i = 0;
    // The last vector may take in columns of later rows, but none behind the last entry.
    for (; i < n && begin_ + i + Lanes::kLanes <= weight.nnz; i += Lanes::kLanes) {
      const Float at_columns = Lanes::fetch(x, columns + i, limit);
      Lanes::store(products_ + i, Lanes::multiply(Lanes::load(products_ + i), at_columns));
    }
    for (; i < n; ++i) products_[i] *= x[columns[i] < limit ? columns[i] : limit];
  }

  // False where the rows have too many entries, or a type that is too rare to be worth it here.
  bool covers() const { return covers_; }

  Float add(int64_t row, Float sum) const {
    const int64_t from = clamp(weight_.crow_indices[row], begin_, end_);
    const int64_t to = clamp(weight_.crow_indices[row + 1], from, end_);
    const float* run = products_ + (from - begin_);
    const int n = static_cast<int>(to - from);
    for (int i = 0; i < kUsual; i += Lanes::kLanes) sum = Lanes::add(sum, Lanes::load_first(run + i, n - i));
    for (int i = kUsual; i < n; i += Lanes::kLanes) sum = Lanes::add(sum, Lanes::load_first(run + i, n - i));
    return sum;
  }

 private:
  static constexpr int64_t kCapacity = 4096;
  static constexpr int kUsual = 32;  // entries in a row that are added without a loop

  const LutWeight& weight_;
  int64_t begin_ = 0;
  int64_t end_ = 0;
  bool covers_ = false;
  alignas(64) float products_[kCapacity + kUsual];
};

}  // namespace squeezellm_hf
