// AVX-512 (F, BW, DQ, VL) as the lanes that the kernels are written in.
#pragma once

#include <immintrin.h>
#include <stdint.h>

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
  static void store(float* to, Float value) { _mm512_storeu_ps(to, value); }
  static Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
  static Float multiply_add(Float a, Float b, Float sum) { return _mm512_fmadd_ps(a, b, sum); }
  static float reduce_add(Float value) { return _mm512_reduce_add_ps(value); }
  static Float keep(Float value, int n) { return _mm512_maskz_mov_ps(static_cast<__mmask16>(first_lanes(n)), value); }

  static Int load_words(const uint32_t* from) { return _mm512_loadu_si512(from); }
  static Int load_words(const uint32_t* from, int n) {
    return _mm512_maskz_loadu_epi32(static_cast<__mmask16>(first_lanes(n)), from);
  }
  static void prefetch(const uint32_t* from, int64_t words_ahead) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(from) + static_cast<uintptr_t>(words_ahead) * 4;
    _mm_prefetch(reinterpret_cast<const char*>(address), _MM_HINT_T0);
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

  // Built from at least 64 floats that repeat the table. Look-ups ignore what lies above an index.
  template <int kBits>
  struct Table {
    Float entries[2];  // of 16 and 32 entries
    const float* memory;

    Table() = default;
    explicit Table(const float* from) : entries{_mm512_loadu_ps(from), _mm512_loadu_ps(from + 16)}, memory(from) {}

    Float lookup(Int index) const {
      if constexpr (kBits <= 4) return _mm512_permutexvar_ps(index, entries[0]);
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

  template <int kBits>
  struct Table {
    Int entries[2];
    explicit Table(const uint16_t* from) : entries{_mm512_loadu_si512(from), _mm512_loadu_si512(from + 32)} {}
    Int lookup(Int index) const {
      if constexpr (kBits <= 5) return _mm512_permutexvar_epi16(index, entries[0]);
      return _mm512_permutex2var_epi16(entries[0], index, entries[1]);
    }
  };
};

}  // namespace
}  // namespace squeezellm_hf
