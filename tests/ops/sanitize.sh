#!/bin/sh
# Calls of every CUDA kernel under compute-sanitizer: reads and writes out of bounds, and races
# for shared memory. Only our kernels are watched.
#
#   sh tests/ops/sanitize.sh                 memcheck and racecheck
#   sh tests/ops/sanitize.sh synccheck       another tool
#
# PYTHON: the interpreter with the installed package (default: python3).
set -eu
cd "$(dirname "$0")/../.."
# Each tensor an allocation of its own, so that a step beyond its end is seen.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
for tool in ${*:-memcheck racecheck}; do
    echo "== $tool"
    compute-sanitizer --tool "$tool" --error-exitcode 1 --kernel-name kernel_substring=squeezellm \
        "${PYTHON:-python3}" -m tests.ops.sanitized_calls
done
