"""LNQ: layer-wise non-uniform quantization by alternating tables and assignment.

From GuidedQuant (arXiv 2505.07004). Per output row, with H the Hessian of the row's group
(:mod:`squeezellm_hf.calibration.hessian`) and cells of the sparse part without error:

    minimise  (w' - w) H (w' - w)^T   over the table and the index of every cell

From any start, the assignment is first made anew with error feedback, if that is better; then
come rounds of a least-squares table and a few sweeps of coordinate descent. No step raises the
objective, and of start and rounds the best is kept, row by row.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from squeezellm_hf.methods.squeezellm.assignment import coordinate_descent, midpoints
from squeezellm_hf.methods.squeezellm.chunks import in_threads
from squeezellm_hf.methods.squeezellm.feedback import feedback_rounding
from squeezellm_hf.methods.squeezellm.least_squares import refit

# Added to the diagonal of H, relative to its mean: inputs that are always zero, and fewer tokens
# than inputs, leave H singular, and H is a sample. docs/methods.md has measurements.
DAMPING = 1e-2
# Cells solved side by side. On a CPU the matrices of a block then stay near the caches; elsewhere
# a column of all rows is a few launches however many they are, and the limit is memory.
_CPU_CELLS = 1 << 22
# On a CPU, batches of at most so many columns are solved one a thread; of more, one by one, with
# all threads in its products: copies of their Hessians would fill the memory.
_NARROW = 2048
_BYTES_PER_CELL = 32
_SHARE_OF_DEVICE = 0.25


class RowGroup(NamedTuple):
    """R rows with one Hessian. Table and indices are the start, and overwritten by the result.

    Attributes:
        hessian: fp32 [n, n], symmetric, positive semidefinite; the device of the others or a CPU.
        weight: [R, n].
        removed: bool [R, n], cells of the sparse part.
        table: fp16 or bf16 [R, k], ascending.
        indices: uint8 [R, n]; those of removed cells mean nothing.
    """

    hessian: Tensor
    weight: Tensor
    removed: Tensor
    table: Tensor
    indices: Tensor


@torch.no_grad()
def refine(groups: Sequence[RowGroup], rounds: int, sweeps: int) -> None:
    """Lower the objective of every row, in place; groups of one shape are solved side by side.

    A group whose Hessian is zero (no token reached the layer) stays as it is.

    Args:
        groups: any shapes, dtypes and devices.
        rounds: how often tables and assignment alternate.
        sweeps: sweeps of coordinate descent in a round.
    """
    batches = list(_batches([g for g in groups if bool(g.hessian.diagonal().sum() > 0)]))

    @torch.no_grad()  # holds for one thread
    def solve(batch: list[RowGroup]) -> None:
        _solve(batch, rounds, sweeps)

    narrow = [b for b in batches if b[0].weight.shape[1] <= _NARROW]
    wide = [b for b in batches if b[0].weight.shape[1] > _NARROW]
    on_cpu = all(group.weight.device.type == "cpu" for group in groups)
    in_threads(solve, narrow, on_cpu=on_cpu)
    in_threads(solve, wide, on_cpu=False)


def _batches(groups: Iterable[RowGroup]) -> Iterable[list[RowGroup]]:
    """Groups of one shape together, up to a number of cells; larger ones are cut."""
    by_shape: dict[tuple[object, ...], list[RowGroup]] = {}
    for group in groups:
        columns = group.weight.shape[1]
        # Each part factorizes the Hessian anew, which should not cost more than its sweeps.
        most = max(columns // 2, _most_cells(group.weight.device) // columns, 1)
        for start in range(0, group.weight.shape[0], most):
            part = slice(start, start + most)
            cut = group._replace(
                **{name: getattr(group, name)[part] for name in RowGroup._fields[1:]}
            )
            key = (columns, *cut.table.shape, cut.table.dtype, cut.table.device)
            by_shape.setdefault(key, []).append(cut)
    for same in by_shape.values():
        rows, columns = same[0].weight.shape
        # A Hessian is copied, and has a factor: that takes the memory of n / 4 rows.
        cells = columns * (rows + columns // 4)
        count = max(1, _most_cells(same[0].weight.device) // cells)
        for start in range(0, len(same), count):
            yield same[start : start + count]


def _most_cells(device: torch.device) -> int:
    if device.type != "cuda":
        return _CPU_CELLS
    total = torch.cuda.get_device_properties(device).total_memory
    return int(_SHARE_OF_DEVICE * total) // _BYTES_PER_CELL


def _solve(batch: list[RowGroup], rounds: int, sweeps: int) -> None:
    # Columns of large H_ii first: see feedback.
    orders = [_order(group) for group in batch]
    ordered = list(zip(batch, orders, strict=True))
    hessian = torch.stack([_ordered(group, order) for group, order in ordered])
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    hessian /= diagonal.mean(dim=1)[:, None, None]
    diagonal += DAMPING
    # Columns first: what one step of the coordinate descent works on is contiguous.
    weight = torch.stack([group.weight.t()[order] for group, order in ordered]).float()
    kept = ~torch.stack([group.removed.t()[order] for group, order in ordered])
    table = torch.stack([group.table for group in batch]).float()
    indices = torch.stack([group.indices[:, order] for group, order in ordered])
    values = _look_up(table, indices, kept, weight)
    best = _Best(table, indices, _objective(hessian, values - weight)[0])
    fed_back = feedback_rounding(hessian, weight, kept, table)
    better = best.offer(table, _indices(table, fed_back), _objective(hessian, fed_back - weight)[0])
    values = torch.where(better[:, None], fed_back, values)
    del fed_back
    for _ in range(rounds):
        indices = _indices(table, values)
        _, gradient = _objective(hessian, values - weight)
        fitted = [
            refit(hessian[b], gradient[b].t(), indices[b], kept[b].t(), table[b], group.table.dtype)
            for b, group in enumerate(batch)
        ]
        del gradient
        table, indices = _sort(torch.stack(fitted), indices)
        values = _look_up(table, indices, kept, weight)
        coordinate_descent(hessian, values - weight, values, kept, table, sweeps)
        best.offer(table, _indices(table, values), _objective(hessian, values - weight)[0])
    for b, (group, order) in enumerate(ordered):
        group.table.copy_(best.table[b])
        group.indices[:, order] = best.indices[b]


def _order(group: RowGroup) -> Tensor:
    diagonal = group.hessian.diagonal().to(group.weight.device)
    return diagonal.argsort(descending=True, stable=True)


def _ordered(group: RowGroup, order: Tensor) -> Tensor:
    return group.hessian.to(group.weight.device)[order][:, order]


class _Best:
    """The best table [B, R, k] and indices [B, R, n] of every row so far, by objective [B, R]."""

    def __init__(self, table: Tensor, indices: Tensor, objective: Tensor) -> None:
        self.table, self.indices, self._objective = table, indices, objective

    def offer(self, table: Tensor, indices: Tensor, objective: Tensor) -> Tensor:
        """Take the rows that are better; returns which, bool [B, R]."""
        better = objective < self._objective
        self._objective = torch.where(better, objective, self._objective)
        self.table = torch.where(better[:, :, None], table, self.table)
        self.indices = torch.where(better[:, :, None], indices, self.indices)
        return better


def _objective(hessian: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    """d H d^T, fp64 [B, R], and its half gradient H d^T, fp32 [B, n, R]."""
    gradient = torch.bmm(hessian, error)
    return (error * gradient).sum(dim=1, dtype=torch.float64), gradient


def _indices(table: Tensor, values: Tensor) -> Tensor:
    """Indices, uint8 [B, R, n], of values [B, n, R] that are entries of their row's table."""
    values = values.transpose(1, 2).contiguous()
    return torch.searchsorted(midpoints(table), values, out_int32=True).to(torch.uint8)


def _look_up(table: Tensor, indices: Tensor, kept: Tensor, weight: Tensor) -> Tensor:
    """Dequantized values, fp32 [B, n, R]; where not ``kept`` the weight itself."""
    values = table.gather(2, indices.long()).transpose(1, 2)
    return torch.where(kept, values, weight)


def _sort(table: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Tables in ascending order, and the indices that mean the same in them."""
    table, order = table.sort(dim=2, stable=True)
    rank = torch.empty_like(order)
    rank.scatter_(2, order, torch.arange(order.shape[2], device=order.device).expand_as(order))
    return table, rank.gather(2, indices.long()).to(torch.uint8)
