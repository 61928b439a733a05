// AVX-512 (F, BW, DQ, VL) as the lanes that the kernels are written in.
#pragma once

#include <immintrin.h>
#include <stdint.h>

#include "convert.h"
#include "fetch.h"

namespace squeezellm_hf {
namespace {

// The first n of k lanes; n may lie outside [0, k].
inline uint32_t first_lanes(int n) {
  if (n <= 0) return 0;
  return n >= 32 ? 0xffffffffu : (1u << n) - 1;
}

// Sixteen 32-bit lanes.
struct Avx512 {
  static constexpr int kLanes = 16;
  static constexpr int kLaneBits = 32;
  static constexpr int kRegisters = 32;
  using Element = float;
  using Index = int32_t;
  using Int = __m512i;
  using Float = __m512;

  static Float zero() { return _mm512_setzero_ps(); }
  static Float load(const float* from) { return _mm512_loadu_ps(from); }
  static Float load_first(const float* from, int n) {
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>(first_lanes(n)), from);
  }
  static void store(float* to, Float value) { _mm512_storeu_ps(to, value); }
  static Float fetch(const float* x, const uint16_t* columns, uint16_t limit) {
    return _mm512_insertf32x8(_mm512_castps256_ps512(fetch8(x, columns, limit)), fetch8(x, columns + 8, limit), 1);
  }
  static Float multiply(Float a, Float b) { return _mm512_mul_ps(a, b); }
  static Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
  static Float multiply_add(Float a, Float b, Float sum) { return _mm512_fmadd_ps(a, b, sum); }
  static float reduce_add(Float value) { return _mm512_reduce_add_ps(value); }
  static Float keep(Float value, int n) { return _mm512_maskz_mov_ps(static_cast<__mmask16>(first_lanes(n)), value); }

  static Int load_words(const uint32_t* from) { return _mm512_loadu_si512(from); }
  static Int load_words(const uint32_t* from, int n) {
    return _mm512_maskz_loadu_epi32(static_cast<__mmask16>(first_lanes(n)), from);
  }

  template <int kShift>
  static Int shift_right(Int value) {
    return _mm512_srli_epi32(value, kShift);
  }
  template <int kShift>
  static Int shift_left(Int value) {
    return _mm512_slli_epi32(value, kShift);
  }
  static Int bit_or(Int a, Int b) { return _mm512_or_si512(a, b); }

  static Int load_index(const int32_t* from) { return _mm512_load_si512(from); }
  static Int permute(Int value, Int index) { return _mm512_permutexvar_epi32(index, value); }
  static Int shift_right(Int value, Int counts) { return _mm512_srlv_epi32(value, counts); }
  static Int shift_left(Int value, Int counts) { return _mm512_sllv_epi32(value, counts); }

  // 48 consecutive words to words 0, 1 and 2 of 16 triples.
  static void deinterleave(Int (&words)[3]) {
    // Element i of output w is word 3i + w. Of the first two registers those below 32, ...
    const Int first[3] = {
        _mm512_setr_epi32(0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 0, 0, 0, 0, 0),
        _mm512_setr_epi32(1, 4, 7, 10, 13, 16, 19, 22, 25, 28, 31, 0, 0, 0, 0, 0),
        _mm512_setr_epi32(2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 0, 0, 0, 0, 0, 0),
    };
    // ... then those of the third (16 + word - 32), beside what is there.
    const Int second[3] = {
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 17, 20, 23, 26, 29),
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 18, 21, 24, 27, 30),
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 19, 22, 25, 28, 31),
    };
    Int out[3];
    for (int w = 0; w < 3; ++w)
      out[w] = _mm512_permutex2var_epi32(_mm512_permutex2var_epi32(words[0], first[w], words[1]), second[w], words[2]);
    for (int w = 0; w < 3; ++w) words[w] = out[w];
  }

  // The first n <= 16 entries of a row's table as fp32.
  template <int kEntries>
  static Float load_entries(const void* from, DType dtype) {
    constexpr __mmask16 mask = static_cast<__mmask16>((1u << kEntries) - 1);
    if (dtype == DType::kFloat32) return _mm512_maskz_loadu_ps(mask, from);
    const __m256i half = _mm256_maskz_loadu_epi16(mask, from);
    if (dtype == DType::kFloat16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }

  // A row's table. Look-ups ignore what lies above an index in its lane.
  //
  // vpermps takes 4 bits of index, so with narrower widths one index finds several neighbours:
  // `kPart` 0 is the weight in its lowest bits, 1 the next, and no shift is needed in between.
  static constexpr int kIndexBits = 4;
  template <int kBits>
  struct Table {
    static constexpr int kParts = kBits == 3 || kBits > 4 ? 1 : kIndexBits / kBits;
    Float entries[kBits == 5 ? 2 : kParts];
    float memory[kBits > 5 ? 1 << kBits : 1];

    Table() = default;
    Table(const void* from, DType dtype) {
      if constexpr (kBits <= 4) {
        const Float all = load_entries<1 << kBits>(from, dtype);
        const Int lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        for (int part = 0; part < kParts; ++part) {
          const Int index = _mm512_srl_epi32(lane, _mm_cvtsi32_si128(part * kBits));
          entries[part] = _mm512_permutexvar_ps(_mm512_and_si512(index, _mm512_set1_epi32((1 << kBits) - 1)), all);
        }
      } else if constexpr (kBits == 5) {
        entries[0] = load_entries<16>(from, dtype);
        entries[1] = load_entries<16>(static_cast<const char*>(from) + 16 * element_size(dtype), dtype);
      } else {
        load_floats(from, dtype, 0, 1 << kBits, memory);
      }
    }

    template <int kPart = 0>
    Float lookup(Int index) const {
      if constexpr (kBits <= 4) return _mm512_permutexvar_ps(index, entries[kPart]);
      if constexpr (kBits == 5) return _mm512_permutex2var_ps(entries[0], index, entries[1]);
      const Int masked = _mm512_and_si512(index, _mm512_set1_epi32((1 << kBits) - 1));
      return _mm512_i32gather_ps(masked, memory, 4);
    }
  };
};

// Thirty-two 16-bit lanes: decodes to bf16 or fp16 bit patterns.
struct Avx512Narrow {
  static constexpr int kLanes = 32;
  static constexpr int kLaneBits = 16;
  using Element = uint16_t;
  using Index = int16_t;
  using Int = __m512i;

  static void store(uint16_t* to, Int value) { _mm512_storeu_si512(to, value); }
  static Int load_words(const uint32_t* from, int n) { return Avx512::load_words(from, n); }
  static Int bit_or(Int a, Int b) { return _mm512_or_si512(a, b); }
  static Int load_index(const int16_t* from) { return _mm512_load_si512(from); }
  static Int permute(Int value, Int index) { return _mm512_permutexvar_epi16(index, value); }
  static Int shift_right(Int value, Int counts) { return _mm512_srlv_epi16(value, counts); }
  static Int shift_left(Int value, Int counts) { return _mm512_sllv_epi16(value, counts); }

  // A row's table, rounded to `Out`.
  template <int kBits>
  struct Table {
    Int entries[2];

    template <class Out>
    Table(const void* from, DType dtype, Out) {
      alignas(64) float floats[64];
      alignas(64) Out rounded[64];
      if constexpr (kBits <= 4) {
        Avx512::store(floats, Avx512::Table<kBits>(from, dtype).entries[0]);
        from_floats(floats, 16, rounded);
        entries[0] = _mm512_broadcast_i64x4(_mm256_load_si256(reinterpret_cast<const __m256i*>(rounded)));
      } else {
        load_floats(from, dtype, 0, 1 << kBits, floats);
        from_floats(floats, 1 << kBits, rounded);
        entries[0] = _mm512_load_si512(rounded);
        if constexpr (kBits == 6) entries[1] = _mm512_load_si512(rounded + 32);
      }
    }

    Int lookup(Int index) const {
      if constexpr (kBits <= 5) return _mm512_permutexvar_epi16(index, entries[0]);
      return _mm512_permutex2var_epi16(entries[0], index, entries[1]);
    }
  };
};

}  // namespace
}  // namespace squeezellm_hf
