// Products of 2-bit weights in linear_streamed by counting bits, without any look-up, for one activation.
//
// With the bits p and q of an index, a row's value is k0 + k1 p + k2 q + k3 p q, so a row of y is
//     k0 sum(x) + k1 sum(p x) + k2 sum(q x) + k3 sum(p q x).
// The activations become fixed-point numbers of 24 bits, relative to the largest one. The tensor core counts, for each
// of these bits, the indices of a row that have the bit p, or q, or both, where x has the bit: its left operand is the
// packed words as they are, or a word and itself shifted by one, and its right operand's eight columns are eight bits
// of x. Counts are exact: beside the fp32 arithmetic at the end of a tile, only activations below 2^-15 (fp16: 2^-12)
// of the largest one are rounded, by at most 2^-23 of that. One that is infinite or not a number makes all of y
// undefined, an infinite value in a table its row.
#pragma once

#include "streamed_dense.cuh"
#include "streamed_weights.cuh"

namespace squeezellm_hf::cuda::streamed {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

constexpr int kWordWeights = 16;
constexpr uint32_t kBitsP = 0x55555555;
constexpr uint32_t kBitsQ = 0xaaaaaaaa;

// c += how many bits a row of a [16 x 256] (rows lane / 4 and lane / 4 + 8) and a column of b [256 x 8] share.
__device__ __forceinline__ void count_common_bits(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The bits of x, for each word of 16 weights: eight words with the upper 16 bits, of which word n has the bits 8 + 2 n
// (where the weights have p) and 9 + 2 n (where they have q), and eight with the lower 8, word n with bit n (at p).
enum PlaneKind { kUpper, kLower };

// Where they lie for the words q, q + 4, q + 8, q + 12 of unit u, which one lane multiplies. Lanes that store words of
// two units, or load two columns, meet different banks.
__device__ __forceinline__ int plane_offset(int u, PlaneKind kind, int column, int q) {
  return ((u * 2 + kind) * 32 + (column * 4 + q ^ u % 2 * 4)) * 16;
}

// 16 rows of 32 bytes, as the left operand has them: source is that of the row lane % 16, its second half for the upper
// lanes.
__device__ __forceinline__ void load_rows(uint32_t (&a)[4], const unsigned char* source) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(shared_address(source))
               : "memory");
}

// d[i], of whose bytes each is a digit of x for field i of a byte of weights: into words whose bytes have two bits of
// each of the four fields. A transposition of 4 x 4 pairs of bits in each byte.
__device__ __forceinline__ void transpose_pairs(uint32_t (&d)[4]) {
#pragma unroll
  for (int distance = 2; distance > 0; distance /= 2)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & distance) continue;
      const uint32_t mask = distance == 2 ? 0x0f0f0f0f : 0x33333333;
      const uint32_t first = d[i];
      const uint32_t second = d[i + distance];
      d[i] = first & mask | second << 2 * distance & ~mask;
      d[i + distance] = first >> 2 * distance & mask | second & ~mask;
    }
}

// The planes of 16 activations; their sum.
template <class T>
__device__ __forceinline__ float store_planes(unsigned char* planes, const uint4 (&held)[2], float scale, int word) {
  const auto* values = reinterpret_cast<const T*>(held);
  float sum = 0;
  uint32_t digits[3][4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t fixed[4];
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      const float value = to_float(values[b * 4 + i]);
      sum += value;
      fixed[b] = __float2int_rn(value * scale);
    }
    const uint32_t low[2] = {__byte_perm(fixed[0], fixed[1], 0x5140), __byte_perm(fixed[2], fixed[3], 0x5140)};
    digits[0][i] = __byte_perm(low[0], low[1], 0x5410);
    digits[1][i] = __byte_perm(low[0], low[1], 0x7632);
    digits[2][i] =
        __byte_perm(__byte_perm(fixed[0], fixed[1], 0x0062), __byte_perm(fixed[2], fixed[3], 0x0062), 0x5410);
  }
  const auto store = [&](PlaneKind kind, int column, uint32_t bits) {
    *reinterpret_cast<uint32_t*>(planes + plane_offset(word / 16, kind, column, word % 4) + word / 4 % 4 * 4) = bits;
  };
#pragma unroll
  for (int digit = 0; digit < 3; ++digit) {
    transpose_pairs(digits[digit]);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t pair = digits[digit][i];
      if (digit == 0) {
        store(kLower, 2 * i, pair & kBitsP);
        store(kLower, 2 * i + 1, pair >> 1 & kBitsP);
      } else {
        store(kUpper, 4 * (digit - 1) + i, pair);
      }
    }
  }
  return sum;
}

// What a warp keeps of the activations.
struct FixedPoint {
  float unit;  // of their lowest bit
  float sum;   // of the warp's part
};

// x into shared memory by the looking-up warps, as it is and as planes, zeros beyond its end.
template <class T, int kWarps, class Weights>
__device__ FixedPoint load_planes(unsigned char* x, unsigned char* planes, Shared<T, 2, 1, kWarps, true>& shared,
                                  Weights weights, const Plan& plan) {
  const LinearCall& call = weights.call;
  constexpr int kThreads = kWarps * kWarpLanes;
  const int warp = threadIdx.x / kWarpLanes;
  const int lane = threadIdx.x % kWarpLanes;
  const int pieces = call.weight.in_features / 8;
  const int words = plan.stages * Unit<2>::kStageWeights / kWordWeights;
  // The largest |x|, as bits, which are ordered as the values are: two at a time.
  uint32_t largest = 0;
  const auto compare = [&](const uint4& v) {
    const uint32_t pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) largest = __vmaxu2(largest, pairs[j] & 0x7fff7fff);
  };
  if constexpr (Weights::kFuses) {
    Input<T, kWarps> input(x, shared.squares, call, weights.group.fusion, words * 2);
    input.load([&] { arrive_for_warp(shared.x_read); });
    input.visit(compare);
  } else {
    wait_for_previous_kernel();
#pragma unroll 4
    for (int i = threadIdx.x; i < words * 2; i += kThreads) {
      const uint4 v = i < pieces ? load_uncached(static_cast<const uint4*>(call.x) + i) : make_uint4(0, 0, 0, 0);
      *reinterpret_cast<uint4*>(x + x_piece(i) * 16) = v;
      compare(v);
    }
    arrive_for_warp(shared.x_read);
  }
  largest = __reduce_max_sync(0xffffffff, max(largest & 0xffff, largest >> 16));
  if (lane == 0) shared.largest[warp] = largest;
  arrive_for_warp(shared.x_full);  // the sparse part goes on
  synchronize(kPlanesBarrier, kThreads);
  largest = __reduce_max_sync(0xffffffff, lane < kWarps ? shared.largest[lane] : 0);
  // 2^23 stands for the power of two above it.
  const uint32_t as_float = __float_as_uint(to_float(*reinterpret_cast<const T*>(&largest)));
  const uint32_t exponent = max(as_float >> 23, 40u);
  const float scale = __uint_as_float(276 - exponent << 23);
  FixedPoint fixed;
  fixed.unit = __uint_as_float(as_float < 0x7f800000 ? exponent - 22 << 23 : 0x7fffffff);
  fixed.sum = 0;
#pragma unroll 1
  for (int word = threadIdx.x; word < words; word += kThreads) {
    uint4 held[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) held[h] = *reinterpret_cast<const uint4*>(x + x_piece(word * 2 + h) * 16);
    fixed.sum += store_planes<T>(planes, held, scale, word);
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) fixed.sum += __shfl_xor_sync(0xffffffff, fixed.sum, distance);
  synchronize(kPlanesBarrier, kThreads);
  return fixed;
}

// The factors k of a tile's rows, by the filling warps.
template <class T, int kWarps, class Weights>
__device__ void fill_factors(Shared<T, 2, 1, kWarps, true>& shared, Weights weights, const Work& work, int warp,
                             int lane) {
  const DType table_dtype = weights.call.weight.table_dtype;
  uint32_t bits[4];
  const auto load = [&](int number) {
    const Tile tile = weights.tile(number);
    const LutWeight& weight = weights.weight(tile.weight);
    const int row = min(tile.row + lane % kRows, weight.out_features - 1);
#pragma unroll
    for (int i = 0; i < 4; ++i) bits[i] = load_bits(weight.lookup_table, table_dtype, int64_t{row} * 4 + i);
  };
  load(work.tile(0));
  for (int count = 0; count < work.tiles; ++count) {
    const int buffer = count % kTableBuffers;
    float values[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = to_float(from_float<T>(float_of_bits(bits[i], table_dtype)));
    const float p = values[1] - values[0];
    const float q = values[2] - values[0];
    wait(shared.tables_empty[buffer], (count / kTableBuffers & 1) ^ 1);
    if (warp == 0 && lane < kRows)
      shared.factors[buffer][lane] = make_float4(values[0], p, q, values[3] - values[2] - p);
    __syncwarp();
    if (lane < kArrivingLanes) arrive(shared.tables_full[buffer]);
    if (count + 1 < work.tiles) load(work.tile(count + 1));
  }
}

// The duties of a looking-up warp, for all tiles of the block.
template <class T, int kWarps>
__device__ void multiply_planes(Shared<T, 2, 1, kWarps, true>& shared, const unsigned char* ring,
                                const unsigned char* planes, const FixedPoint& fixed, const Plan& plan,
                                const Work& work, int warp, int lane) {
  using U = Unit<2>;
  constexpr int kStageStride = Duties<kWarps>::kStageStride;
  const int unit = warp % kStageWarps;
  const int row_offset = box_offset(lane % kRows, unit * U::kBytes + lane / kRows * 16);
  const unsigned char* lane_upper = planes + plane_offset(unit, kUpper, lane / 4, lane % 4);
  const unsigned char* lane_lower = planes + plane_offset(unit, kLower, lane / 4, lane % 4);
  // A lane has the columns 2 (lane % 4) and the next: of the upper bits this one and three more, of the lower ones
  // that of a quarter of its exponent and one more. The highest bit is the sign's.
  const float upper_unit = fixed.unit * static_cast<float>(256 << lane % 4 * 4);
  const float lower_unit = fixed.unit * static_cast<float>(1 << lane % 4 * 2);
  const int highest = lane % 4 == 3 ? -8 : 8;

  // Of each barrier this warp sees every phase, in order, as in multiply_dense(): no wait is a phase early.
  Slot slot{warp / kStageWarps};
  int stage = slot.index;
  for (int count = 0; count < work.tiles; ++count) {
    const int table = count % kTableBuffers;
    const int buffer = count % kSumBuffers;
    int counts[3][3][4] = {};  // of p, q, both; at even and odd upper bits and at the lower ones
    const int end_stage = work.end_stage(count);
    for (stage += work.first_stage(count); stage < end_stage; stage += kStageStride) {
      constexpr int kStageOffset = kStageWarps * 2 * 32 * 16;
      uint32_t upper[U::kLaneWords];
      uint32_t lower[U::kLaneWords];
      uint32_t words[2][4];
      load_words<16>(upper, lane_upper + stage * kStageOffset);
      load_words<16>(lower, lane_lower + stage * kStageOffset);
      wait(shared.full[slot.index], slot.parity);
      // Its pieces of 16 bytes are turned by the row: the third lies where the first would with another bit.
#pragma unroll
      for (int h = 0; h < 2; ++h) load_rows(words[h], ring + slot.index * U::kSlotBytes + (row_offset ^ h * 32));
      __syncwarp();
      if (lane < kArrivingLanes) arrive(shared.empty[slot.index]);
      slot.advance(kStageStride, plan.ring);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        uint32_t both[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) both[i] = words[h][i] & words[h][i] << 1;  // where q is
        uint32_t at_p[3][2];
        uint32_t at_q[3][2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          at_p[0][i] = upper[2 * h + i] & kBitsP;
          at_q[0][i] = at_p[0][i] << 1;
          at_q[1][i] = upper[2 * h + i] & kBitsQ;
          at_p[1][i] = at_q[1][i] >> 1;
          at_p[2][i] = lower[2 * h + i];
          at_q[2][i] = at_p[2][i] << 1;
        }
#pragma unroll
        for (int i = 0; i < 3; ++i) {
          count_common_bits(counts[0][i], words[h], at_p[i][0], at_p[i][1]);
          count_common_bits(counts[1][i], words[h], at_q[i][0], at_q[i][1]);
          count_common_bits(counts[2][i], both, at_q[i][0], at_q[i][1]);
        }
      }
    }
    stage -= end_stage;

    // A warp's sums over the bits.
    wait(shared.tables_full[table], count / kTableBuffers & 1);
    float rows[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float4 k = shared.factors[table][lane / 4 + h * 8];
      const auto sum = [&](const int (&c)[3][4]) {
        const int upper = c[0][2 * h] + 2 * c[1][2 * h] + 4 * c[0][2 * h + 1] + highest * c[1][2 * h + 1];
        const int lower = c[2][2 * h] + 2 * c[2][2 * h + 1];
        return static_cast<float>(upper) * upper_unit + static_cast<float>(lower) * lower_unit;
      };
      rows[h] = k.y * sum(counts[0]) + k.z * sum(counts[1]) + k.w * sum(counts[2]);
      if (lane % 4 == 0 && work.first_stage(count) == 0) rows[h] += k.x * fixed.sum;
    }
    __syncwarp();
    if (lane < kArrivingLanes) arrive(shared.tables_empty[table]);
    wait(shared.sums_empty[buffer], (count / kSumBuffers & 1) ^ 1);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int distance = 1; distance < 4; distance *= 2) rows[h] += __shfl_xor_sync(0xffffffff, rows[h], distance);
      if (lane % 4 == 0) shared.sums[buffer][warp][0][h * 8 + lane / 4] = rows[h];
    }
    __syncwarp();
    if (lane < kArrivingLanes) arrive(shared.sums_full[buffer]);
  }
}

#endif

}  // namespace squeezellm_hf::cuda::streamed
