"""Sparse values that make dense + sparse exact."""

import torch
from torch import Tensor


def exact_residuals(weights: Tensor, tables: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Choose, for each sparse weight, the table entry and the 16-bit value that add up to it.

    A cell of the sparse part may take any entry, since value = weight - entry. Rounding the
    value loses up to 2^-12 (fp16) or 2^-9 (bf16) of |weight - entry|, which differs from entry
    to entry: the entry with the least |entry + value - weight| is taken, of equals the nearest to
    the weight, of these the lowest. The sum is taken in fp32, as in the layer.

    An fp16 or bf16 weight, normal in ``dtype``, comes back bit for bit if an entry lies within
    |weight| / 2 of it (4 |weight| for bf16 weights and fp16 values). A small weight between two
    entries need not, for no sum of two 16-bit numbers of their size has its last bits; what is
    lost is at most 2^-12 (fp16) of the distance to the entry.

    Args:
        weights: fp32 [m].
        tables: [m, k] in ``dtype``, the lookup table of each weight's row.
        dtype: fp16 or bf16.

    Returns:
        The entries' indices, uint8 [m], and the values, ``dtype`` [m].
    """
    entries = tables.float()
    values = (weights[:, None] - entries).to(dtype)
    error = (entries + values.float() - weights[:, None]).abs()
    # A residual that overflows gives inf, never NaN, and so is not chosen while another is finite.
    best = error == error.amin(dim=1, keepdim=True)
    distance = (weights[:, None] - entries).abs().masked_fill_(~best, torch.inf)
    index = distance.argmin(dim=1)
    return index.to(torch.uint8), values.gather(1, index[:, None])[:, 0]
