"""A start for k-means: the best partition of a row into clusters of *super-points*.

Lloyd's iteration stays in the nearest local optimum, and with Fisher weights, of which a few
dominate a row, there are many: from a plain start at 16 clusters it ends tens of percent above the
optimum. So the row is first cut into a few runs of neighbouring points per cluster, and the best
partition made of whole runs is found by dynamic programming. Lloyd's iteration then moves the
edges by single points.

The runs are equally spaced in the coordinate in which an optimal quantizer of high resolution is
uniform: its density of levels is proportional to the cube root of the (weighted) density of points
(P. F. Panter and W. Dite, "Quantization distortion in pulse-count modulation with nonuniform
spacing of levels", 1951).
"""

import torch
from torch import Tensor

from squeezellm_hf.methods.squeezellm.rows import SortedRows

# Super-points per cluster, and per row at least. More are closer to the optimum and slower:
# docs/methods.md has the measurements.
_RUNS_PER_CLUSTER = 8
_RUNS_PER_ROW = 128
# The most super-points that one cluster may take, and how far from super-point m j the edge after
# cluster j is looked for, where m super-points per cluster are 8; with more in proportion.
_LONGEST = 28
_REACH = 32
# In a wide table the edges drift further: then the last result is cut into equal parts again.
_WIDE = 16
_WIDE_PASSES = 2
# Points over which weights are smoothed, to either side.
_SMOOTHING = 4
_BLOCK = 8
_TINY = torch.finfo(torch.float64).tiny


def coarse_edges(rows: SortedRows, clusters: int) -> Tensor:
    """The best partition of super-points, as edges between sorted points.

    About 30,000 steps per row for up to 16 clusters, 3600 * clusters beyond; memory about 30 KB
    per row, 2 KB * clusters beyond.

    Args:
        rows: R sorted rows of n >= 2 points.
        clusters: the number of clusters.

    Returns:
        int64 [R, clusters + 1], non-decreasing, first 0 and last n. Clusters may be empty.
    """
    count, points = rows.values.shape
    parts = max(_RUNS_PER_CLUSTER, _RUNS_PER_ROW // clusters)
    longest, reach = _LONGEST * parts // _RUNS_PER_CLUSTER, _REACH * parts // _RUNS_PER_CLUSTER
    parts = min(parts, max(2, points // clusters))
    position = _positions(rows, parts * clusters)
    edges = torch.zeros(count, 2, dtype=torch.int64, device=rows.values.device)
    edges[:, 1] = points
    ends = _subdivide(position, edges, parts * clusters)
    for _ in range(_WIDE_PASSES if clusters > _WIDE else 1):
        if edges.shape[1] > 2:
            ends = _subdivide(position, edges, parts)
        chosen = _best_partition(_costs(rows, ends, longest), clusters, reach)
        edges = ends.gather(1, chosen.t())
    return edges


def _positions(rows: SortedRows, runs: int) -> Tensor:
    """The points in the coordinate in which super-points are equally spaced: [R, n], ascending."""
    values, sums = rows.values, rows.weight_sums
    points = values.shape[1]
    # With weight w_i and a gap d_i to the next point the density is w_i / d_i, and the cube root
    # of it integrated over the gap is w_i^(1/3) d_i^(2/3). Repeated values take no space.
    gap = values.diff(dim=1) / (values[:, -1:] - values[:, :1])
    index = torch.arange(points - 1, device=values.device)
    low = (index + 1 - _SMOOTHING).clamp(min=0)
    high = (index + 1 + _SMOOTHING).clamp(max=points)
    near = (sums[:, 2:] - sums[:, :-2]) / 2
    around = (sums[:, high] - sums[:, low]) / (high - low)
    length = (near + around).float().pow_(1 / 3) * gap.square().pow_(1 / 3)
    # A gap longer than a run would be cut more than once, in vain: one great weight would take
    # the super-points of all others.
    length = torch.minimum(length, length.sum(dim=1, keepdim=True) / runs)
    position = torch.zeros_like(values)
    torch.cumsum(length, dim=1, out=position[:, 1:])
    return position


def _subdivide(position: Tensor, edges: Tensor, parts: int) -> Tensor:
    """Cut every cluster into ``parts`` runs of equal length in ``position``.

    Returns:
        Edges of the runs, int64 [R, k * parts + 1], of which every ``parts``-th is one of
        ``edges`` (int64 [R, k + 1]).
    """
    last = position.shape[1] - 1
    # A cluster reaches from between two points to between two points.
    after = position.gather(1, edges.clamp(max=last))
    before = position.gather(1, (edges - 1).clamp(min=0))
    bounds = 0.5 * after + 0.5 * before
    step = torch.arange(parts, dtype=position.dtype, device=position.device) / parts
    cuts = bounds[:, :-1, None] + bounds.diff(dim=1)[:, :, None] * step
    inner = torch.searchsorted(position, cuts.flatten(1))
    # Rounding must not carry a cut out of its cluster.
    inner = inner.view(*cuts.shape).clamp(edges[:, :-1, None], edges[:, 1:, None])
    inner[:, :, 0] = edges[:, :-1]
    return torch.cat([inner.flatten(1), edges[:, -1:]], dim=1)


def _costs(rows: SortedRows, ends: Tensor, longest: int) -> Tensor:
    """Error of one cluster in place of its super-points, each with a mean of its own.

    That is the part of the squared error which depends on the partition.

    Returns:
        fp32 [runs, longest, R], >= 0: entry (m, l) is for a cluster of ``longest - l``
        super-points of which m is the last. The rows come last, so that every step works on long
        vectors.
    """
    weight = rows.weight_sums.gather(1, ends)
    moment = rows.moment_sums.gather(1, ends)
    # Centred and scaled, so that the costs neither cancel nor leave the range of fp32.
    total = weight[:, -1:]
    moment = moment - moment[:, -1:] / total * weight
    scale = moment.abs().amax(dim=1, keepdim=True)
    moment = torch.where(scale > 0, moment / scale, 0.0).t().contiguous()
    weight = (weight / total).t().contiguous()
    own = torch.zeros_like(moment)
    torch.cumsum(_gain(weight.diff(dim=0), moment.diff(dim=0)), dim=0, out=own[1:])
    runs, count = own.shape[0] - 1, own.shape[1]
    before = [_starts(sums, longest) for sums in (own, weight, moment)]
    cost = torch.empty(runs, longest, count, dtype=torch.float32, device=own.device)
    # In blocks: the fp64 terms of all at once would not stay in a CPU's cache.
    for low in range(0, runs, _BLOCK):
        block = slice(low, low + _BLOCK)
        up_to, its_weight, its_moment = (
            sums[1:][block, None] - starts[block]
            for sums, starts in zip((own, weight, moment), before, strict=True)
        )
        cost[block] = (up_to - _gain(its_weight, its_moment)).clamp_(min=0)
    return cost


def _gain(weight: Tensor, moment: Tensor) -> Tensor:
    # A run without weight has no moment: 0 / tiny.
    return moment.square_().div_(weight.clamp_(min=_TINY))


def _starts(sums: Tensor, longest: int) -> Tensor:
    """Sums before every run that can be the first of a cluster which ends with run m.

    [runs + 1, R] -> [runs, longest, R]: entry (m, l) is the sum before run m + 1 - longest + l,
    or before the first run if there is no such run.
    """
    padded = torch.cat([sums[:1].expand(longest - 1, -1), sums])
    return padded.unfold(0, longest, 1)[:-1].permute(0, 2, 1)


def _best_partition(cost: Tensor, clusters: int, reach: int) -> Tensor:
    """The partition of super-points with the least total cost.

    Args:
        cost: as :func:`_costs` gives it.
        clusters: the number of clusters.
        reach: super-points by which an edge may be off equal spacing.

    Returns:
        int64 [clusters + 1, R]: the number of super-points before each edge.
    """
    runs, longest, count = cost.shape
    device = cost.device
    # best[j, longest - 1 + m]: the first m super-points in j clusters; inf where there is no way.
    best = cost.new_full((clusters + 1, runs + longest, count), torch.inf)
    best[0, longest - 1] = 0
    for cluster in range(1, clusters + 1):
        middle = cluster * runs // clusters
        low, high = max(1, middle - reach), min(runs, middle + reach)
        if cluster == clusters:
            low = runs
        before = best[cluster - 1].unfold(0, longest, 1)[low - 1 : high].permute(0, 2, 1)
        best[cluster, longest - 1 + low : longest + high] = (before + cost[low - 1 : high]).amin(1)
    chosen = torch.zeros(clusters + 1, count, dtype=torch.int64, device=device)
    chosen[clusters] = runs
    row = torch.arange(count, device=device)
    step = torch.arange(longest, device=device)[:, None]
    for cluster in range(clusters, 1, -1):
        end = chosen[cluster] - 1
        total = best[cluster - 1].view(-1).take((end + step) * count + row)
        total += cost.view(-1).take((end * longest + step) * count + row)
        chosen[cluster - 1] = end + 1 - longest + total.argmin(dim=0)
    return chosen
