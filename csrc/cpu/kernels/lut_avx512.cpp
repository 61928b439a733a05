// AVX-512 without bf16 instructions: fp32 arithmetic for every type of x.
#include "avx512.h"
#include "linear.h"

namespace squeezellm_hf {

const Kernels& avx512_kernels() {
  using Large = LargeBatch<Avx512, Avx512Narrow, FloatDot<Avx512>>;
  static const Kernels kernels = Linear<Avx512, Avx512Narrow, Large>::kernels("avx512");
  return kernels;
}

}  // namespace squeezellm_hf
