#!/bin/sh
# Run the tests of the native kernels under AddressSanitizer and UndefinedBehaviorSanitizer: reads
# and writes out of bounds that happen to hit mapped memory end the run.
#
#   PYTHON=.venv/bin/python tests/ops/asan.sh [pytest arguments]
set -eu
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
build=${BUILD_DIR:-build/asan}

cmake -S csrc -B "$build" -G "${CMAKE_GENERATOR:-Unix Makefiles}" -DCMAKE_BUILD_TYPE=RelWithDebInfo \
  -DSQUEEZELLM_HF_SANITIZE=ON -DPython_EXECUTABLE="$("$python" -c 'import sys; print(sys.executable)')"
cmake --build "$build" --parallel "$(nproc)"

# The interpreter is not built with the sanitizer, so its runtime has to come first. Python and
# torch keep memory until they exit (no leak check), and allocators must not be replaced by pools
# that hide the bounds of tensors.
LD_PRELOAD="$(${CXX:-c++} -print-file-name=libasan.so) $(${CXX:-c++} -print-file-name=libstdc++.so)" \
  ASAN_OPTIONS=detect_leaks=0:abort_on_error=1:allocator_may_return_null=1 \
  UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
  SQUEEZELLM_HF_LIBRARY="$build/_native.so" \
  "$python" -m pytest -p no:cacheprovider tests/ops "$@"
