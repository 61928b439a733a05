"""Look-ups and sums over unpacked indices as Triton kernels, one pass over the weight each.

Only imported where Triton is (it comes with torch for CUDA).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Cells in flight per program: entries x columns of sums, in registers.
_SUMS = 4096
_COLUMNS = 1024


@triton.jit
def _sum(  # type: ignore[no-untyped-def]
    grad, indices, sums, columns: tl.constexpr, entries: tl.constexpr, block: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    entry = tl.arange(0, entries)
    partial = tl.zeros([entries, block], dtype=tl.float32)
    for start in range(0, columns, block):
        column = start + tl.arange(0, block)
        inside = column < columns
        index = tl.load(indices + row * columns + column, mask=inside, other=0).to(tl.int32)
        value = tl.load(grad + row * columns + column, mask=inside, other=0.0).to(tl.float32)
        partial += tl.where(index[None, :] == entry[:, None], value[None, :], 0.0)
    tl.store(sums + row * entries + entry, tl.sum(partial, axis=1))


@triton.jit
def _look_up(  # type: ignore[no-untyped-def]
    table, indices, weight, columns: tl.constexpr, entries: tl.constexpr, block: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    for start in range(0, columns, block):
        column = start + tl.arange(0, block)
        inside = column < columns
        index = tl.load(indices + row * columns + column, mask=inside, other=0).to(tl.int32)
        value = tl.load(table + row * entries + index, mask=inside)
        tl.store(weight + row * columns + column, value, mask=inside)


def table_gradient(grad_weight: Tensor, indices: Tensor, entries: int) -> Tensor:
    """As :func:`squeezellm_hf.ops.table_gradient.table_gradient`; contiguous arguments."""
    rows, columns = indices.shape
    sums = torch.empty(rows, entries, dtype=torch.float32, device=indices.device)
    block = min(_COLUMNS, max(16, _SUMS // entries))
    _sum[(rows,)](grad_weight, indices, sums, columns, entries=entries, block=block)
    return sums


def look_up(table: Tensor, indices: Tensor) -> Tensor:
    """As :func:`squeezellm_hf.ops.table_gradient.look_up`; contiguous arguments."""
    rows, columns = indices.shape
    weight = torch.empty(rows, columns, dtype=table.dtype, device=indices.device)
    entries = table.shape[1]
    _look_up[(rows,)](table, indices, weight, columns, entries=entries, block=_COLUMNS)
    return weight
