"""Which table entry each weight takes: cyclic coordinate descent, many rows at once.

With d = w' - w the error of a row, the objective d H d^T is a parabola in any one w'_i, with its
minimum at

    t_i = w_i - sum over j != i of H_ij d_j / H_ii  =  w'_i - (H d)_i / H_ii

so the best entry for weight i, all others held, is the one nearest to t_i. One sweep visits every
column once; no step raises the objective.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# Columns whose gradient is computed by one product with all of H; within them, what each step
# changes is passed on by products of half the size, down to _LEAF columns that see each step.
_BLOCK = 128
_LEAF = 8
# Tables that are so small that all midpoints are compared.
_NARROW = 32


def coordinate_descent(
    hessian: Tensor, error: Tensor, values: Tensor, kept: Tensor, table: Tensor, sweeps: int
) -> None:
    """Improve the assignment of all rows, in place.

    Args:
        hessian: fp32 [B, n, n], positive diagonal; entry (i, j) tells how error j moves target i.
        error: fp32 [B, n, R], values - weights; zero where not ``kept``.
        values: fp32 [B, n, R], entries of ``table`` where ``kept``.
        kept: bool [B, n, R], False for cells that stay as they are, without error.
        table: fp32 [B, R, k], ascending.
        sweeps: how often every column is visited.
    """
    middle = midpoints(table)
    if _counts(table):
        middle = middle.permute(2, 0, 1).contiguous()
    for _ in range(sweeps):
        for start in range(0, hessian.shape[1], _BLOCK):
            block = slice(start, start + _BLOCK)
            _sweep_block(hessian, block, error, values, kept, table, middle)


def midpoints(table: Tensor) -> Tensor:
    """Where one entry ends being the nearest: [..., k] -> [..., k - 1]."""
    return 0.5 * table[..., 1:] + 0.5 * table[..., :-1]


class _Block(NamedTuple):
    """Some columns of a sweep: all [B, columns, R] unless noted.

    Attributes:
        target: where each weight should be, after all steps so far.
        values: as for :func:`coordinate_descent`, overwritten.
        step: how far each value went.
        kept: as for :func:`coordinate_descent`.
        coupling: [B, columns, columns], how a step moves the targets of the others.
        table: [B, R, k].
        middle: see :func:`_nearest`.
    """

    target: Tensor
    values: Tensor
    step: Tensor
    kept: Tensor
    coupling: Tensor
    table: Tensor
    middle: Tensor


def _sweep_block(
    hessian: Tensor,
    block: slice,
    error: Tensor,
    values: Tensor,
    kept: Tensor,
    table: Tensor,
    middle: Tensor,
) -> None:
    scale = hessian[:, block].diagonal(offset=block.start, dim1=1, dim2=2)[:, :, None]
    current = values[:, block]
    target = current - torch.bmm(hessian[:, block], error) / scale
    coupling = hessian[:, block, block] / scale
    step = torch.empty_like(target)
    columns = _Block(target, current, step, kept[:, block], coupling, table, middle)
    _visit(columns, 0, target.shape[1])
    error[:, block] += step


def _visit(block: _Block, start: int, stop: int) -> None:
    """Choose entries for columns from start to stop, whose targets know all earlier steps."""
    target, step, coupling = block.target, block.step, block.coupling
    if stop - start > _LEAF:
        half = start + (stop - start) // 2
        _visit(block, start, half)
        target[:, half:stop] -= torch.bmm(coupling[:, half:stop, start:half], step[:, start:half])
        _visit(block, half, stop)
        return
    counts = _counts(block.table)
    for i in range(start, stop):
        index = _nearest(block.middle, target[:, i], counts)
        old = block.values[:, i]
        new = torch.where(block.kept[:, i], block.table.gather(2, index)[:, :, 0], old)
        torch.sub(new, old, out=step[:, i])
        old.copy_(new)
        if i + 1 < stop:
            target[:, i + 1 : stop].addcmul_(
                coupling[:, i + 1 : stop, i, None], step[:, i, None], value=-1
            )


def _counts(table: Tensor) -> bool:
    """Whether to count midpoints: on a CPU the branches of a binary search are guessed wrongly."""
    return table.device.type == "cpu" and table.shape[2] <= _NARROW


def _nearest(middle: Tensor, target: Tensor, counts: bool) -> Tensor:
    """Index of the entry nearest to each target, of two equally near the lower: int64 [B, R, 1].

    Args:
        middle: [k - 1, B, R] if ``counts``, otherwise [B, R, k - 1].
        target: [B, R].
        counts: see :func:`_counts`.
    """
    if counts:
        return (target > middle).sum(dim=0).unsqueeze(-1)
    return torch.searchsorted(middle, target.unsqueeze(-1).contiguous())
