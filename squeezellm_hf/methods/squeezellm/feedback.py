"""A better start for the assignment: rounding with error feedback, as in GPTQ.

With H = M^T D M, M unit lower triangular and D diagonal, the objective of a row is

    d H d^T = sum over i of D_i (d_i + sum over j < i of M_ij d_j)^2

Going through the columns in order, the best that weight i can do for its own term is the entry
nearest to w_i - sum_{j<i} M_ij d_j: it makes up for the errors that were made before it. That is
what GPTQ does (arXiv 2210.17323), in the form that QuIP calls LDLQ (arXiv 2307.13304). Columns of
large H_ii go first, while the rest can still make up for them.
"""

import torch
from torch import Tensor

from squeezellm_hf.methods.squeezellm.assignment import coordinate_descent

# Added to the diagonal, relative to its mean, until a Cholesky factorization succeeds.
_DAMPING = (0.0, 1e-3, 1e-2, 1e-1)


def feedback_rounding(hessian: Tensor, weight: Tensor, kept: Tensor, table: Tensor) -> Tensor:
    """Round all rows, the columns in order.

    Args:
        hessian: fp32 [B, n, n], symmetric, positive definite.
        weight: fp32 [B, n, R].
        kept: bool [B, n, R], False for cells that stay as they are, without error.
        table: fp32 [B, R, k], ascending.

    Returns:
        fp32 [B, n, R], entries of ``table`` where ``kept``, elsewhere the weight.
    """
    factor = torch.empty_like(hessian)
    for each, place in zip(hessian, factor, strict=True):
        place.copy_(unit_factor(each))
    values, error = weight.clone(), torch.zeros_like(weight)
    # A sweep of the descent, but of an error that is zero yet, and with what is known of it.
    coordinate_descent(factor, error, values, kept, table, sweeps=1)
    return values


def unit_factor(hessian: Tensor) -> Tensor:
    """M of H = M^T D M: unit lower triangular, fp32 [n, n]; one for each row where there is none.

    Computed in fp64: where few inputs hold most of H, fp32 finds it not positive definite. Beside
    the result that takes 12 bytes an entry at most: the factorization is done in place.
    """
    mean = hessian.diagonal().double().mean()
    for damping in _DAMPING:
        # Columns first, as the factorization wants it; H is symmetric.
        lower = hessian.flip(0, 1).double().t()
        lower.diagonal().add_(damping * mean)
        info = torch.empty((), dtype=torch.int32, device=hessian.device)
        torch.linalg.cholesky_ex(lower, out=(lower, info))
        if int(info) == 0:
            lower /= lower.diagonal().clone()
            factor = lower.float()
            del lower
            return factor.flip(0, 1).t()
    return torch.eye(hessian.shape[0], dtype=torch.float32, device=hessian.device)
