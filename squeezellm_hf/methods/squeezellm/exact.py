"""Exact weighted 1-D k-means by dynamic programming, batched over rows.

An optimal clustering of points on a line is a partition of the *sorted* points into runs, so with
``gain(l, m)`` the reduction of the squared error by giving points ``l..m-1`` their own mean,

    best[j][m] = max over l <= m of best[j - 1][l] + gain(l, m)

is the optimum of the first ``m`` points with at most ``j`` clusters. The cost satisfies the
quadrangle inequality, so the best ``l`` never decreases with ``m``: divide and conquer finds one
row of the recurrence in O(n log n) (X. Wu, "Optimal quantization by matrix searching", 1991;
H. Wang and M. Song, "Ckmeans.1d.dp", 2011).
"""

import torch
from torch import Tensor

from squeezellm_hf.methods.squeezellm.rows import SortedRows


def exact_edges(rows: SortedRows, clusters: int) -> Tensor:
    """The optimal partition of every row into at most ``clusters`` runs.

    Time O(clusters * n log n) per row, memory 4 * clusters * n bytes per row.

    Args:
        rows: R sorted rows of n points.
        clusters: the number of clusters, at least 1.

    Returns:
        int64 [R, clusters + 1], non-decreasing, first 0 and last n: cluster ``j`` holds the sorted
        points ``edges[:, j] <= i < edges[:, j + 1]``, and may be empty.
    """
    ends = _distinct_ends(rows.values)
    merged = SortedRows(
        rows.values, rows.weight_sums.gather(1, ends), rows.moment_sums.gather(1, ends)
    )
    return ends.gather(1, _partition(merged, clusters))


def _distinct_ends(values: Tensor) -> Tensor:
    """Edges between the distinct values of each row, int64 [R, d + 1], filled up with n.

    Equal values are one point to k-means: weights that were 4-bit or bf16 once have few.
    """
    count, points = values.shape
    new = values.diff(dim=1) > 0
    rank = new.cumsum(dim=1)
    ends = torch.full(
        (count, int(rank.amax()) + 2 if points > 1 else 2), points, device=values.device
    )
    ends[:, 0] = 0
    row, column = new.nonzero(as_tuple=True)
    ends[row, rank[row, column]] = column + 1
    return ends


def _partition(rows: SortedRows, clusters: int) -> Tensor:
    """As :func:`exact_edges`, in terms of the columns of the prefix sums alone."""
    count, size = rows.weight_sums.shape
    points = size - 1
    device = rows.weight_sums.device
    everything = torch.arange(points + 1, device=device).expand(count, -1)
    best = rows.gain(torch.zeros_like(everything), everything)
    splits: list[Tensor] = []
    for cluster in range(1, clusters):
        last = cluster == clusters - 1
        best, split = _next_cluster(rows, best, only_all_points=last)
        splits.append(split)
    edges = torch.empty(count, clusters + 1, dtype=torch.int64, device=device)
    edges[:, 0] = 0
    edges[:, clusters] = points
    for cluster in range(clusters - 1, 0, -1):
        right = edges[:, cluster + 1 : cluster + 2]
        edges[:, cluster] = splits[cluster - 1].gather(1, right)[:, 0]
    return edges


def _next_cluster(rows: SortedRows, best: Tensor, only_all_points: bool) -> tuple[Tensor, Tensor]:
    """One row of the recurrence: ``best`` with one more cluster, and the split that attains it.

    The last row of the recurrence is needed at m = n alone (``only_all_points``).
    """
    count, size = best.shape
    points = size - 1
    improved = torch.zeros_like(best)
    split = torch.zeros(count, size, dtype=torch.int32, device=best.device)
    if only_all_points:
        start = torch.arange(size, device=best.device).expand(count, -1)
        candidates = best + rows.gain(start, torch.full_like(start, points))
        value, place = candidates.max(dim=1)
        improved[:, points] = value
        split[:, points] = place.to(torch.int32)
        return improved, split
    # Odd multiples of a halving step: the split of m lies between those of m - step and m + step,
    # which coarser steps have found. All of a step's columns are the same for every row.
    step = 1 << (points.bit_length() - 1)
    while step:
        ends = torch.arange(step, size, 2 * step, device=best.device)
        if ends.numel():
            low = split[:, ends - step].to(torch.int64)
            after = ends + step
            high = ends.expand(count, -1).clone()
            known = after < size
            high[:, known] = torch.minimum(high[:, known], split[:, after[known]].to(torch.int64))
            value, place = _best_split(rows, best, ends, low, high)
            improved[:, ends] = value
            split[:, ends] = place.to(torch.int32)
        step //= 2
    return improved, split


def _best_split(
    rows: SortedRows, best: Tensor, ends: Tensor, low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor]:
    """For every end m, the best (and among equals the smallest) l with low <= l <= high.

    The ranges differ in length, and a row's ranges overlap in their ends only: they are laid end
    to end, at most n + len(ends) candidates a row.
    """
    count = best.shape[0]
    stop = (high - low + 1).cumsum(dim=1)
    begin = torch.cat([torch.zeros_like(stop[:, :1]), stop[:, :-1]], dim=1)
    total = int(stop[:, -1].max())
    position = torch.arange(total, device=best.device).expand(count, -1).contiguous()
    segment = torch.searchsorted(stop, position, right=True)
    spare = segment >= ends.numel()
    segment = segment.clamp(max=ends.numel() - 1)
    start = position + (low - begin).gather(1, segment)
    # Rows with fewer candidates than the longest repeat their last one.
    start = torch.where(spare, high[:, -1:], start)
    value = best.gather(1, start) + rows.gain(start, ends[segment])
    top = torch.full(low.shape, -torch.inf, dtype=value.dtype, device=value.device)
    top.scatter_reduce_(1, segment, value, "amax")
    start = torch.where(value == top.gather(1, segment), start, torch.iinfo(torch.int64).max)
    place = torch.full_like(low, torch.iinfo(torch.int64).max)
    place.scatter_reduce_(1, segment, start, "amin")
    return top, place
