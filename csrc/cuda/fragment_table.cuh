// Look-up by byte permutes in the layout of the tensor core's left operand: lane l of a warp meets rows l / 4 and
// l / 4 + 8 of 16, and of 16 columns 2 t, 2 t + 1, 2 t + 8 and 2 t + 9 with t = l % 4.
#pragma once

#include "row_table.cuh"

namespace squeezellm_hf::cuda {

// Four indices of 16 consecutive ones, those of k = 2 t, 2 t + 1, 2 t + 8 and 2 t + 9 for t = lane % 4,
// one a nibble. `words` hold 32 indices of the row; `step` says which 16.
template <int kBits>
__device__ __forceinline__ uint32_t select_indices(const uint32_t (&words)[kBits], int step, uint32_t t) {
  if constexpr (kBits == 4) {
    return __byte_perm(words[2 * step], words[2 * step + 1], t | (t + 4) << 4);
  } else if constexpr (kBits == 3) {
    const uint32_t first = step == 0 ? words[0] : __byte_perm(words[1], words[2], 0x5432);
    const uint32_t second = step == 0 ? __byte_perm(words[0], words[1], 0x6543) : words[2] >> 8;
    const uint32_t pairs = __byte_perm(first >> 6 * t, second >> 6 * t, 0x7740);
    return (pairs & 0x0707) + ((pairs & 0x3838) << 1);
  } else {
    const uint32_t pairs = __byte_perm(words[step] >> 4 * t, 0, 0x7720);
    return (pairs & 0x0303) + ((pairs & 0x0C0C) << 2);
  }
}

// The values of four indices, one a nibble: `first` of the lower two, `second` of the others.
template <int kBits>
__device__ __forceinline__ void look_up(const RowTable<kBits>& table, uint32_t indices, uint32_t& first,
                                        uint32_t& second) {
  uint32_t high;
  uint32_t low;
  if constexpr (kBits == 4) {
    // A permute sees 8 entries: both halves of the table by the lower three bits, then a choice.
    const uint32_t within = indices & 0x7777;
    const uint32_t choice = (indices >> 1 & 0x4444) | 0x3210;
    high = __byte_perm(__byte_perm(table.high[0], table.high[1], within),
                       __byte_perm(table.high[2], table.high[3], within), choice);
    low = __byte_perm(__byte_perm(table.low[0], table.low[1], within), __byte_perm(table.low[2], table.low[3], within),
                      choice);
  } else {
    constexpr int kLast = RowTable<kBits>::kRegisters - 1;
    high = __byte_perm(table.high[0], table.high[kLast], indices);
    low = __byte_perm(table.low[0], table.low[kLast], indices);
  }
  first = __byte_perm(low, high, 0x5140);
  second = __byte_perm(low, high, 0x7362);
}

template <int kBits>
__device__ __forceinline__ void load_indices(uint32_t (&words)[kBits], const unsigned char* source) {
  if constexpr (kBits == 4) {
    const uint4 v = *reinterpret_cast<const uint4*>(source);
    words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
  } else if constexpr (kBits == 2) {
    const uint2 v = *reinterpret_cast<const uint2*>(source);
    words[0] = v.x, words[1] = v.y;
  } else {
#pragma unroll
    for (int i = 0; i < kBits; ++i) words[i] = reinterpret_cast<const uint32_t*>(source)[i];
  }
}

}  // namespace squeezellm_hf::cuda
