// y = x W^T for a batch of up to 4: bound by reading the weights, so they are decoded in registers
// and used at once.
//
// A lane owns a run of consecutive weights that is a whole number of words (a unit): 8 weights in a
// word at 4 bits, 16 at 2, 32 weights in 3 words at 3. Step s looks up weight s of every lane's
// unit. That order of the weights is free; x is permuted to it once a call instead:
//   packed_x[block][s][b][lane] = x[b][(block * kLanes + lane) * kWeights + s]
#pragma once

#include "decode.h"
#include "sparse_products.h"

namespace squeezellm_hf {

constexpr static int kMaxSmallBatch = 4;
constexpr static int kMaxSmallBits = 4;

template <int kBits>
struct Unit {
  static constexpr int kWords = 32 % kBits == 0 ? 1 : kBits;
  static constexpr int kWeights = 32 * kWords / kBits;
};

static inline int unit_weights(int bits) { return bits == 3 ? 32 : 32 / bits; }

// Kernels exist for batches of 1, 2 and 4; x is filled up with zero rows.
static inline int64_t kernel_batch(int64_t batch) { return batch <= 2 ? batch : 4; }

template <class Lanes>
struct SmallBatch {
  using Float = typename Lanes::Float;
  using Int = typename Lanes::Int;
  using Products = SparseProducts<Lanes>;
  static constexpr int kLanes = Lanes::kLanes;
  static constexpr int kRowBlock = 24;  // rows whose sparse products are made together

  static bool serves(const LinearCall& call) {
    return call.batch <= kMaxSmallBatch && call.weight.bits <= kMaxSmallBits;
  }

  static int64_t block_weights(const LinearCall& call) { return kLanes * unit_weights(call.weight.bits); }

  static int64_t packed_size(const LinearCall& call) {
    const int64_t block = block_weights(call);
    return (call.weight.in_features + block - 1) / block * block * kernel_batch(call.batch);
  }

  // Packed x, then (for the sparse part) x transposed: [in_features, kernel_batch], and a row of
  // zeros for columns outside the matrix.
  static int64_t workspace_bytes(const LinearCall& call) {
    int64_t size = packed_size(call);
    if (call.weight.crow_indices != nullptr) size += (call.weight.in_features + 1) * kernel_batch(call.batch);
    return size * static_cast<int64_t>(sizeof(float));
  }

  static void pack_activations(const LinearCall& call, int64_t begin, int64_t end) {
    const int64_t n = call.weight.in_features;
    const int64_t batch = kernel_batch(call.batch);
    const int64_t block = block_weights(call);
    const int unit = unit_weights(call.weight.bits);
    float* packed = static_cast<float*>(call.workspace);
    float* transposed = call.weight.crow_indices == nullptr ? nullptr : packed + packed_size(call);
    const int64_t filled = end == call.batch ? batch : end;
    alignas(64) float x[kLanes * 32];
    for (int64_t b = begin; b < filled; ++b) {
      for (int64_t first = 0; first < n; first += block) {
        const int64_t count = b >= call.batch ? 0 : n - first < block ? n - first : block;
        load_floats(call.x, call.dtype, b * n + first, count, x);
        for (int64_t i = count; i < block; ++i) x[i] = 0;
        float* out = packed + first * batch + b * kLanes;
        for (int s = 0; s < unit; ++s)
          for (int lane = 0; lane < kLanes; ++lane) out[s * batch * kLanes + lane] = x[lane * unit + s];
        if (transposed != nullptr)
          for (int64_t i = 0; i < block && first + i < n; ++i) transposed[(first + i) * batch + b] = x[i];
      }
      if (transposed != nullptr) transposed[n * batch + b] = 0;
    }
  }

  static int64_t rows_ahead(const LutWeight& weight, int64_t rows) {
    constexpr int64_t kWords = 2048;
    const int64_t group = rows * weight.words_per_row;
    return group == 0 ? 0 : (kWords + group - 1) / group * rows;
  }

  template <int kBits, int kStep>
  SQ_INLINE Int index(const Int* words) {
    constexpr int word = kStep * kBits / 32;
    constexpr int shift = kStep * kBits % 32;
    Int low = words[word];
    if constexpr (shift > 0) low = Lanes::template shift_right<shift>(low);
    if constexpr (shift + kBits > 32) low = Lanes::bit_or(low, Lanes::template shift_left<32 - shift>(words[word + 1]));
    return low;
  }

  // kRows rows at a time share each load of x, and are as many streams from memory.
  template <int kBits, int kBatch, int kRows>
  static void rows(const LinearCall& call, int64_t first_row, int64_t end, const Products* products = nullptr) {
    using Table = typename Lanes::template Table<kBits>;
    constexpr int kWords = Unit<kBits>::kWords;
    constexpr int kWeights = Unit<kBits>::kWeights;
    constexpr int64_t kBlock = kLanes * kWeights;
    // Enough independent sums to hide the latency of a multiply-add.
    constexpr int kSums = kBatch * kRows >= 8 ? 1 : 2;

    const LutWeight& weight = call.weight;
    const int64_t n = weight.in_features;
    const float* packed = static_cast<const float*>(call.workspace);
    const float* transposed = packed + packed_size(call);

    // Beyond the last row the last one is computed again, and not stored.
    const uint32_t* words[kRows];
    Table table[kRows];
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = first_row + r < end ? first_row + r : end - 1;
      const int64_t entry = (row << kBits) * element_size(weight.table_dtype);
      table[r] = Table(static_cast<const char*>(weight.lookup_table) + entry, weight.table_dtype);
      words[r] = weight.qweight + row * weight.words_per_row;
    }
    // The same place in later rows, some kilobytes ahead: further than the hardware prefetcher sees.
    const int64_t ahead = rows_ahead(weight, kRows) * weight.words_per_row * 4;

    Float sums[kRows][kBatch][kSums];
    for (auto& row : sums)
      for (auto& batch : row)
        for (auto& sum : batch) sum = Lanes::zero();

    int64_t block = 0;
    for (; (block + 1) * kBlock <= n; ++block) {
      Int packed_words[kRows][kWords];
      for (int r = 0; r < kRows; ++r) {
        const uint32_t* from = words[r] + block * kLanes * kWords;
        for (int w = 0; w < kWords; ++w) {
          packed_words[r][w] = Lanes::load_words(from + w * kLanes);
          prefetch(from + w * kLanes, ahead);
        }
        if constexpr (kWords == 3) Lanes::deinterleave(packed_words[r]);
      }
      const float* x = packed + block * kBlock * kBatch;
      unroll<0, kWeights>([&](auto step) SQ_INLINE_LAMBDA {
        constexpr int part = step % Table::kParts;
        Float value[kRows];
        for (int r = 0; r < kRows; ++r)
          value[r] = table[r].template lookup<part>(index<kBits, step - part>(packed_words[r]));
        for (int b = 0; b < kBatch; ++b) {
          const Float xb = Lanes::load(x + (step * kBatch + b) * kLanes);
          for (int r = 0; r < kRows; ++r)
            sums[r][b][step % kSums] = Lanes::multiply_add(value[r], xb, sums[r][b][step % kSums]);
        }
      });
    }
    if (block * kBlock < n) {
      const int rest = static_cast<int>(n - block * kBlock);
      const int64_t n_words = weight.words_per_row - block * kLanes * kWords;
      Int packed_words[kRows][kWords];
      for (int r = 0; r < kRows; ++r) {
        const uint32_t* from = words[r] + block * kLanes * kWords;
        for (int w = 0; w < kWords; ++w)
          packed_words[r][w] = Lanes::load_words(from + w * kLanes, static_cast<int>(n_words) - w * kLanes);
        if constexpr (kWords == 3) Lanes::deinterleave(packed_words[r]);
      }
      const float* x = packed + block * kBlock * kBatch;
      unroll<0, kWeights>([&](auto step) SQ_INLINE_LAMBDA {
        // Lanes past the end of the row count for nothing, even if the table holds infinities.
        const int lanes = (rest - step + kWeights - 1) / kWeights;
        constexpr int part = step % Table::kParts;
        for (int r = 0; r < kRows; ++r) {
          const Float value =
              Lanes::keep(table[r].template lookup<part>(index<kBits, step - part>(packed_words[r])), lanes);
          for (int b = 0; b < kBatch; ++b)
            sums[r][b][step % kSums] =
                Lanes::multiply_add(value, Lanes::load(x + (step * kBatch + b) * kLanes), sums[r][b][step % kSums]);
        }
      });
    }

    for (int r = 0; r < kRows && first_row + r < end; ++r) {
      const int64_t row = first_row + r;
      float y[kBatch];
      for (int b = 0; b < kBatch; ++b) {
        Float sum = sums[r][b][0];
        for (int i = 1; i < kSums; ++i) sum = Lanes::add(sum, sums[r][b][i]);
        if (kBatch == 1 && products != nullptr) sum = products->add(row, sum);
        y[b] = Lanes::reduce_add(sum);
      }
      if (weight.crow_indices != nullptr && products == nullptr) sparse<kBatch>(weight, row, transposed, y);
      const float bias = call.bias == nullptr ? 0 : element(call.bias, call.bias_dtype, row);
      for (int b = 0; b < kBatch && b < call.batch; ++b) {
        y[b] += bias;
        store_floats(&y[b], 1, call.y, call.dtype, b * weight.out_features + row);
      }
    }
  }

  // Not inlined: one copy, so one order of additions, for every caller.
  template <int kBatch>
  __attribute__((noinline)) static void sparse(const LutWeight& weight, int64_t row, const float* x, float* y) {
    float sums[kBatch] = {};
    for_each_entry(weight, row, [&](int64_t column, float value) {
      for (int b = 0; b < kBatch; ++b) sums[b] += value * x[column * kBatch + b];
    });
    for (int b = 0; b < kBatch; ++b) y[b] += sums[b];
  }

  template <int kBits>
  static void rows_of_width(const LinearCall& call, int64_t begin, int64_t end) {
    constexpr int kRows = Lanes::kRegisters >= 32 ? 4 : 2;  // as many sums as registers allow
    switch (kernel_batch(call.batch)) {
      case 1:
        for (int64_t block = begin; block < end; block += kRowBlock) {
          const int64_t block_end = end - block < kRowBlock ? end : block + kRowBlock;
          const float* x = static_cast<const float*>(call.workspace) + packed_size(call);
          const Products products(call.weight, block, block_end, x);
          for (int64_t row = block; row < block_end; row += 4)
            rows<kBits, 1, 4>(call, row, block_end, products.covers() ? &products : nullptr);
        }
        return;
      case 2:
        for (int64_t row = begin; row < end; row += kRows) rows<kBits, 2, kRows>(call, row, end);
        return;
      default:
        for (int64_t row = begin; row < end; row += kRows) rows<kBits, 4, kRows>(call, row, end);
    }
  }

  static void linear_rows(const LinearCall& call, int64_t begin, int64_t end) {
    switch (call.weight.bits) {
      case 1:
        return rows_of_width<1>(call, begin, end);
      case 2:
        return rows_of_width<2>(call, begin, end);
      case 3:
        return rows_of_width<3>(call, begin, end);
      default:
        return rows_of_width<4>(call, begin, end);
    }
  }
};

}  // namespace squeezellm_hf
