// Decoding a packed row to floats in their natural order, for any lanes.
//
// 32 weights are exactly `bits` words. Each lane fetches the word its index starts in and, where
// widths straddle words, the next one (two permutes with constant indices), shifts its index down
// and looks it up. `Lanes` says how: 8 or 16 lanes of 32 bits give fp32, 32 lanes of 16 bits give
// bf16 or fp16 directly, because a table look-up moves bit patterns only.
#pragma once

#include "sparse.h"
#include "unroll.h"

namespace squeezellm_hf {

// Where lane i of 32 finds index i: units are the lane's own width.
template <class Lanes, int kBits>
struct Spread {
  static constexpr int kUnit = Lanes::kLaneBits;
  static constexpr bool kStraddles = kUnit % kBits != 0;
  typename Lanes::Index low[32];
  typename Lanes::Index high[32];
  typename Lanes::Index right[32];
  typename Lanes::Index left[32];

  constexpr Spread() : low(), high(), right(), left() {
    for (int i = 0; i < 32; ++i) {
      const int bit = i * kBits;
      const int last = 32 * kBits / kUnit - 1;
      low[i] = static_cast<typename Lanes::Index>(bit / kUnit);
      high[i] = static_cast<typename Lanes::Index>(bit / kUnit < last ? bit / kUnit + 1 : last);
      right[i] = static_cast<typename Lanes::Index>(bit % kUnit);
      left[i] = static_cast<typename Lanes::Index>(kUnit - bit % kUnit);  // kUnit shifts all out
    }
  }
};

template <class Lanes, int kBits>
alignas(64) static constexpr Spread<Lanes, kBits> kSpread{};

// Stores 32 weights. Lanes::load_words reads `words` words and no byte more.
template <class Lanes, int kBits>
SQ_INLINE void decode_group(const uint32_t* words, int n_words, const typename Lanes::template Table<kBits>& table,
                            typename Lanes::Element* out) {
  const auto packed = Lanes::load_words(words, n_words);
  constexpr const auto& spread = kSpread<Lanes, kBits>;
  unroll<0, 32 / Lanes::kLanes>([&](auto part) SQ_INLINE_LAMBDA {
    constexpr int first = part * Lanes::kLanes;
    auto index = Lanes::shift_right(Lanes::permute(packed, Lanes::load_index(spread.low + first)),
                                    Lanes::load_index(spread.right + first));
    if constexpr (Spread<Lanes, kBits>::kStraddles)
      index = Lanes::bit_or(index, Lanes::shift_left(Lanes::permute(packed, Lanes::load_index(spread.high + first)),
                                                     Lanes::load_index(spread.left + first)));
    Lanes::store(out + first, table.lookup(index));
  });
}

// Decodes n weights from `words` on. The same place `ahead` bytes further on is prefetched.
template <class Lanes, int kBits>
static void decode_words(const uint32_t* words, int64_t n, int64_t ahead,
                         const typename Lanes::template Table<kBits>& table, typename Lanes::Element* out) {
  int64_t i = 0;
  for (; i + 32 <= n; i += 32, words += kBits) {
    prefetch(words, ahead);
    decode_group<Lanes, kBits>(words, kBits, table, out + i);
  }
  if (i < n) {
    typename Lanes::Element last[32];
    const int rest = static_cast<int>(n - i);
    decode_group<Lanes, kBits>(words, (rest * kBits + 31) / 32, table, last);
    for (int j = 0; j < rest; ++j) out[i + j] = last[j];
  }
}

// One row in its natural order, dense and sparse, as fp32, bf16 or fp16. `Narrow` are the 16-bit lanes of the
// instruction set, or void.
template <class Wide, class Narrow, int kBits, class Out>
static void decode_row_bits(const LutWeight& weight, int64_t row, int64_t rows_ahead, Out* out) {
  const uint32_t* words = weight.qweight + row * weight.words_per_row;
  const void* entries =
      static_cast<const char*>(weight.lookup_table) + (row << kBits) * element_size(weight.table_dtype);
  const int64_t n = weight.in_features;
  const int64_t ahead = rows_ahead * weight.words_per_row * 4;
  if constexpr (sizeof(Out) == 4) {
    const typename Wide::template Table<kBits> table(entries, weight.table_dtype);
    decode_words<Wide, kBits>(words, n, ahead, table, out);
  } else if constexpr (!same<Narrow, void> && kBits <= 6) {
    const typename Narrow::template Table<kBits> table(entries, weight.table_dtype, Out{});
    decode_words<Narrow, kBits>(words, n, ahead, table, &out->bits);
  } else {
    const typename Wide::template Table<kBits> table(entries, weight.table_dtype);
    constexpr int64_t kChunk = 512;
    alignas(64) float chunk[kChunk];
    for (int64_t i = 0; i < n; i += kChunk) {
      const int64_t count = n - i < kChunk ? n - i : kChunk;
      decode_words<Wide, kBits>(words + i / 32 * kBits, count, ahead, table, chunk);
      from_floats(chunk, count, out + i);
    }
  }
  add_sparse(weight, kBits, row, out);
}

template <class Wide, class Narrow, class Out>
static void decode_row(const LutWeight& weight, int64_t row, int64_t rows_ahead, Out* out) {
  switch (weight.bits) {
    case 1:
      decode_row_bits<Wide, Narrow, 1>(weight, row, rows_ahead, out);
      break;
    case 2:
      decode_row_bits<Wide, Narrow, 2>(weight, row, rows_ahead, out);
      break;
    case 3:
      decode_row_bits<Wide, Narrow, 3>(weight, row, rows_ahead, out);
      break;
    case 4:
      decode_row_bits<Wide, Narrow, 4>(weight, row, rows_ahead, out);
      break;
    case 5:
      decode_row_bits<Wide, Narrow, 5>(weight, row, rows_ahead, out);
      break;
    case 6:
      decode_row_bits<Wide, Narrow, 6>(weight, row, rows_ahead, out);
      break;
    case 7:
      decode_row_bits<Wide, Narrow, 7>(weight, row, rows_ahead, out);
      break;
    default:
      decode_row_bits<Wide, Narrow, 8>(weight, row, rows_ahead, out);
  }
}

template <class Wide, class Narrow>
static void dequantize_rows(const DequantizeCall& call, int64_t begin, int64_t end) {
  const int64_t n = call.weight.in_features;
  for (int64_t row = begin; row < end; ++row) {
    switch (call.dtype) {
      case DType::kBFloat16:
        decode_row<Wide, Narrow>(call.weight, row, 1, static_cast<bf16*>(call.out) + row * n);
        break;
      case DType::kFloat16:
        decode_row<Wide, Narrow>(call.weight, row, 1, static_cast<fp16*>(call.out) + row * n);
        break;
      default:
        decode_row<Wide, Narrow>(call.weight, row, 1, static_cast<float*>(call.out) + row * n);
    }
  }
}

}  // namespace squeezellm_hf
