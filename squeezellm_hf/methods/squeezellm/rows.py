"""Sorted rows with prefix sums: every sum over a run of points in two look-ups."""

from typing import NamedTuple

import torch
from torch import Tensor


class SortedRows(NamedTuple):
    """R rows of n weighted points on a line, sorted by value.

    The prefix sums are fp64: Fisher values span ten orders of magnitude within a row, and the
    clustering error is a small difference of large sums.

    Attributes:
        values: [R, n] fp32, ascending.
        weight_sums: [R, n + 1] fp64; ``weight_sums[:, m]`` is the weight of the first m points.
        moment_sums: [R, n + 1] fp64; the same for weight times value.
    """

    values: Tensor
    weight_sums: Tensor
    moment_sums: Tensor

    def select(self, index: Tensor) -> "SortedRows":
        """The rows ``index`` (int64 or bool)."""
        return SortedRows(self.values[index], self.weight_sums[index], self.moment_sums[index])

    def run_sums(self, edges: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and moment, fp64 [R, k], of the runs between ``edges`` (int64 [R, k + 1])."""
        return self.weight_sums.gather(1, edges).diff(dim=1), self.moment_sums.gather(
            1, edges
        ).diff(dim=1)

    def gain(self, start: Tensor, stop: Tensor) -> Tensor:
        """How much a mean of its own lowers the squared error of the run ``start <= i < stop``.

        sum w x^2 - sum w (x - mean)^2 = (sum w x)^2 / sum w; zero for a run of no weight.

        Args:
            start: int64 [R, c].
            stop: int64, broadcastable to [R, c].
        """
        stop = stop.expand_as(start)
        weight = self.weight_sums.gather(1, stop) - self.weight_sums.gather(1, start)
        moment = self.moment_sums.gather(1, stop) - self.moment_sums.gather(1, start)
        return torch.where(weight > 0, moment * moment / weight, 0.0)


def sort_rows(values: Tensor, weights: Tensor) -> SortedRows:
    """Sort rows and sum them up.

    The values and weights of a row are taken relative to a scale of their own, so that nothing
    under- or overflows: the result of k-means does not depend on the scale of the weights, and
    the values are returned unscaled.

    Args:
        values: [R, n], fp32, finite.
        weights: [R, n], fp32, finite, >= 0. A row of zeros counts as a row of ones.
    """
    values, order = values.sort(dim=1, stable=True)
    top = weights.amax(dim=1, keepdim=True)
    weights = torch.where(top > 0, weights.gather(1, order), 1.0).double()
    weights /= torch.where(top > 0, top, 1.0).double()
    sums = torch.zeros(
        2, values.shape[0], values.shape[1] + 1, dtype=torch.float64, device=values.device
    )
    torch.cumsum(weights, dim=1, out=sums[0, :, 1:])
    torch.cumsum(weights * values, dim=1, out=sums[1, :, 1:])
    return SortedRows(values, sums[0], sums[1])
