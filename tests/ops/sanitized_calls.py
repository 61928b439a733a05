"""Calls of the CUDA kernels with small tensors, for the batches given; run by ``sanitize.sh``."""

import sys

import torch

from squeezellm_hf import ops
from squeezellm_hf.ops import native
from tests.ops import groups
from tests.ops.oracle import TORCH_DTYPES, make_weight, make_x

# Read 16 bytes at a time with rows to spare in the last tile, and a size that nothing divides.
SHAPES = [(136, 512), (33, 77)]
# Of which blocks share tiles on an H200, from 65 activations on.
SHARED = (11000, 2048)
# Enough 2-bit weights to be multiplied by counting bits.
COUNTED = (6150, 4096)
# Of which an H200 has two blocks a multiprocessor, and of which two blocks share each tile.
NARROW = (2200, 512)
HALVED = (40, 8200)


def end_amid_a_chunk(tensors: dict[str, torch.Tensor]) -> None:
    """Shorten the CSR part so that its entries, copied eight at a time, end amid eight of them."""
    if "values" not in tensors or len(tensors["values"]) % 8:
        return
    last = len(tensors["values"]) - 1
    tensors["crow_indices"].clamp_(max=last)
    for name in ("col_indices", "values"):
        tensors[name] = tensors[name][:last].clone()


def call(
    batches: list[int], shape: tuple[int, int], bits: int, density: float, dtype: str,
    hostile: bool = False,
) -> None:  # fmt: skip
    """All batches, and dequantization; with ``hostile``, a CSR part that holds nonsense."""
    weight = make_weight(*shape, bits, density=density, full_row=True, table_dtype=dtype)
    tensors = {name: tensor.cuda() for name, tensor in weight.tensors.items()}
    end_amid_a_chunk(tensors)
    if hostile:
        for name in ("crow_indices", "col_indices"):
            limits = torch.iinfo(tensors[name].dtype)
            tensors[name].random_(limits.min, limits.max)
    x = make_x(max(batches, default=0), shape[1], dtype).cuda()
    made = f"{shape}, {bits} bits, {density:.0%} sparse, {dtype}"
    for batch in batches:
        print(f"{made}, batch {batch}", flush=True)
        y = ops.lut_linear(x[:batch], **tensors, bits=bits)
        if not hostile and not bool(y.isfinite().all()):
            raise AssertionError("the result is not finite")
    print(f"{made}, dequantized", flush=True)
    ops.lut_dequantize(**tensors, bits=bits, in_features=shape[1], dtype=TORCH_DTYPES[dtype])


def call_group(bits: int, density: float, hostile: bool = False) -> None:
    """Weights of one x in one launch, the last tile of each cut short; and what else it does."""
    made = [
        make_weight(rows, 512, bits, density=density, full_row=True, table_dtype="bf16")
        for rows in (136, 33, 5)
    ]
    tensors = [{name: t.cuda() for name, t in weight.tensors.items()} for weight in made]
    for weight in tensors if hostile else ():
        for name in ("crow_indices", "col_indices"):
            limits = torch.iinfo(weight[name].dtype)
            weight[name].random_(limits.min, limits.max)
    print(f"a group, {bits} bits, {density:.0%} sparse", flush=True)
    x = make_x(1, 512, "bf16").cuda()
    groups.call(x, tensors, bits)
    (_, y, _) = groups.call(x, tensors, bits, norm_weight=x[0], norm_eps=1e-5, silu=0)
    groups.call(x, tensors[1:2], bits, factor=x, residual=y)


def main(batches: list[int]) -> None:
    if not native.status().cuda_loaded:
        raise SystemExit(f"the CUDA kernels are not loaded: {native.status().cuda_reason}")
    for shape in SHAPES:
        for bits in (2, 3, 4):
            call(batches, shape, bits, 0.0, "bf16")
            call(batches, shape, bits, 0.05, "fp16")
        call(batches, shape, 4, 0.05, "bf16", hostile=True)
    if 1 in batches:
        call([1], COUNTED, 2, 0.005, "bf16")
        for bits in (2, 3, 4):
            call([1], NARROW, bits, 0.02, "bf16")
            call([1], HALVED, bits, 0.005, "bf16")
        for bits in (2, 3, 4):
            call_group(bits, 0.0)
            call_group(bits, 0.05)
        call_group(4, 0.05, hostile=True)
    call([batch for batch in batches if 64 < batch <= 100], SHARED, 4, 0.0, "bf16")
    # Without torch's product after it, which has ended with an illegal access under racecheck
    # 2025.3 although it is not watched.
    call([], SHAPES[0], 7, 0.05, "fp16")
    torch.cuda.synchronize()


if __name__ == "__main__":
    main([int(batch) for batch in sys.argv[1:]])
