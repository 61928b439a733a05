// Look-up by byte permutes: a thread keeps the values of one row in registers, the high bytes of the values
// in some, the low bytes in others, where a permute finds four at once.
#pragma once

#include "common.cuh"

namespace squeezellm_hf::cuda {

// Byte i of the result is byte n of the pair (low, high), n the i-th nibble of `selector`'s lower half: 0 to 7.
__device__ __forceinline__ uint32_t permute(uint32_t low, uint32_t high, uint32_t selector) {
  uint32_t result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(low), "r"(high), "r"(selector));
  return result;
}

// Entry e is byte e % 4 of register e / 4.
template <int kBits>
struct RowTable {
  static constexpr int kEntries = 1 << kBits;
  static constexpr int kRegisters = kEntries / 4;
  uint32_t high[kRegisters];
  uint32_t low[kRegisters];

  // Entries 4 r to 4 r + 3, two a register.
  __device__ __forceinline__ void set(int r, uint32_t first, uint32_t second) {
    high[r] = permute(first, second, 0x7531);
    low[r] = permute(first, second, 0x6420);
  }
};

template <class T>
constexpr DType kDType = __is_same(T, __half) ? DType::kFloat16 : DType::kBFloat16;

// Two neighbouring values of the 16-bit dtype that is not T.
template <class T>
__device__ __forceinline__ uint32_t convert_pair(uint32_t pair) {
  if constexpr (kDType<T> == DType::kBFloat16) {
    const float2 values = __half22float2(*reinterpret_cast<const __half2*>(&pair));
    const __nv_bfloat162 converted = __floats2bfloat162_rn(values.x, values.y);
    return *reinterpret_cast<const uint32_t*>(&converted);
  } else {
    const __half2 converted = __floats2half2_rn(__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000));
    return *reinterpret_cast<const uint32_t*>(&converted);
  }
}

template <class T, int kBits>
__device__ RowTable<kBits> load_table(const LutWeight& weight, int row) {
  using Table = RowTable<kBits>;
  Table table;
  if (weight.table_dtype != DType::kFloat32 && reinterpret_cast<uintptr_t>(weight.lookup_table) % 8 == 0) {
    const auto* pairs = static_cast<const uint2*>(weight.lookup_table) + int64_t{row} * Table::kRegisters;
    uint2 entries[Table::kRegisters];
#pragma unroll
    for (int r = 0; r < Table::kRegisters; ++r) entries[r] = __ldg(pairs + r);
    if (weight.table_dtype != kDType<T>) {
#pragma unroll
      for (uint2& v : entries) v = {convert_pair<T>(v.x), convert_pair<T>(v.y)};
    }
#pragma unroll
    for (int r = 0; r < Table::kRegisters; ++r) table.set(r, entries[r].x, entries[r].y);
    return table;
  }
#pragma unroll
  for (int r = 0; r < Table::kRegisters; ++r) {
    uint32_t entries[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t entry = int64_t{row} * Table::kEntries + r * 4 + i;
      const T value = from_float<T>(load_float(weight.lookup_table, weight.table_dtype, entry));
      entries[i] = *reinterpret_cast<const uint16_t*>(&value);
    }
    table.set(r, entries[0] | entries[1] << 16, entries[2] | entries[3] << 16);
  }
  return table;
}

// The values of eight indices, one a nibble. At 3 bits the nibbles' fourth bits are zero.
template <int kBits>
__device__ __forceinline__ uint4 look_up_nibbles(const RowTable<kBits>& table, uint32_t indices) {
  static_assert(kBits == 3 || kBits == 4);
  // A permute sees 8 entries: at 4 bits both halves of the table by the lower three bits, then a choice.
  const uint32_t within = kBits == 4 ? indices & 0x77777777 : indices;
  const uint32_t choice = kBits == 4 ? and_or(indices >> 1, 0x44444444, 0x32103210) : 0;
  uint32_t values[4];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t entry = within >> 16 * half;
    const uint32_t part = choice >> 16 * half;
    uint32_t high = permute(table.high[0], table.high[1], entry);
    uint32_t low = permute(table.low[0], table.low[1], entry);
    if constexpr (kBits == 4) {
      high = permute(high, permute(table.high[2], table.high[3], entry), part);
      low = permute(low, permute(table.low[2], table.low[3], entry), part);
    }
    values[2 * half] = permute(low, high, 0x5140);
    values[2 * half + 1] = permute(low, high, 0x7362);
  }
  return {values[0], values[1], values[2], values[3]};
}

// The lowest eight 3-bit indices, one a nibble. Multiplications take no time from the permutes' unit.
__device__ __forceinline__ uint32_t spread_eight(uint32_t bits) {
  bits &= 0xFFFFFF;
  bits += (bits & 0xFFF000) * 15;     // 12 bits in each half
  bits += (bits & 0x0FC00FC0) * 3;    // 6 in each byte
  return bits + (bits & 0x38383838);  // 3 in each nibble
}

// The values of 16 2-bit indices: a permute takes the bytes of two values from both registers of the table.
__device__ __forceinline__ void look_up_sixteen(const RowTable<2>& table, uint32_t word, uint4 (&values)[2]) {
  uint32_t pairs[2][4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t indices = word >> 4 * i & 0x000F000F;   // two indices in each half
    indices = (indices * 65 & 0x03030303) * 0x11;    // one in each byte, twice
    const uint32_t selector = indices + 0x40404040;  // its low byte, then its high byte
    pairs[0][i] = permute(table.low[0], table.high[0], selector);
    pairs[1][i] = permute(table.low[0], table.high[0], selector >> 16);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) values[half] = {pairs[half][0], pairs[half][1], pairs[half][2], pairs[half][3]};
}

// The values of the lowest eight indices.
template <int kBits>
__device__ __forceinline__ uint4 look_up_eight(const RowTable<kBits>& table, uint32_t bits) {
  if constexpr (kBits == 4) {
    return look_up_nibbles<4>(table, bits);
  } else if constexpr (kBits == 3) {
    return look_up_nibbles<3>(table, spread_eight(bits));
  } else {
    uint4 values[2];
    look_up_sixteen(table, bits, values);
    return values[0];
  }
}

// The values of 32 consecutive indices, 8 at a time.
template <int kBits>
__device__ __forceinline__ void look_up_all(const RowTable<kBits>& table, const uint32_t (&words)[kBits],
                                            uint4 (&values)[4]) {
  if constexpr (kBits == 4) {
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = look_up_eight<4>(table, words[i]);
  } else if constexpr (kBits == 3) {
    values[0] = look_up_eight<3>(table, words[0]);
    values[1] = look_up_eight<3>(table, __funnelshift_r(words[0], words[1], 24));
    values[2] = look_up_eight<3>(table, __funnelshift_r(words[1], words[2], 16));
    values[3] = look_up_eight<3>(table, words[2] >> 8);
  } else {
    uint4 halves[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      look_up_sixteen(table, words[i], halves);
      values[2 * i] = halves[0];
      values[2 * i + 1] = halves[1];
    }
  }
}

}  // namespace squeezellm_hf::cuda
