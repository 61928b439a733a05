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

# Super-points per cluster, and the most of them that one cluster may take. More are closer to
# the optimum: the mean excess is 0.2 % with 6 (docs/methods.md has the measurements).
_RUNS_PER_CLUSTER = 6
_LONGEST = 20
# The edge after cluster j lies near super-point 6 j; this far off it is still looked for.
_REACH = 24
# Points over which weights are smoothed, to either side.
_SMOOTHING = 4


def coarse_edges(rows: SortedRows, clusters: int) -> Tensor:
    """The best partition of super-points, as edges between sorted points.

    Time O(clusters * 48 * 20) per row; memory 4 * 6 * 20 * clusters bytes per row.

    Args:
        rows: R sorted rows of n points.
        clusters: the number of clusters.

    Returns:
        int64 [R, clusters + 1], non-decreasing, first 0 and last n. Clusters may be empty.
    """
    runs = _RUNS_PER_CLUSTER * clusters
    ends = _run_ends(rows, runs)
    gain = _gains(rows, ends)
    chosen = _best_partition(gain, clusters)
    return ends.gather(1, chosen.t())


def _run_ends(rows: SortedRows, runs: int) -> Tensor:
    """Edges of the super-points: int64 [R, runs + 1]."""
    values, sums = rows.values, rows.weight_sums
    count, points = values.shape
    # With weight w_i and a gap d_i to the next point the density is w_i / d_i, and the cube root
    # of it integrated over the gap is w_i^(1/3) d_i^(2/3). Repeated values take no space.
    gap = values.diff(dim=1)
    index = torch.arange(points - 1, device=values.device)
    low = (index + 1 - _SMOOTHING).clamp(min=0)
    high = (index + 1 + _SMOOTHING).clamp(max=points)
    near = (sums[:, 2:] - sums[:, :-2]) / 2
    around = (sums[:, high] - sums[:, low]) / (high - low)
    length = (near + around).float().pow_(1 / 3) * gap.square().pow_(1 / 3)
    position = torch.zeros_like(values)
    torch.cumsum(length, dim=1, out=position[:, 1:])
    steps = torch.arange(1, runs, device=values.device) / runs
    ends = torch.zeros(count, runs + 1, dtype=torch.int64, device=values.device)
    ends[:, 1:runs] = torch.searchsorted(position, (position[:, -1:] * steps).contiguous())
    ends[:, runs] = points
    return ends


def _gains(rows: SortedRows, ends: Tensor) -> Tensor:
    """Gain of a cluster that ends with super-point m and is made of ``_LONGEST - l`` of them.

    Returns:
        fp32 [runs, _LONGEST, R]: the rows last, so that every step works on long vectors.
    """
    weight = rows.weight_sums.gather(1, ends)
    moment = rows.moment_sums.gather(1, ends)
    # Centred and scaled, since differences of gains must survive fp32.
    total = weight[:, -1:]
    moment = moment - moment[:, -1:] / total * weight
    scale = moment.abs().amax(dim=1, keepdim=True)
    moment = torch.where(scale > 0, moment / scale, 0.0).t().contiguous()
    weight = (weight / total).t().contiguous()
    added_weight = weight[1:, None] - _starts(weight)
    added_moment = moment[1:, None] - _starts(moment)
    gain = added_moment.square_().div_(added_weight)
    return torch.where(added_weight > 0, gain, 0.0).float().contiguous()


def _starts(sums: Tensor) -> Tensor:
    """[runs + 1, R] -> [runs, _LONGEST, R]: entry (m, l) is the sum before run m + 1 - _LONGEST + l.

    What would start before the row starts at 0.
    """
    padded = torch.cat([sums[:1].expand(_LONGEST - 1, -1), sums])
    return padded.unfold(0, _LONGEST, 1)[:-1].permute(0, 2, 1)


def _best_partition(gain: Tensor, clusters: int) -> Tensor:
    """The partition of super-points with the greatest total gain.

    Args:
        gain: as :func:`_gains` gives it.
        clusters: the number of clusters.

    Returns:
        int64 [clusters + 1, R]: the number of super-points before each edge.
    """
    runs, longest, count = gain.shape
    device = gain.device
    # best[j, longest - 1 + m]: the first m super-points in j clusters; -inf where there is no way.
    best = torch.full((clusters + 1, runs + longest, count), -torch.inf, device=device)
    best[0, longest - 1] = 0
    for cluster in range(1, clusters + 1):
        middle = cluster * runs // clusters
        low, high = max(1, middle - _REACH), min(runs, middle + _REACH)
        if cluster == clusters:
            low = runs
        before = best[cluster - 1].unfold(0, longest, 1)[low - 1 : high].permute(0, 2, 1)
        best[cluster, longest - 1 + low : longest + high] = (before + gain[low - 1 : high]).amax(1)
    chosen = torch.zeros(clusters + 1, count, dtype=torch.int64, device=device)
    chosen[clusters] = runs
    row = torch.arange(count, device=device)
    step = torch.arange(longest, device=device)[:, None]
    for cluster in range(clusters, 1, -1):
        end = chosen[cluster] - 1
        total = best[cluster - 1].view(-1).take((end + step) * count + row)
        total += gain.view(-1).take((end * longest + step) * count + row)
        chosen[cluster - 1] = end + 1 - longest + total.argmax(dim=0)
    return chosen
