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

// Decodes n weights from `words` on; `table` has at least 64 entries, repeating if fewer exist.
template <class Lanes, int kBits>
static void decode_bits(const uint32_t* words, int64_t n, const typename Lanes::Element* entries,
                        typename Lanes::Element* out) {
  const typename Lanes::template Table<kBits> table(entries);
  int64_t i = 0;
  for (; i + 32 <= n; i += 32, words += kBits) decode_group<Lanes, kBits>(words, kBits, table, out + i);
  if (i < n) {
    typename Lanes::Element last[32];
    const int rest = static_cast<int>(n - i);
    decode_group<Lanes, kBits>(words, (rest * kBits + 31) / 32, table, last);
    for (int j = 0; j < rest; ++j) out[i + j] = last[j];
  }
}

template <class Lanes>
static void decode(int bits, const uint32_t* words, int64_t n, const typename Lanes::Element* entries,
                   typename Lanes::Element* out) {
  switch (bits) {
    case 1:
      return decode_bits<Lanes, 1>(words, n, entries, out);
    case 2:
      return decode_bits<Lanes, 2>(words, n, entries, out);
    case 3:
      return decode_bits<Lanes, 3>(words, n, entries, out);
    case 4:
      return decode_bits<Lanes, 4>(words, n, entries, out);
    case 5:
      return decode_bits<Lanes, 5>(words, n, entries, out);
    case 6:
      return decode_bits<Lanes, 6>(words, n, entries, out);
  }
  if constexpr (Lanes::kLaneBits == 32) {
    if (bits == 7) return decode_bits<Lanes, 7>(words, n, entries, out);
    return decode_bits<Lanes, 8>(words, n, entries, out);
  }
}

// A row's table as fp32, repeated to at least 64 entries: look-ups then need no mask, whatever
// lies above an index in its lane.
static inline void load_table(const LutWeight& weight, int64_t row, float* table) {
  const int entries = 1 << weight.bits;
  load_floats(weight.lookup_table, weight.table_dtype, row << weight.bits, entries, table);
  for (int i = entries; i < 64; ++i) table[i] = table[i - entries];
}

// One row in its natural order, dense and sparse, as fp32, bf16 or fp16. `Narrow` are the 16-bit
// lanes of the instruction set, or void.
template <class Wide, class Narrow, class Out>
static void decode_row(const LutWeight& weight, int64_t row, Out* out) {
  const uint32_t* words = weight.qweight + row * weight.words_per_row;
  const int64_t n = weight.in_features;
  alignas(64) float table[256];
  load_table(weight, row, table);
  if constexpr (sizeof(Out) == 4) {
    decode<Wide>(weight.bits, words, n, table, out);
  } else {
    bool done = false;
    if constexpr (!same<Narrow, void>) {
      if (weight.bits <= 6) {
        alignas(64) Out entries[64];
        from_floats(table, 64, entries);
        decode<Narrow>(weight.bits, words, n, &entries[0].bits, &out[0].bits);
        done = true;
      }
    }
    constexpr int64_t kChunk = 512;
    alignas(64) float chunk[kChunk];
    for (int64_t i = 0; !done && i < n; i += kChunk) {
      const int64_t count = n - i < kChunk ? n - i : kChunk;
      decode<Wide>(weight.bits, words + i / 32 * weight.bits, count, table, chunk);
      from_floats(chunk, count, out + i);
    }
  }
  add_sparse(weight, row, out);
}

template <class Wide, class Narrow>
static void dequantize_rows(const DequantizeCall& call, int64_t begin, int64_t end) {
  const int64_t n = call.weight.in_features;
  for (int64_t row = begin; row < end; ++row) {
    switch (call.dtype) {
      case DType::kBFloat16:
        decode_row<Wide, Narrow>(call.weight, row, static_cast<bf16*>(call.out) + row * n);
        break;
      case DType::kFloat16:
        decode_row<Wide, Narrow>(call.weight, row, static_cast<fp16*>(call.out) + row * n);
        break;
      default:
        decode_row<Wide, Narrow>(call.weight, row, static_cast<float*>(call.out) + row * n);
    }
  }
}

}  // namespace squeezellm_hf
