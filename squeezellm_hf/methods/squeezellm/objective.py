"""What the codebook solvers minimise, for reports and tests."""

import torch
from torch import Tensor

from squeezellm_hf.calibration.hessian import channel_groups


def weighted_squared_error(
    weight: Tensor, dequantized: Tensor, fisher: Tensor | None = None
) -> Tensor:
    """Per row, sum_i F_i (w_i - dequantized_i)^2 (equation 4 of arXiv 2306.07629).

    Args:
        weight: [out_features, in_features].
        dequantized: [out_features, in_features], dense and sparse part together.
        fisher: [out_features, in_features], or None for the plain squared error.

    Returns:
        fp64 [out_features], in units of the loss if ``fisher`` is a mean over the data.
    """
    error = (weight.double() - dequantized.double()).square_()
    return (error if fisher is None else error.mul_(fisher)).sum(dim=1)


def quadratic_error(weight: Tensor, dequantized: Tensor, hessian: Tensor) -> Tensor:
    """Per row, (dequantized - w) H_g (dequantized - w)^T, with H_g the Hessian of its group.

    Args:
        weight: [out_features, in_features].
        dequantized: [out_features, in_features], dense and sparse part together.
        hessian: [groups, in_features, in_features].

    Returns:
        fp64 [out_features].
    """
    error = dequantized.double() - weight.double()
    groups = channel_groups(weight.shape[0], hessian.shape[0])
    parts = [
        ((error[rows] @ h.double()) * error[rows]).sum(dim=1)
        for rows, h in zip(groups, hessian, strict=True)
    ]
    return torch.cat(parts)
