// x at several columns. Separate loads put together beat the gather instruction on the processors
// we measured (Zen 5: 5.7 against 7.8 ns for 18 entries), for 8 lanes as for 16.
#pragma once

#include <immintrin.h>
#include <stdint.h>

namespace squeezellm_hf {
namespace {

// x[min(columns[i], limit)] for 8 columns.
inline __m256 fetch8(const float* x, const uint16_t* columns, uint16_t limit) {
  const __m128i all = _mm_min_epu16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(columns)),
                                    _mm_set1_epi16(static_cast<int16_t>(limit)));
  const uint64_t a = static_cast<uint64_t>(_mm_extract_epi64(all, 0));
  const uint64_t b = static_cast<uint64_t>(_mm_extract_epi64(all, 1));
  const __m128 low = _mm_setr_ps(x[a & 0xffff], x[a >> 16 & 0xffff], x[a >> 32 & 0xffff], x[a >> 48]);
  const __m128 high = _mm_setr_ps(x[b & 0xffff], x[b >> 16 & 0xffff], x[b >> 32 & 0xffff], x[b >> 48]);
  return _mm256_set_m128(high, low);
}

}  // namespace
}  // namespace squeezellm_hf
