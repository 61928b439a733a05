// The tensor core of compute capability 9.0: products whose right operand stays in shared memory.
// A warpgroup (4 warps) multiplies 64 rows; a warp's registers hold its 16 rows of the left operand
// and of the sums in the layouts of multiply_accumulate.
#pragma once

#include "common.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define SQUEEZELLM_HF_WGMMA
#endif

#ifdef SQUEEZELLM_HF_WGMMA

namespace squeezellm_hf::cuda {

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

// Makes earlier writes to shared memory visible to the products.
__device__ __forceinline__ void publish_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// sums += a b in the background, for kColumns columns.
template <class T, int kColumns>
__device__ void multiply_group(float (&sums)[kColumns / 8][4], const uint32_t (&a)[4], uint64_t b);

// Operands of one instruction: sums[n][0..3] for all n, then a, then b.
#define SUMS_1(n) "+f"(sums[n][0]), "+f"(sums[n][1]), "+f"(sums[n][2]), "+f"(sums[n][3])
#define SUMS_2(n) SUMS_1(n), SUMS_1(n + 1)
#define SUMS_4(n) SUMS_2(n), SUMS_2(n + 2)
#define SUMS_8(n) SUMS_4(n), SUMS_4(n + 4)
#define SUMS_16(n) SUMS_8(n), SUMS_8(n + 8)
#define SUMS_32(n) SUMS_16(n), SUMS_16(n + 16)
#define MULTIPLY_GROUP(type, name, columns, registers, a0, a1, a2, a3, b, ...)                                         \
  template <>                                                                                                          \
  __device__ __forceinline__ void multiply_group<type, columns>(float (&sums)[columns / 8][4], const uint32_t (&a)[4], \
                                                                uint64_t descriptor) {                                 \
    asm volatile("{.reg .pred add; setp.eq.b32 add, 0, 0; wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." name  \
                 "." name " {" registers "}, {" a0 ", " a1 ", " a2 ", " a3 "}, " b ", add, 1, 1, 0;}"                  \
                 : __VA_ARGS__                                                                                         \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor));                                       \
  }
#define MULTIPLY_GROUPS(columns, registers, a0, a1, a2, a3, b, ...)                 \
  MULTIPLY_GROUP(__half, "f16", columns, registers, a0, a1, a2, a3, b, __VA_ARGS__) \
  MULTIPLY_GROUP(__nv_bfloat16, "bf16", columns, registers, a0, a1, a2, a3, b, __VA_ARGS__)

MULTIPLY_GROUPS(16, "%0, %1, %2, %3, %4, %5, %6, %7", "%8", "%9", "%10", "%11", "%12", SUMS_2(0))
MULTIPLY_GROUPS(32, "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15", "%16", "%17", "%18", "%19",
                "%20", SUMS_4(0))
MULTIPLY_GROUPS(64,
                "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31",
                "%32", "%33", "%34", "%35", "%36", SUMS_8(0))
MULTIPLY_GROUPS(128,
                "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63",
                "%64", "%65", "%66", "%67", "%68", SUMS_16(0))
MULTIPLY_GROUPS(256,
                "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
                "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
                "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
                "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
                "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127",
                "%128", "%129", "%130", "%131", "%132", SUMS_32(0))

#undef MULTIPLY_GROUPS
#undef MULTIPLY_GROUP
#undef SUMS_32
#undef SUMS_16
#undef SUMS_8
#undef SUMS_4
#undef SUMS_2
#undef SUMS_1

}  // namespace squeezellm_hf::cuda

#endif
