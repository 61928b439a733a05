#!/bin/sh
# Calls of every CUDA kernel under compute-sanitizer: reads and writes out of bounds, and races
# for shared memory. Only our kernels are watched. Exits with 1 if any tool has found anything.
#
#   sh tests/ops/sanitize.sh                 memcheck and racecheck
#   sh tests/ops/sanitize.sh synccheck       another tool
#
# PYTHON: the interpreter with the installed package (default: python3).
#
# Install for it with SQUEEZELLM_HF_SANITIZE=1: reports then name source lines, and every lane of a warp
# arrives at barriers. Usually one does for all after __syncwarp(), which racecheck (to version 2026.4) does not
# follow: of such kernels it reports races that are none.
#
# compute-sanitizer before 2026.4 reports copies of 16 bytes that fill up with zeros (cp.async with a source size)
# as if they read all 16; no kernel makes such copies over a tensor's end.
set -u
cd "$(dirname "$0")/../.."
# Each tensor an allocation of its own, so that a step beyond its end is seen; an error is reported
# by the call that made it.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1 CUDA_LAUNCH_BLOCKING=1
found=0
for tool in ${*:-memcheck racecheck}; do
    # Batches by the kernels that serve them: what stops one leaves the others.
    for batches in "1 2 4" "5 8 9 16 24" "33 64 65 128 256" "300"; do
        echo "== $tool, batches $batches"
        # shellcheck disable=SC2086
        compute-sanitizer --tool "$tool" --error-exitcode 1 \
            --kernel-name kernel_substring=squeezellm \
            "${PYTHON:-python3}" -m tests.ops.sanitized_calls $batches || found=1
    done
done
exit $found
