// AVX-512 with bf16 instructions: for bf16 x, larger batches multiply bf16 pairs into fp32 sums.
#include "avx512.h"
#include "linear.h"

namespace squeezellm_hf {
namespace {

struct Bf16Dot {
  using Element = bf16;
  using Vector = __m512bh;
  static constexpr DType kDType = DType::kBFloat16;
  static constexpr int kStep = 32;
  static Vector load(const bf16* from) { return (__m512bh)_mm512_loadu_si512(from); }
  static __m512 multiply_add(Vector a, Vector b, __m512 sum) { return _mm512_dpbf16_ps(sum, a, b); }
  static void convert(const LinearCall& call, int64_t first, int64_t n, bf16* to) {
    memcpy(to, static_cast<const bf16*>(call.x) + first, static_cast<size_t>(n) * sizeof(bf16));
  }
};

// By the type of x.
struct Large {
  using Pairs = LargeBatch<Avx512, Avx512Narrow, Bf16Dot>;
  using Floats = LargeBatch<Avx512, Avx512Narrow, FloatDot<Avx512>>;
  static constexpr int kRowBlock = Pairs::kRowBlock;

  static bool pairs(const LinearCall& call) { return call.dtype == DType::kBFloat16; }
  static int64_t workspace_bytes(const LinearCall& call) {
    return pairs(call) ? Pairs::workspace_bytes(call) : Floats::workspace_bytes(call);
  }
  static int64_t scratch_bytes(const LinearCall& call) {
    return pairs(call) ? Pairs::scratch_bytes(call) : Floats::scratch_bytes(call);
  }
  static void pack_activations(const LinearCall& call, int64_t begin, int64_t end) {
    return pairs(call) ? Pairs::pack_activations(call, begin, end) : Floats::pack_activations(call, begin, end);
  }
  static void linear_rows(const LinearCall& call, int64_t begin, int64_t end, void* scratch) {
    return pairs(call) ? Pairs::linear_rows(call, begin, end, scratch) : Floats::linear_rows(call, begin, end, scratch);
  }
};

}  // namespace

const Kernels& avx512_bf16_kernels() {
  static const Kernels kernels = Linear<Avx512, Avx512Narrow, Large>::kernels("avx512_bf16");
  return kernels;
}

}  // namespace squeezellm_hf
