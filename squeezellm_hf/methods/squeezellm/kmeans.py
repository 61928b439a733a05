"""Weighted 1-D k-means of many rows at once."""

import torch
from torch import Tensor

from squeezellm_hf.methods.squeezellm.coarse import coarse_edges
from squeezellm_hf.methods.squeezellm.config import Solver
from squeezellm_hf.methods.squeezellm.exact import exact_edges
from squeezellm_hf.methods.squeezellm.rows import SortedRows, sort_rows

# Lloyd's iteration ends by itself, in exact arithmetic: this is a guard against rounding.
_MOST_ITERATIONS = 10_000


def weighted_kmeans(
    values: Tensor, weights: Tensor, clusters: int, solver: Solver = "lloyd"
) -> Tensor:
    """Minimise sum_i weights_i (values_i - nearest centroid)^2 for every row.

    Args:
        values: fp32 [R, n], finite.
        weights: fp32 [R, n], finite, >= 0. A row of zeros counts as a row of ones.
        clusters: number of centroids, at least 1.
        solver: "exact" gives the global optimum.

    Returns:
        Centroids, fp32 [R, clusters], ascending. A row with at most ``clusters`` distinct values
        gets exactly these, and the greatest of them again for every centroid left over.
    """
    rows = sort_rows(values, weights)
    centroids = _distinct_values(rows, clusters)
    hard = torch.nonzero(_distinct(rows) > clusters)[:, 0]
    if hard.numel() == 0:
        return centroids
    if hard.numel() < values.shape[0]:
        rows = rows.select(hard)
    edges = coarse_edges(rows, clusters) if solver == "lloyd" else exact_edges(rows, clusters)
    centroids[hard] = lloyd(rows, edges)
    return centroids


def lloyd(rows: SortedRows, edges: Tensor) -> Tensor:
    """Lloyd's iteration from a partition to a fixed point; no step raises the error.

    Args:
        rows: R sorted rows of n points.
        edges: int64 [R, k + 1], non-decreasing, first 0 and last n. A cluster of no weight gets
            the first value after its left edge and keeps it until points fall to it.

    Returns:
        Centroids, fp32 [R, k], ascending.
    """
    points = rows.values.shape[1]
    result = rows.values.new_empty(edges.shape[0], edges.shape[1] - 1)
    active = torch.arange(edges.shape[0], device=edges.device)
    centroids = rows.values.gather(1, edges[:, :-1].clamp(max=points - 1)).double()
    for _ in range(_MOST_ITERATIONS):
        weight, moment = rows.run_sums(edges)
        centroids = torch.where(weight > 0, moment / weight, centroids)
        middle = (0.5 * centroids[:, 1:] + 0.5 * centroids[:, :-1]).float()
        moved = edges.clone()
        moved[:, 1:-1] = torch.searchsorted(rows.values, middle, right=True)
        going = (moved != edges).any(dim=1)
        left = int(going.sum())
        # Leaving out the rows that are done costs a copy of the others.
        if left <= 0.7 * going.numel():
            result[active[~going]] = centroids[~going].float()
            active, rows = active[going], rows.select(going)
            moved, centroids = moved[going], centroids[going]
        edges = moved
        if left == 0:
            break
    result[active] = centroids.float()
    return result


def _distinct(rows: SortedRows) -> Tensor:
    """Number of distinct values of every row, int64 [R]."""
    return (rows.values.diff(dim=1) > 0).sum(dim=1) + 1


def _distinct_values(rows: SortedRows, clusters: int) -> Tensor:
    """The first ``clusters`` distinct values of every row; the greatest value fills the rest."""
    values = rows.values
    rank = torch.zeros_like(values, dtype=torch.int64)
    torch.cumsum(values.diff(dim=1) > 0, dim=1, out=rank[:, 1:])
    table = values[:, -1:].repeat(1, clusters + 1)
    table.scatter_(1, rank.clamp(max=clusters), values)
    return table[:, :clusters]
