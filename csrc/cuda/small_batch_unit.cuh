// What a lane of linear_small_batch does with a piece of a row: loads its words and activations, finds table entries,
// multiplies a sparse value.
#pragma once

#include "common.cuh"
#include "weight.h"

namespace squeezellm_hf::cuda::small_batch {

constexpr int kTileRows = 16;  // of the tensor core's left operand
constexpr int kColumns = 8;    // of its right operand: the largest batch
// Bytes between two entries of a table: 32 banks of 4 for the rows 0 to 7, as many for 8 to 15.
constexpr int kEntryBytes = 256;
constexpr int kEntryShift = 8;

// How a warp takes a row: a unit is a piece of consecutive words for each of 4 lanes that holds a
// whole number of groups of 8 indices; kAhead units are in registers or on their way.
template <int kBits>
struct Unit {
  static constexpr int kLaneWords = kBits == 3 ? 12 : 4;
  static constexpr int kWords = 4 * kLaneWords;
  static constexpr int kLaneWeights = kLaneWords * 32 / kBits;
  static constexpr int kWeights = 4 * kLaneWeights;
  static constexpr int kGroups = kLaneWeights / 8;
  static constexpr int kAhead = kBits == 3 ? 1 : 2;
  static constexpr int kPairs = 1 << (2 * kBits);
};

// Words beyond the row stay as they were: they select some value, which meets an activation of zero.
template <bool kVector, bool kSectorsShared>
__device__ __forceinline__ void load_words(uint32_t (&words)[4], const uint32_t* source, int remaining) {
  if constexpr (kVector) {
    if (remaining <= 0) return;
    const uint4* vector = reinterpret_cast<const uint4*>(source);
    const uint4 v = kSectorsShared ? __ldg(vector) : load_streamed(vector);
    words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (remaining > i) words[i] = __ldg(source + i);
  }
}

// Eight consecutive activations, zero beyond the `remaining` ones.
template <class T, bool kVector>
__device__ __forceinline__ uint4 load_activations(const T* x, int remaining) {
  uint4 v = make_uint4(0, 0, 0, 0);
  if constexpr (kVector) {
    if (remaining > 0) v = __ldg(reinterpret_cast<const uint4*>(x));
  } else {
    const uint16_t* bits = reinterpret_cast<const uint16_t*>(x);
    uint32_t halves[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) halves[i] = i < remaining ? __ldg(bits + i) : 0;
    v = make_uint4(halves[0] | halves[1] << 16, halves[2] | halves[3] << 16, halves[4] | halves[5] << 16,
                   halves[6] | halves[7] << 16);
  }
  return v;
}

// Byte offset in a table of the entry for pair j of a lane's words, plus the lane's own offset.
template <int kBits>
__device__ __forceinline__ uint32_t pair_offset(const uint32_t (&words)[Unit<kBits>::kLaneWords / 4][4], int j,
                                                uint32_t lane_offset) {
  const int word = j * 2 * kBits / 32;
  const int shift = j * 2 * kBits % 32;
  const uint32_t bits = words[word / 4][word % 4];
  if constexpr (kBits == 4) {
    // One instruction: the pair's byte becomes the second byte, the lane's offset the first.
    return __byte_perm(bits, lane_offset, 0x5504 | shift / 8 << 4);
  } else if constexpr (kBits == 2) {
    // The compiler shares the masked word among the four pairs at even (or odd) nibbles.
    const uint32_t nibbles = (shift % 8 ? bits >> 4 : bits) & 0x0F0F0F0F;
    return __byte_perm(nibbles, lane_offset, 0x5504 | shift / 8 << 4);
  } else {
    constexpr uint32_t kMask = (Unit<kBits>::kPairs - 1) << kEntryShift;
    const int next = min(word + 1, Unit<kBits>::kLaneWords - 1);
    if (shift + 2 * kBits > 32)
      return and_or(__funnelshift_r(bits, words[next / 4][next % 4], shift - kEntryShift), kMask, lane_offset);
    return and_or(shift >= kEntryShift ? bits >> (shift - kEntryShift) : bits << (kEntryShift - shift), kMask,
                  lane_offset);
  }
}

// Adds one sparse value's products to sums[n], n < batch.
template <class T, int kBatch>
__device__ __forceinline__ void add_sparse(float (&sums)[kBatch], const LinearCall& call, int64_t entry) {
  const T* x = static_cast<const T*>(call.x) + sparse_column(call.weight, entry);
  const float value = load_float(call.weight.values, call.weight.values_dtype, entry);
#pragma unroll
  for (int n = 0; n < kBatch; ++n)
    if (n < call.batch) sums[n] += value * to_float(x[int64_t{n} * call.weight.in_features]);
}

}  // namespace squeezellm_hf::cuda::small_batch
