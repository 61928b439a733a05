// The tensor core of compute capability 9.0. A warpgroup (4 warps) multiplies 64 lines that its registers hold with up
// to 128 lines of a tile in shared memory; a warp's registers hold the sums of 16 of the 64, in the layout of
// multiply_accumulate.
#pragma once

#include "common.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define SQUEEZELLM_HF_WGMMA
#endif

namespace squeezellm_hf::cuda {

constexpr int kGroupThreads = 128;
constexpr int kGroupLines = 64;     // of a product's left operand
constexpr int kProductLines = 128;  // of its right operand
constexpr int kProductDepth = 16;   // numbers of a line that one product takes

#ifdef SQUEEZELLM_HF_WGMMA

// Lines of 64 16-bit numbers, their 16-byte chunks permuted by the line's number modulo 8 (the 128-byte
// swizzle), 8 lines 1024 bytes apart; `address` lies within a line where the product starts.
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t address) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kEightLines = uint64_t{1024 / 16} << 32;
  constexpr uint64_t kUnused = uint64_t{1} << 16;
  return kSwizzle128 | kEightLines | kUnused | (address & 0x3FFFF) >> 4;
}

// Orders the products after earlier writes of their registers.
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int kPending>
__device__ __forceinline__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// A warpgroup takes registers that others of the block give up; all its threads call it.
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void give_up_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// sums += a b in the background: a warp's 16 lines of a in registers, as in multiply_accumulate, and 16, 32, 64 or 128
// lines of b, as matrix_descriptor says.
template <class T>
__device__ void multiply_fragment(float (&sums)[2][4], const uint32_t (&a)[4], uint64_t b);
template <class T>
__device__ void multiply_fragment(float (&sums)[4][4], const uint32_t (&a)[4], uint64_t b);
template <class T>
__device__ void multiply_fragment(float (&sums)[8][4], const uint32_t (&a)[4], uint64_t b);
template <class T>
__device__ void multiply_fragment(float (&sums)[16][4], const uint32_t (&a)[4], uint64_t b);

// Operands of the instruction: sums[n][0..3] for all n, then a, then b.
#define SUMS_1(n) "+f"(sums[n][0]), "+f"(sums[n][1]), "+f"(sums[n][2]), "+f"(sums[n][3])
#define SUMS_2(n) SUMS_1(n), SUMS_1(n + 1)
#define SUMS_4(n) SUMS_2(n), SUMS_2(n + 2)
#define SUMS_8(n) SUMS_4(n), SUMS_4(n + 4)
#define SUMS_16(n) SUMS_8(n), SUMS_8(n + 8)
// Their names there.
#define NAMES_2 "%0, %1, %2, %3, %4, %5, %6, %7"
#define NAMES_4 NAMES_2 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define NAMES_8 NAMES_4 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_16                                                                       \
  NAMES_8                                                                              \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA(columns, name) \
  "{.reg .pred add; setp.eq.b32 add, 0, 0; wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." name "." name " {"

// lines: 8 columns each; operands: the names of a and b.
#define MULTIPLY_FRAGMENT(type, name, columns, lines, operands)                                            \
  template <>                                                                                              \
  __device__ __forceinline__ void multiply_fragment<type>(float (&sums)[lines][4], const uint32_t (&a)[4], \
                                                          uint64_t b) {                                    \
    asm volatile(WGMMA(columns, name) NAMES_##lines "}, " operands ", add, 1, 1, 0;}"                      \
                 : SUMS_##lines(0)                                                                         \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                    \
  }
#define MULTIPLY_FRAGMENTS(type, name)                                \
  MULTIPLY_FRAGMENT(type, name, "16", 2, "{%8, %9, %10, %11}, %12")   \
  MULTIPLY_FRAGMENT(type, name, "32", 4, "{%16, %17, %18, %19}, %20") \
  MULTIPLY_FRAGMENT(type, name, "64", 8, "{%32, %33, %34, %35}, %36") \
  MULTIPLY_FRAGMENT(type, name, "128", 16, "{%64, %65, %66, %67}, %68")

MULTIPLY_FRAGMENTS(__half, "f16")
MULTIPLY_FRAGMENTS(__nv_bfloat16, "bf16")

#undef MULTIPLY_FRAGMENTS
#undef MULTIPLY_FRAGMENT
#undef WGMMA
#undef NAMES_16
#undef NAMES_8
#undef NAMES_4
#undef NAMES_2
#undef SUMS_16
#undef SUMS_8
#undef SUMS_4
#undef SUMS_2
#undef SUMS_1

#endif

}  // namespace squeezellm_hf::cuda
