"""The fast solver against the exact one and against scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits
from torch import Tensor

from squeezellm_hf.methods.squeezellm.kmeans import weighted_kmeans


def error(values: Tensor, weights: Tensor, centroids: Tensor) -> Tensor:
    """fp64 [R], by distances to every centroid."""
    distance = (values[:, :, None].double() - centroids[:, None].double()).abs().amin(dim=2)
    return (weights.double() * distance.square()).sum(dim=1)


def layer(kind: str, rows: int = 32, size: int = 576) -> tuple[Tensor, Tensor]:
    """Weights and Fisher values distributed like those of language models, and worse."""
    generator = torch.Generator().manual_seed(7)
    normal = torch.randn(rows, size, generator=generator)
    spread = torch.randn(rows, size, generator=generator)
    if kind == "uniform weights":
        return 0.02 * normal, torch.ones(rows, size)
    if kind == "heavy tails":
        return 0.02 * normal * (0.7 * spread).exp(), (3 * spread.flip(1) - 20).exp()
    if kind == "few distinct values":
        return (4 * normal).round() / 50 + (spread.round() / 300), (2 * spread.flip(1)).exp()
    assert kind == "one dominates"
    weights = (2 * spread).exp()
    weights[:, 100] = 1e6
    return 0.02 * normal, weights


KINDS = ["uniform weights", "heavy tails", "few distinct values", "one dominates"]


@pytest.mark.parametrize("clusters", [4, 8, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_close_to_the_optimum(kind: str, clusters: int) -> None:
    values, weights = layer(kind)
    optimum = error(values, weights, weighted_kmeans(values, weights, clusters, "exact"))
    found = error(values, weights, weighted_kmeans(values, weights, clusters))
    excess = found / optimum - 1
    assert excess.min() > -1e-5  # the optimum is one
    assert excess.mean() < 0.005


@pytest.mark.parametrize("clusters", [8, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_never_worse_than_scikit_learn(kind: str, clusters: int) -> None:
    values, weights = layer(kind, rows=8)
    with threadpool_limits(1):  # its threads only wait for one another on so few points
        theirs = torch.stack(
            [
                torch.from_numpy(
                    KMeans(clusters, init="k-means++", n_init=3, max_iter=50, random_state=0)
                    .fit(x[:, None].astype(np.float64), sample_weight=w.astype(np.float64))
                    .cluster_centers_[:, 0]
                )
                for x, w in zip(values.numpy(), weights.numpy(), strict=True)
            ]
        )
    ours = weighted_kmeans(values, weights, clusters)
    assert error(values, weights, ours).sum() <= error(values, weights, theirs).sum()


@pytest.mark.parametrize("clusters", [2, 32, 64, 128])
def test_other_sizes_are_as_close_to_the_optimum(clusters: int) -> None:
    values, weights = layer("heavy tails", rows=8)
    optimum = error(values, weights, weighted_kmeans(values, weights, clusters, "exact"))
    found = error(values, weights, weighted_kmeans(values, weights, clusters))
    assert (found / optimum - 1).mean() < 0.005


@pytest.mark.parametrize("solver", ["lloyd", "exact"])
def test_a_shifted_row_is_clustered_as_well(solver: str) -> None:
    """Small differences on a large offset: where careless sums of squares cancel."""
    values, weights = layer("heavy tails", rows=4)
    # Exact in fp32: multiples of 2^-15 below 2^9 on an offset of 8.
    values = (values * 2**10).round() / 2**15
    plain = error(values, weights, weighted_kmeans(values, weights, 16, "exact"))
    shifted = error(values + 8, weights, weighted_kmeans(values + 8, weights, 16, solver))
    assert (shifted / plain - 1).mean() < 0.005
