"""Calls of the CUDA kernels, and what the oracle allows them."""

import numpy as np
import pytest
import torch
from torch import Tensor

from squeezellm_hf import ops
from squeezellm_hf.ops import native
from tests.ops.oracle import ROUNDING, Weight

needs_cuda = pytest.mark.skipif(
    not (native.status().cuda_loaded and torch.cuda.is_available()),
    reason=f"no CUDA device, or no CUDA kernels: {native.status().cuda_reason}",
)

# The last three can be read 16 bytes at a time; the others take the kernels' other ways.
SHAPES = [(1, 1), (1, 77), (33, 1), (49, 2051), (18, 576), (130, 1536), (200, 512), (31, 8192)]
MANY_ROWS = (4109, 256)  # of which few activations take another way than of few
# Small batches; tensor cores with 16 to 256 columns; dequantization and torch's product.
BATCHES = [1, 2, 3, 4, 7, 8, 9, 16, 17, 33, 65, 129, 256, 300, 600, 1100, 2100]
FUSED_BITS = (2, 3, 4)  # other widths are dequantized and left to torch
SMALL_BATCH = 8  # up to here, sparse values are multiplied as they are
DTYPES = ["fp16", "bf16"]


def on_gpu(weight: Weight) -> dict[str, Tensor]:
    return {name: tensor.cuda() for name, tensor in weight.tensors.items()}


def poison(elements: int, dtype: torch.dtype) -> None:
    """Leave NaN in the memory that the next output of this size will get."""
    blocks = [torch.full((elements,), float("nan"), dtype=dtype, device="cuda") for _ in range(2)]
    del blocks


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    poison(x.shape[0] * weight.matrix.shape[0], x.dtype)
    tensors = on_gpu(weight)
    bias = None if bias is None else bias.cuda()
    return ops.lut_linear(x.cuda(), **tensors, bits=weight.bits, bias=bias).cpu()


def assert_close(y: Tensor, x: Tensor, weight: Weight, bias: float = 0.0, slack: float = 0) -> None:
    """y is x W^T within 4e-5 (more by ``slack``) of the sum of absolute products, and rounding."""
    x64 = x.double().numpy()
    expected = x64 @ weight.matrix.T + bias
    scale = np.abs(x64) @ np.abs(weight.matrix).T
    relative, absolute = ROUNDING[x.dtype]
    limit = (4e-5 + slack) * scale + 1e-6 + 1.01 * relative * np.abs(expected) + absolute
    error = np.abs(y.double().numpy() - expected) / limit
    assert y.dtype == x.dtype
    assert (error <= 1).all(), f"worst error is {np.nanmax(error):.2f} of the limit"


def is_aligned(weight: Weight) -> bool:
    return weight.matrix.shape[1] % 8 == 0 and weight.tensors["qweight"].shape[1] % 4 == 0


def has_warpgroups() -> bool:
    return torch.cuda.get_device_capability()[0] == 9


def most_fused(weight: Weight) -> int:
    """The largest batch for which the weight is not dequantized first."""
    if not has_warpgroups():
        return 128
    return 512 if "values" in weight.tensors else 2048


def torch_slack(batch: int, weight: Weight) -> float:
    """torch's own product may add partial sums in 16 bits; where it serves, more is allowed."""
    fused = batch <= SMALL_BATCH or (is_aligned(weight) and batch <= most_fused(weight))
    return 0.0 if fused and weight.bits in FUSED_BITS else 1e-2


def as_multiplied(weight: Weight, batch: int, dtype: str) -> Weight:
    """The weight that a call of ``batch`` rows multiplies, its matrix rounded where that is done.

    On compute capability 9.0 and beyond 64 rows, sparse values are added to the dense part before
    the product; that sum is rounded to the dtype of x, as :func:`ops.lut_dequantize` rounds it
    (each of the two before, which changes nothing if they are of that dtype).
    """
    rounds = has_warpgroups() and batch > 64 and weight.bits in FUSED_BITS and is_aligned(weight)
    return Weight(weight.bits, weight.tensors, weight.rounded(dtype)) if rounds else weight
