// Tables of all pairs of a row's values in shared memory, for the tensor core's left operand: lane l of a warp meets
// every eighth row of its 32 or 16 from l / 4 on, and two indices at once name a register of the operand.
//
// No two lanes meet in a bank. At 2 and 3 bits the four lanes of a row have a copy each. At 4 bits there is memory for
// one (128 rows) or two (64): lanes that share a copy then are at different rows of theirs, and exchange rows among
// their registers afterwards.
#pragma once

#include "fragment_table.cuh"

namespace squeezellm_hf::cuda {

// Word `slot` of line `pair` of a region is a copy of a row's entry: [region][pair][slot]. kRows is 128 or 64.
template <int kBits, int kRows>
struct PairLayout {
  static constexpr int kPairs = 1 << 2 * kBits;
  static constexpr int kCopies = kBits == 4 ? 128 / kRows : 4;
  static constexpr int kSlots = 64;
  static constexpr int kLineBytes = kSlots * 4;
  static constexpr int kRegionBytes = kPairs * kLineBytes;
  static constexpr int kRegions = kRows * kCopies / kSlots;
  static constexpr int kBytes = kRegions * kRegionBytes;

  // Of a row's first pair.
  __device__ static constexpr int offset(int row, int copy) {
    const int slot = row * kCopies + copy;
    return slot / kSlots * kRegionBytes + slot % kSlots * 4;
  }
};

template <class T>
__device__ __forceinline__ uint32_t convert_bits(uint32_t bits, DType dtype) {
  const T value = from_float<T>(float_of_bits(bits, dtype));
  return *reinterpret_cast<const uint16_t*>(&value);
}

// All values of a row as T, two a register.
template <class T, int kBits>
__device__ __forceinline__ void load_row(const LutWeight& weight, int row, uint32_t (&pairs)[(1 << kBits) / 2]) {
  const int64_t first = int64_t{row} << kBits;
  if (weight.table_dtype == DType::kFloat32 || reinterpret_cast<uintptr_t>(weight.lookup_table) % 8 != 0) {
#pragma unroll
    for (int i = 0; i < 1 << kBits; ++i) {
      const uint32_t value =
          convert_bits<T>(load_bits(weight.lookup_table, weight.table_dtype, first + i), weight.table_dtype);
      pairs[i / 2] = i % 2 ? pairs[i / 2] | value << 16 : value;
    }
    return;
  }
  const auto* source = reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(weight.lookup_table) + first);
#pragma unroll
  for (int i = 0; i < (1 << kBits) / 4; ++i) {
    const uint2 v = __ldg(source + i);
    pairs[2 * i] = v.x, pairs[2 * i + 1] = v.y;
  }
  if (weight.table_dtype == kDType<T>) return;
#pragma unroll
  for (uint32_t& pair : pairs)
    pair = convert_bits<T>(pair & 0xFFFF, weight.table_dtype) | convert_bits<T>(pair >> 16, weight.table_dtype) << 16;
}

// Fills the tables of rows from `first_row` on with kParts times kRows threads. Rows beyond the last are filled
// like it.
template <class T, int kBits, int kRows, int kParts>
__device__ __forceinline__ void fill_pair_tables(unsigned char* tables, const LutWeight& weight, int first_row,
                                                 int thread) {
  using Layout = PairLayout<kBits, kRows>;
  constexpr int kEntries = 1 << kBits;
  constexpr int kHighs = (kEntries + kParts - 1) / kParts;
  const int tile_row = thread % kRows;
  const int part = thread / kRows;
  const int row = min(first_row + tile_row, weight.out_features - 1);
  uint32_t low[kEntries / 2];
  load_row<T, kBits>(weight, row, low);
  uint32_t high[kHighs];
#pragma unroll
  for (int i = 0; i < kHighs; ++i)
    high[i] = load_bits(weight.lookup_table, weight.table_dtype,
                        (int64_t{row} << kBits) + min(part + i * kParts, kEntries - 1));
  unsigned char* target = tables + Layout::offset(tile_row, 0);
#pragma unroll
  for (int i = 0; i < kHighs; ++i) {
    const int upper = part + i * kParts;
    if (upper >= kEntries) break;
    const uint32_t value = convert_bits<T>(high[i], weight.table_dtype);
#pragma unroll
    for (int lower = 0; lower < kEntries; ++lower) {
      const uint32_t pair = __byte_perm(low[lower / 2], value, lower % 2 ? 0x5432 : 0x5410);
      unsigned char* line = target + (upper * kEntries + lower) * Layout::kLineBytes;
      if constexpr (Layout::kCopies == 1) {
        *reinterpret_cast<uint32_t*>(line) = pair;
      } else if constexpr (Layout::kCopies == 2) {
        *reinterpret_cast<uint2*>(line) = make_uint2(pair, pair);
      } else {
        *reinterpret_cast<uint4*>(line) = make_uint4(pair, pair, pair, pair);
      }
    }
  }
}

// A lane's view of its warp's rows: what it looks up comes as a register for each of the rows lane / 4 + 8 b.
template <int kBits, int kRows>
class PairTable {
  using Layout = PairLayout<kBits, kRows>;

 public:
  static constexpr int kLaneRows = kRows / 32;

  __device__ __forceinline__ PairTable(const unsigned char* tables, int warp, int lane)
      : tables_(tables),
        odd_(lane % 2 ? kSecond : kFirst),
        upper_(lane / 2 % 2 ? kSecond : kFirst),
        exchange_(lane / 2 % 2),
        minus_exchange_(-(lane / 2 % 2)) {
#pragma unroll
    for (int j = 0; j < kOffsets; ++j) {
      offsets_[j] = Layout::offset(warp * kLaneRows * 8 + lane / 4 + row(j, lane % 4), lane % Layout::kCopies);
      keep(offsets_[j]);
    }
    keep(odd_);
    keep(upper_);
    keep(exchange_);
    keep(minus_exchange_);
  }

  // Where from lane / 4 on the row lies whose indices are the j-th words, for t = lane % 4.
  __device__ __forceinline__ static int row(int j, int t) { return 8 * (j ^ t / Layout::kCopies); }

  // Of 32 indices a row, the values of those from 2 `pair` on.
  __device__ __forceinline__ void look_up(const uint32_t (&words)[kLaneRows][kBits], int pair,
                                          uint32_t (&values)[kLaneRows]) const {
#pragma unroll
    for (int j = 0; j < kLaneRows; ++j) values[j] = load(words[j], j, pair);
    if constexpr (Layout::kCopies == 1) {
#pragma unroll
      for (int j = 0; j < kLaneRows; j += 2) exchange(values[j], values[j + 1], odd_);
    }
    if constexpr (Layout::kCopies <= 2) {
#pragma unroll
      for (int j = 0; j < kLaneRows / 2; ++j) {
        uint32_t& first = values[j];
        uint32_t& second = values[j + kLaneRows / 2];
        if (pair % 4 >= kMultiplied) {
          exchange(first, second, upper_);
        } else {
          // By multiplications, for which another unit is there.
          const uint32_t difference = second - first;
          first = multiply_add(difference, exchange_, first);
          second = multiply_add(difference, minus_exchange_, second);
        }
      }
    }
  }

 private:
  static constexpr int kOffsets = Layout::kCopies == 4 ? 1 : kLaneRows;
  static_assert(Layout::kLineBytes == 256);

  // The pair's number is the second byte of its line's offset.
  __device__ __forceinline__ uint32_t load(const uint32_t (&words)[kBits], int j, int pair) const {
    if constexpr (kBits == 4) {
      const uint32_t offset = __byte_perm(words[pair / 4], offsets_[j], 0x7604 | (pair % 4) << 4);
      return *reinterpret_cast<const uint32_t*>(tables_ + offset);
    } else {
      const int bit = 2 * kBits * pair - 8;  // the lowest of a word whose second byte has the pair
      uint32_t word;
      if (bit < 0) {
        word = words[0] << -bit;
      } else if (bit % 32 + 8 + 2 * kBits <= 32) {
        word = words[bit / 32] >> bit % 32;
      } else {
        word = __funnelshift_r(words[bit / 32], words[bit / 32 + 1], bit % 32);
      }
      const uint32_t offset = and_or(word, (Layout::kPairs - 1) << 8, offsets_[0]);
      return *reinterpret_cast<const uint32_t*>(tables_ + offset + Layout::offset(8 * j, 0));
    }
  }

  // Computed once: the compiler would do it again at every stage.
  __device__ __forceinline__ static void keep(uint32_t& value) { asm volatile("" : "+r"(value)); }

  // Without a branch, which would hold the tensor core's instructions up.
  __device__ __forceinline__ static void exchange(uint32_t& first, uint32_t& second, uint32_t selector) {
    const uint32_t kept = first;
    first = permute(first, second, selector);
    second = permute(second, kept, selector);
  }

  __device__ __forceinline__ static uint32_t multiply_add(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t result;
    asm("mad.lo.u32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
    return result;
  }

  // Of four second exchanges, how many are multiplications.
  static constexpr int kMultiplied = 3;

  // Selectors of permute(): all of one register.
  static constexpr uint32_t kFirst = 0x3210;
  static constexpr uint32_t kSecond = 0x7654;

  const unsigned char* tables_;
  uint32_t odd_;
  uint32_t upper_;
  uint32_t exchange_;
  uint32_t minus_exchange_;
  uint32_t offsets_[kOffsets];
};

}  // namespace squeezellm_hf::cuda
