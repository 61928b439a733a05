// What squeezellm_hf/ops/native.py asks of the library through ctypes. Strings stay valid until the
// same thread's next call.
#include <exception>
#include <string>

#include "instruction_set.h"

#define SQUEEZELLM_HF_EXPORT extern "C" __attribute__((visibility("default")))

// Null, or why the instruction set cannot be used. An empty name means the default choice.
SQUEEZELLM_HF_EXPORT const char* squeezellm_hf_select_instruction_set(const char* name) {
  static thread_local std::string error;
  try {
    squeezellm_hf::select_kernels(name);
    return nullptr;
  } catch (const std::exception& exception) {
    error = exception.what();
    return error.c_str();
  }
}

SQUEEZELLM_HF_EXPORT const char* squeezellm_hf_instruction_set() { return squeezellm_hf::active_kernels().name; }

SQUEEZELLM_HF_EXPORT const char* squeezellm_hf_available_instruction_sets() {
  static thread_local std::string names;
  names = squeezellm_hf::available_kernels();
  return names.c_str();
}
