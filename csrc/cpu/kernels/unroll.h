// Compile-time loops: shifts and permutes need constants, and the standard library's own tools for
// this would put shared functions into files compiled with instruction-set flags.
#pragma once

#include <stdint.h>

#define SQ_INLINE static inline __attribute__((always_inline))
#define SQ_INLINE_LAMBDA __attribute__((always_inline))

namespace squeezellm_hf {

template <int kValue>
struct Constant {
  constexpr operator int() const { return kValue; }
};

template <int kBegin, int kEnd, class Body>
SQ_INLINE void unroll(Body body) {
  if constexpr (kBegin < kEnd) {
    body(Constant<kBegin>{});
    unroll<kBegin + 1, kEnd>(body);
  }
}

// Asks for the cache line that lies `bytes_ahead` behind an address, mapped or not. Always inlined:
// GCC takes a function that does nothing but prefetch for one without effect and drops its calls.
SQ_INLINE void prefetch(const void* address, int64_t bytes_ahead) {
  const uintptr_t target = reinterpret_cast<uintptr_t>(address) + static_cast<uintptr_t>(bytes_ahead);
  __builtin_prefetch(reinterpret_cast<const void*>(target));
}

template <class A, class B>
static constexpr bool same = false;
template <class A>
static constexpr bool same<A, A> = true;

}  // namespace squeezellm_hf
