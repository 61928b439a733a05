// AVX2 with FMA and F16C as the lanes that the kernels are written in.
#include <immintrin.h>
#include <stdint.h>

#include "fetch.h"
#include "linear.h"

namespace squeezellm_hf {
namespace {

alignas(32) constexpr int32_t kLaneNumbers[8] = {0, 1, 2, 3, 4, 5, 6, 7};

// Eight 32-bit lanes.
struct Avx2 {
  static constexpr int kLanes = 8;
  static constexpr int kLaneBits = 32;
  static constexpr int kRegisters = 16;
  using Element = float;
  using Index = int32_t;
  using Int = __m256i;
  using Float = __m256;

  static Int first_lanes(int n) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), load_index(kLaneNumbers)); }

  static Float zero() { return _mm256_setzero_ps(); }
  static Float load(const float* from) { return _mm256_loadu_ps(from); }
  static Float load_first(const float* from, int n) { return _mm256_maskload_ps(from, first_lanes(n)); }
  static void store(float* to, Float value) { _mm256_storeu_ps(to, value); }
  static Float fetch(const float* x, const uint16_t* columns, uint16_t limit) { return fetch8(x, columns, limit); }
  static Float multiply(Float a, Float b) { return _mm256_mul_ps(a, b); }
  static Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
  static Float multiply_add(Float a, Float b, Float sum) { return _mm256_fmadd_ps(a, b, sum); }
  static float reduce_add(Float value) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
  }
  static Float keep(Float value, int n) { return _mm256_and_ps(value, _mm256_castsi256_ps(first_lanes(n))); }

  static Int load_words(const uint32_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
  static Int load_words(const uint32_t* from, int n) {
    return _mm256_maskload_epi32(reinterpret_cast<const int*>(from), first_lanes(n));
  }

  template <int kShift>
  static Int shift_right(Int value) {
    return _mm256_srli_epi32(value, kShift);
  }
  template <int kShift>
  static Int shift_left(Int value) {
    return _mm256_slli_epi32(value, kShift);
  }
  static Int bit_or(Int a, Int b) { return _mm256_or_si256(a, b); }

  static Int load_index(const int32_t* from) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(from)); }
  static Int permute(Int value, Int index) { return _mm256_permutevar8x32_epi32(value, index); }
  static Int shift_right(Int value, Int counts) { return _mm256_srlv_epi32(value, counts); }
  static Int shift_left(Int value, Int counts) { return _mm256_sllv_epi32(value, counts); }

  // 24 consecutive words to words 0, 1 and 2 of 8 triples: word 3i + w of the 24 for element i.
  static void deinterleave(Int (&words)[3]) {
    const Int a = words[0], b = words[1], c = words[2];
    // In each register the wanted words lie at different lanes, so a blend brings them together
    // and one permute orders them.
    words[0] =
        permute(_mm256_blend_epi32(_mm256_blend_epi32(a, b, 0x92), c, 0x24), _mm256_setr_epi32(0, 3, 6, 1, 4, 7, 2, 5));
    words[1] =
        permute(_mm256_blend_epi32(_mm256_blend_epi32(a, b, 0x24), c, 0x49), _mm256_setr_epi32(1, 4, 7, 2, 5, 0, 3, 6));
    words[2] =
        permute(_mm256_blend_epi32(_mm256_blend_epi32(a, b, 0x49), c, 0x92), _mm256_setr_epi32(2, 5, 0, 3, 6, 1, 4, 7));
  }

  // A row's table. Look-ups ignore what lies above an index in its lane.
  static constexpr int kIndexBits = 3;
  template <int kBits>
  struct Table {
    static constexpr int kParts = 1;
    Float entries[2];  // of 8 and 16 entries
    float memory[kBits > 4 ? 1 << kBits : 1];

    Table() = default;
    Table(const void* from, DType dtype) {
      if constexpr (kBits <= 4) {
        float floats[16] = {};
        load_floats(from, dtype, 0, 1 << kBits, floats);
        const Int repeat = _mm256_and_si256(load_index(kLaneNumbers), _mm256_set1_epi32((1 << kBits) - 1));
        entries[0] = _mm256_permutevar8x32_ps(load(floats), repeat);
        entries[1] = load(floats + 8);
      } else {
        load_floats(from, dtype, 0, 1 << kBits, memory);
      }
    }

    template <int kPart = 0>
    Float lookup(Int index) const {
      if constexpr (kBits <= 3) return _mm256_permutevar8x32_ps(entries[0], index);
      if constexpr (kBits == 4) {
        const Float high = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));  // bit 3 is the sign
        return _mm256_blendv_ps(_mm256_permutevar8x32_ps(entries[0], index),
                                _mm256_permutevar8x32_ps(entries[1], index), high);
      }
      const Int masked = _mm256_and_si256(index, _mm256_set1_epi32((1 << kBits) - 1));
      return _mm256_i32gather_ps(memory, masked, 4);
    }
  };
};

}  // namespace

const Kernels& avx2_kernels() {
  using Large = LargeBatch<Avx2, void, FloatDot<Avx2>>;
  static const Kernels kernels = Linear<Avx2, void, Large>::kernels("avx2");
  return kernels;
}

}  // namespace squeezellm_hf
