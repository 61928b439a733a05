// Conversions between fp32 and the 16-bit floats, and of whole arrays.
//
// Everything is `static`: each kernel file gets its own copy, compiled for its instruction set.
#pragma once

#include <stdint.h>
#include <string.h>

#ifdef __F16C__
#include <immintrin.h>
#endif

#include "kernels.h"

namespace squeezellm_hf {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

static inline float float_from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

static inline uint32_t bits_from_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

static inline float to_float(float value) { return value; }

static inline float to_float(bf16 value) { return float_from_bits(uint32_t{value.bits} << 16); }

static inline float to_float(fp16 value) {
#ifdef __F16C__
  return _cvtsh_ss(value.bits);
#else
  // Exponent and mantissa moved into place are the value times 2^-112, subnormals included;
  // one exact multiplication puts the bias right. Infinity and NaN need the full exponent.
  const uint32_t sign = (value.bits & 0x8000u) << 16;
  const uint32_t magnitude = (value.bits & 0x7fffu) << 13;
  const float scaled = float_from_bits(magnitude) * 0x1p112f;
  const uint32_t bits = magnitude >= 0x0f800000u ? (magnitude | 0x7f800000u) : bits_from_float(scaled);
  return float_from_bits(bits | sign);
#endif
}

static inline void from_float(float value, float* out) { *out = value; }

static inline void from_float(float value, bf16* out) {
  const uint32_t bits = bits_from_float(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest even
  const uint32_t nan = (bits >> 16) | 0x40u;
  out->bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}

static inline void from_float(float value, fp16* out) {
#ifdef __F16C__
  out->bits = _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const uint32_t bits = bits_from_float(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u | ((magnitude >> 13) & 0x3ffu);  // NaN
  } else if (magnitude >= 0x477ff000u) {
    half = 0x7c00u;  // 65520 and above round to infinity
  } else if (magnitude < 0x38800000u) {
    // Below 2^-14: adding 0.5 lets the FPU round to a multiple of 2^-24, the subnormal step.
    half = bits_from_float(float_from_bits(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  out->bits = static_cast<uint16_t>(half | sign);
#endif
}

template <class From>
static inline void to_floats(const From* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = to_float(from[i]);
}

template <class To>
static inline void from_floats(const float* from, int64_t n, To* to) {
  for (int64_t i = 0; i < n; ++i) from_float(from[i], &to[i]);
}

#ifdef __F16C__
static inline void to_floats(const fp16* from, int64_t n, float* to) {
  const int64_t whole = n / 8 * 8;
  for (int64_t i = 0; i < whole; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  for (int64_t i = whole; i < n; ++i) to[i] = to_float(from[i]);
}

static inline void from_floats(const float* from, int64_t n, fp16* to) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  const int64_t whole = n / 8 * 8;
  for (int64_t i = 0; i < whole; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), kNearest));
  for (int64_t i = whole; i < n; ++i) from_float(from[i], &to[i]);
}
#endif

// Element `i` of an array whose type is known at run time only.
static inline float element(const void* array, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kBFloat16:
      return to_float(static_cast<const bf16*>(array)[i]);
    case DType::kFloat16:
      return to_float(static_cast<const fp16*>(array)[i]);
    default:
      return static_cast<const float*>(array)[i];
  }
}

// Elements [first, first + n) of such an array.
static inline void load_floats(const void* array, DType dtype, int64_t first, int64_t n, float* to) {
  switch (dtype) {
    case DType::kBFloat16:
      return to_floats(static_cast<const bf16*>(array) + first, n, to);
    case DType::kFloat16:
      return to_floats(static_cast<const fp16*>(array) + first, n, to);
    default:
      return to_floats(static_cast<const float*>(array) + first, n, to);
  }
}

static inline void store_floats(const float* from, int64_t n, void* array, DType dtype, int64_t first) {
  switch (dtype) {
    case DType::kBFloat16:
      return from_floats(from, n, static_cast<bf16*>(array) + first);
    case DType::kFloat16:
      return from_floats(from, n, static_cast<fp16*>(array) + first);
    default:
      return from_floats(from, n, static_cast<float*>(array) + first);
  }
}

}  // namespace squeezellm_hf
