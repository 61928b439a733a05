// From dtype and bits, known when a kernel is launched, to its template arguments.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "weight.h"

namespace squeezellm_hf::cuda {

template <class T>
struct Tag {
  using Type = T;
};

// launch(Tag<T>, std::integral_constant<int, bits>) for a 16-bit x and 2 to 4 bits.
template <class Launch>
cudaError_t dispatch(const LinearCall& call, const Launch& launch) {
  const auto with_type = [&](auto type) -> cudaError_t {
    switch (call.weight.bits) {
      case 2:
        return launch(type, std::integral_constant<int, 2>{});
      case 3:
        return launch(type, std::integral_constant<int, 3>{});
      case 4:
        return launch(type, std::integral_constant<int, 4>{});
      default:
        return cudaErrorInvalidValue;
    }
  };
  return call.dtype == DType::kFloat16 ? with_type(Tag<__half>{}) : with_type(Tag<__nv_bfloat16>{});
}

}  // namespace squeezellm_hf::cuda
