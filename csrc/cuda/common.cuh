// What the kernels share: 16-bit types, loads, tensor-core products, the sparse part.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "weight.h"

namespace squeezellm_hf::cuda {

constexpr int kWarpLanes = 32;

// The value at `i` of an array whose dtype is known at run time only, as it lies there.
__device__ __forceinline__ uint32_t load_bits(const void* data, DType dtype, int64_t i) {
  return dtype == DType::kFloat32 ? __ldg(static_cast<const uint32_t*>(data) + i)
                                  : __ldg(static_cast<const uint16_t*>(data) + i);
}

__device__ __forceinline__ float float_of_bits(uint32_t bits, DType dtype) {
  if (dtype == DType::kFloat16) return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
  // bf16 is the upper half of fp32.
  return __uint_as_float(dtype == DType::kBFloat16 ? bits << 16 : bits);
}

__device__ __forceinline__ float load_float(const void* data, DType dtype, int64_t i) {
  return float_of_bits(load_bits(data, dtype, i), dtype);
}

template <class T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

// Weights are read once in a call: they bypass L1, which is left to the activations.
__device__ __forceinline__ uint4 load_streamed(const uint4* source) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(source));
  return v;
}

__device__ __forceinline__ void prefetch_l2(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

// (bits & mask) | base, which the compiler does not always find to be one instruction.
__device__ __forceinline__ uint32_t and_or(uint32_t bits, uint32_t mask, uint32_t base) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(result) : "r"(bits), "r"(mask), "r"(base));
  return result;
}

// c += a b for a [16 x 16] (rows lane / 4 and lane / 4 + 8), b [16 x 8] (column lane / 4); each
// register holds two neighbours along the 16.
template <class T>
__device__ __forceinline__ void multiply_accumulate(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                                    uint32_t b0, uint32_t b1) {
  if constexpr (sizeof(T) == sizeof(__half) && !__is_same(T, __nv_bfloat16)) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
}

// The entries [x, y) of one row of the sparse part, both within [0, nnz] whatever the row pointers say:
// a lane's place beyond x, and the row's length, then fit 32 bits.
__device__ __forceinline__ int2 clamped_sparse_row(const LutWeight& weight, int2 row) {
  const int nnz = static_cast<int>(weight.nnz);
  return {min(max(row.x, 0), nnz), min(max(row.y, 0), nnz)};
}

__device__ __forceinline__ int2 sparse_row(const LutWeight& weight, int row) {
  return clamped_sparse_row(weight, {weight.crow_indices[row], weight.crow_indices[row + 1]});
}

// The column of an entry, within the row whatever the tensor says.
__device__ __forceinline__ int sparse_column(const LutWeight& weight, int64_t entry) {
  const uint32_t column = weight.wide_columns ? static_cast<const uint32_t*>(weight.col_indices)[entry]
                                              : static_cast<const uint16_t*>(weight.col_indices)[entry];
  const uint32_t last = static_cast<uint32_t>(weight.in_features) - 1;
  return static_cast<int>(column < last ? column : last);
}

}  // namespace squeezellm_hf::cuda
