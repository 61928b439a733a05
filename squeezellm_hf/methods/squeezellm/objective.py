"""What k-means minimises, for reports and tests."""

from torch import Tensor


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
