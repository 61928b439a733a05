"""Calls that reach every CUDA kernel with small tensors; run by ``sanitize.sh``."""

import torch

from squeezellm_hf import ops
from squeezellm_hf.ops import native
from tests.ops.oracle import TORCH_DTYPES, make_weight, make_x

# Read 16 bytes at a time with rows to spare in the last tile, and a size that nothing divides.
SHAPES = [(136, 512), (33, 77)]
BATCHES = [1, 2, 4, 8, 9, 16, 24, 33, 64, 128, 256, 300]


def call(shape: tuple[int, int], bits: int, density: float, dtype: str, hostile: bool) -> None:
    """All batches and dequantization; with ``hostile``, a CSR part that holds nonsense."""
    weight = make_weight(*shape, bits, density=density, full_row=True, table_dtype=dtype)
    tensors = {name: tensor.cuda() for name, tensor in weight.tensors.items()}
    if hostile:
        for name in ("crow_indices", "col_indices"):
            limits = torch.iinfo(tensors[name].dtype)
            tensors[name].random_(limits.min, limits.max)
    x = make_x(max(BATCHES), shape[1], dtype).cuda()
    for batch in BATCHES:
        y = ops.lut_linear(x[:batch], **tensors, bits=bits)
        if not hostile and not bool(y.isfinite().all()):
            raise AssertionError(f"not finite: {shape}, {bits} bits, batch {batch}")
    ops.lut_dequantize(**tensors, bits=bits, in_features=shape[1], dtype=TORCH_DTYPES[dtype])


def main() -> None:
    if not native.status().cuda_loaded:
        raise SystemExit(f"the CUDA kernels are not loaded: {native.status().cuda_reason}")
    for shape in SHAPES:
        for bits in (2, 3, 4):
            call(shape, bits, 0.0, "bf16", hostile=False)
            call(shape, bits, 0.05, "fp16", hostile=False)
        call(shape, 4, 0.05, "bf16", hostile=True)
    call(SHAPES[0], 7, 0.05, "fp16", hostile=False)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
