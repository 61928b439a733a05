#include "instruction_set.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <vector>

#ifdef SQUEEZELLM_HF_X86
#include <cpuid.h>
#endif

namespace squeezellm_hf {
namespace {

struct Candidate {
  const char* name;
  bool supported;
  const Kernels& (*kernels)();
};

#ifdef SQUEEZELLM_HF_X86

struct Features {
  bool avx2 = false;
  bool avx512 = false;
  bool avx512_bf16 = false;
};

// Which register states the operating system saves on a context switch (XCR0).
uint64_t saved_states() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t{high} << 32 | low;
}

Features detect() {
  Features features;
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return features;
  const bool osxsave = c & bit_OSXSAVE;
  const bool fma_f16c = (c & bit_FMA) && (c & bit_F16C);
  if (!osxsave || !fma_f16c || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return features;
  const uint64_t saved = saved_states();
  const bool saves_ymm = (saved & 0x06) == 0x06;
  const bool saves_zmm = (saved & 0xe6) == 0xe6;
  constexpr uint32_t kAvx512 = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
  features.avx2 = saves_ymm && (b & bit_AVX2);
  features.avx512 = features.avx2 && saves_zmm && (b & kAvx512) == kAvx512;
  const bool bf16 = a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & bit_AVX512BF16);
  features.avx512_bf16 = features.avx512 && bf16;
  return features;
}

const std::vector<Candidate>& candidates() {
  static const Features features = detect();
  static const std::vector<Candidate> all = {
      {"scalar", true, scalar_kernels},
      {"avx2", features.avx2, avx2_kernels},
      {"avx512", features.avx512, avx512_kernels},
      {"avx512_bf16", features.avx512_bf16, avx512_bf16_kernels},
  };
  return all;
}

#else

const std::vector<Candidate>& candidates() {
  static const std::vector<Candidate> all = {{"scalar", true, scalar_kernels}};
  return all;
}

#endif

const Kernels& fastest() {
  const Candidate* best = nullptr;
  for (const Candidate& candidate : candidates())
    if (candidate.supported) best = &candidate;
  return best->kernels();
}

const Kernels& named(const std::string& name, const char* source) {
  for (const Candidate& candidate : candidates())
    if (name == candidate.name && candidate.supported) return candidate.kernels();
  throw std::invalid_argument(std::string(source) + "=" + name +
                              " is unknown or not supported by this machine; it can run: " + available_kernels());
}

const Kernels& from_environment() {
  const char* name = std::getenv("SQUEEZELLM_HF_ISA");
  return name == nullptr || *name == '\0' ? fastest() : named(name, "SQUEEZELLM_HF_ISA");
}

std::atomic<const Kernels*> active{nullptr};

}  // namespace

const Kernels& active_kernels() {
  const Kernels* kernels = active.load(std::memory_order_acquire);
  if (kernels == nullptr) {
    kernels = &from_environment();
    active.store(kernels, std::memory_order_release);
  }
  return *kernels;
}

void select_kernels(const std::string& name) {
  active.store(name.empty() ? &from_environment() : &named(name, "instruction set"), std::memory_order_release);
}

std::string available_kernels() {
  std::string names;
  for (const Candidate& candidate : candidates())
    if (candidate.supported) names += (names.empty() ? "" : " ") + std::string(candidate.name);
  return names;
}

}  // namespace squeezellm_hf
