"""Lookup tables: dtype, and the nearest entry of a weight."""

import torch
from torch import Tensor

_FP16 = torch.finfo(torch.float16)


def table_dtype(weight: Tensor) -> torch.dtype:
    """The 16-bit dtype of a matrix's lookup table and sparse values.

    fp16, unless a difference of two weights could leave its range (greatest magnitude above
    65504 / 2), or all weights are subnormal in it (greatest magnitude below 2^-14, where fp16
    has an absolute and no longer a relative precision): then bf16.

    Args:
        weight: [out_features, in_features].
    """
    top = float(torch.linalg.vector_norm(weight, torch.inf)) if weight.numel() else 0.0
    fits = 2 * top <= _FP16.max and (top == 0 or top >= _FP16.tiny)
    return torch.float16 if fits else torch.bfloat16


def nearest_entry(values: Tensor, table: Tensor) -> Tensor:
    """Index of the entry nearest to each value; of two equally near the lower.

    Args:
        values: fp32 [R, n].
        table: [R, k], ascending, k <= 256; entries may repeat.

    Returns:
        uint8 [R, n].
    """
    table = table.float()
    middle = 0.5 * table[:, 1:] + 0.5 * table[:, :-1]
    return torch.searchsorted(middle, values.contiguous(), out_int32=True).to(torch.uint8)
