// New tensors for the ops of both devices.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <stdexcept>
#include <vector>

namespace squeezellm_hf {

// An uninitialized contiguous tensor on the device of `like`; of its dtype too, or of `dtype` as
// aoti_torch_dtype_*() numbers them. torch::stable::new_empty looks its operator up by name and
// boxes its arguments at every call.
inline torch::stable::Tensor empty(const torch::stable::Tensor& like, const std::vector<int64_t>& sizes,
                                   int32_t dtype = -1) {
  const auto check = [](AOTITorchError error) {
    if (error != AOTI_TORCH_SUCCESS) throw std::runtime_error("torch could not allocate a tensor");
  };
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= sizes[d] > 0 ? sizes[d] : 1;
  }
  int32_t device_type = 0;
  check(aoti_torch_get_device_type(like.get(), &device_type));
  if (dtype < 0) check(aoti_torch_get_dtype(like.get(), &dtype));
  AtenTensorHandle handle = nullptr;
  check(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), dtype, device_type,
                                 like.get_device_index(), &handle));
  return torch::stable::Tensor(handle);
}

}  // namespace squeezellm_hf
