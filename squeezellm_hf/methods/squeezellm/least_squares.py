"""The best table for a given assignment: a least-squares problem of 2^bits unknowns a row.

With P the one-hot matrix of a row's kept cells, w' = P c, the objective (P c - w) H (P c - w)^T
has its minimum where (P^T H P) c = P^T H w. Solved for the change of the table,

    (P^T H P) (c - c_0) = -P^T H d,        d = P c_0 - w

so that rounding in P^T H P cannot move a table that is the best already.
"""

import torch
from torch import Tensor

# Diagonal added to P^T H P, relative to its mean, until a Cholesky factorization succeeds.
_DAMPING = (1e-8, 1e-6, 1e-4, 1e-2, 1.0)
# Bytes of one-hot matrices and of their products at a time.
_CPU_BYTES = 1 << 26
_DEVICE_BYTES = 1 << 30


def refit(
    hessian: Tensor,
    gradient: Tensor,
    indices: Tensor,
    kept: Tensor,
    table: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Fit the tables of all rows to their assignment.

    Args:
        hessian: fp32 [n, n], symmetric, positive definite.
        gradient: fp32 [R, n], d H.
        indices: integer [R, n].
        kept: bool [R, n], False for cells that the table does not serve.
        table: fp32 [R, k], the table that ``gradient`` is of; its values fit ``dtype``.
        dtype: 16-bit dtype that the new tables are rounded to.

    Returns:
        fp32 [R, k], values that fit ``dtype``, not sorted. A row keeps its table unless the
        rounded new one lowers its objective; an entry without cells keeps its value.
    """
    rows, entries = table.shape
    limit = _CPU_BYTES if table.device.type == "cpu" else _DEVICE_BYTES
    step = max(1, limit // (8 * entries * hessian.shape[0]))
    result = torch.empty_like(table)
    for start in range(0, rows, step):
        chunk = slice(start, start + step)
        normal, moment = _normal_equations(
            hessian, gradient[chunk], indices[chunk], kept[chunk], entries
        )
        old = table[chunk].double()
        new = (old - _solve(normal, moment)).to(dtype).double()
        change = new - old
        gain = 2 * (moment * change).sum(dim=1)
        gain += torch.bmm(normal, change[:, :, None])[:, :, 0].mul_(change).sum(dim=1)
        # A comparison with NaN, from an entry that left the range of dtype, is false.
        result[chunk] = torch.where((gain < 0)[:, None], new, old).float()
    return result


def _normal_equations(
    hessian: Tensor, gradient: Tensor, indices: Tensor, kept: Tensor, entries: int
) -> tuple[Tensor, Tensor]:
    """P^T H P, fp64 [R, k, k], and P^T H d, fp64 [R, k]."""
    rows, columns = indices.shape
    one_hot = torch.zeros(rows, entries, columns, dtype=hessian.dtype, device=hessian.device)
    one_hot.scatter_(1, indices[:, None].long(), kept[:, None].to(hessian.dtype))
    product = (one_hot.view(-1, columns) @ hessian).view(rows, entries, columns)
    normal = torch.bmm(product, one_hot.transpose(1, 2)).double()
    moment = torch.bmm(one_hot, gradient[:, :, None])[:, :, 0].double()
    return 0.5 * (normal + normal.transpose(1, 2)), moment


def _solve(normal: Tensor, moment: Tensor) -> Tensor:
    """normal^-1 moment, damped as far as it must be; zero where an entry has no cells."""
    diagonal = normal.diagonal(dim1=1, dim2=2)
    empty = diagonal <= 0
    mean = diagonal.sum(dim=1, keepdim=True) / (~empty).sum(dim=1, keepdim=True).clamp(min=1)
    solution = torch.zeros_like(moment)
    left = torch.arange(moment.shape[0], device=moment.device)
    for damping in _DAMPING:
        matrix = normal[left]
        added = torch.where(empty[left], mean[left].clamp(min=1e-30), damping * mean[left])
        matrix.diagonal(dim1=1, dim2=2).add_(added)
        factor, info = torch.linalg.cholesky_ex(matrix)
        good = info == 0
        right = moment[left].masked_fill(empty[left], 0.0)
        solved = torch.cholesky_solve(right[good][:, :, None], factor[good])[:, :, 0]
        solution[left[good]] = solved
        left = left[~good]
        if left.numel() == 0:
            break
    return solution
