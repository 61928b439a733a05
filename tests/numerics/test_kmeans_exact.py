"""The exact solver against every clustering there is, on rows small enough to try them all."""

from itertools import combinations, product

import numpy as np
import pytest
import torch

from squeezellm_hf.methods.squeezellm.exact import exact_edges
from squeezellm_hf.methods.squeezellm.kmeans import weighted_kmeans
from squeezellm_hf.methods.squeezellm.rows import sort_rows


def error_of_groups(values: np.ndarray, weights: np.ndarray, groups: list[np.ndarray]) -> float:
    total = 0.0
    for group in groups:
        x, w = values[group], weights[group]
        if w.sum() > 0:
            total += float((w * (x - (w * x).sum() / w.sum()) ** 2).sum())
    return total


def best_of_all_runs(values: np.ndarray, weights: np.ndarray, clusters: int) -> float:
    """Least error over all partitions of the sorted values into ``clusters`` runs."""
    order = np.argsort(values)
    runs = (np.split(order, cuts) for cuts in combinations(range(1, values.size), clusters - 1))
    return min(error_of_groups(values, weights, groups) for groups in runs)


def error(values: np.ndarray, weights: np.ndarray, centroids: np.ndarray) -> float:
    distance = np.abs(values[:, None] - centroids.astype(np.float64)[None]).min(axis=1)
    return float((weights * distance**2).sum())


def random_row(seed: int, size: int, ties: bool) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    values = generator.standard_t(3, size).astype(np.float32)
    if ties:
        values = np.round(values)
    weights = np.exp(3 * generator.standard_normal(size)).astype(np.float32)
    weights[generator.random(size) < 0.2] = 0
    return values, weights


@pytest.mark.parametrize("clusters", [2, 3, 4, 5])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_exact_equals_best_of_all_runs(clusters: int, ties: bool, seed: int) -> None:
    values, weights = random_row(seed, 10, ties)
    centroids = weighted_kmeans(
        torch.from_numpy(values)[None], torch.from_numpy(weights)[None], clusters, "exact"
    )
    expected = best_of_all_runs(values.astype(np.float64), weights.astype(np.float64), clusters)
    scale = float((weights * values.astype(np.float64) ** 2).sum())
    assert error(values, weights, centroids[0].numpy()) == pytest.approx(
        expected, rel=1e-5, abs=1e-12 * scale
    )


@pytest.mark.parametrize("seed", range(4))
def test_no_assignment_beats_runs(seed: int) -> None:
    """Optimal clusters are runs of the sorted values: the premise of the solver."""
    values, weights = random_row(seed, 6, ties=False)
    every = (
        [np.flatnonzero(np.array(label) == k) for k in range(3)]
        for label in product(range(3), repeat=6)
    )
    best = min(error_of_groups(values, weights, groups) for groups in every)
    centroids = weighted_kmeans(
        torch.from_numpy(values)[None], torch.from_numpy(weights)[None], 3, "exact"
    )
    assert error(values, weights, centroids[0].numpy()) == pytest.approx(best, rel=1e-5, abs=1e-9)


def dynamic_programme(values: np.ndarray, weights: np.ndarray, clusters: int) -> float:
    """The recurrence written out, O(clusters n^2), in fp64 without prefix sums."""
    order = np.argsort(values, kind="stable")
    x, w = values[order].astype(np.float64), weights[order].astype(np.float64)
    cost = np.zeros((x.size + 1, x.size + 1))
    for start in range(x.size):
        for stop in range(start + 1, x.size + 1):
            cost[start, stop] = error_of_groups(x, w, [np.arange(start, stop)])
    best = cost[0].copy()
    for _ in range(1, clusters):
        best = np.array([min(best[: m + 1] + cost[: m + 1, m]) for m in range(x.size + 1)])
    return float(best[-1])


@pytest.mark.parametrize(("size", "clusters"), [(33, 4), (64, 8), (70, 16)])
def test_exact_equals_the_recurrence_written_out(size: int, clusters: int) -> None:
    rows = [random_row(seed, size, ties=seed == 2) for seed in range(3)]
    values = torch.from_numpy(np.stack([row[0] for row in rows]))
    weights = torch.from_numpy(np.stack([row[1] for row in rows]))
    centroids = weighted_kmeans(values, weights, clusters, "exact").numpy()
    for (x, w), table in zip(rows, centroids, strict=True):
        expected = dynamic_programme(x, w, clusters)
        assert error(x, w, table) == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_edges_are_a_partition() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(20, 50, generator=generator).mul(3).round()
    edges = exact_edges(sort_rows(values, torch.rand(20, 50, generator=generator)), 4)
    assert (edges[:, 0] == 0).all()
    assert (edges[:, -1] == 50).all()
    assert (edges.diff(dim=1) >= 0).all()


def test_rows_do_not_depend_on_their_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(9, 40, generator=generator)
    weights = torch.rand(9, 40, generator=generator).pow(4)
    together = weighted_kmeans(values, weights, 6, "exact")
    alone = torch.cat(
        [weighted_kmeans(values[i : i + 1], weights[i : i + 1], 6, "exact") for i in range(9)]
    )
    assert torch.equal(together, alone)
