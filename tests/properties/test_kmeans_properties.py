"""What holds for every row that k-means is given."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from squeezellm_hf.methods.squeezellm.codebook import nearest_entry
from squeezellm_hf.methods.squeezellm.kmeans import lloyd, weighted_kmeans
from squeezellm_hf.methods.squeezellm.rows import sort_rows


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Values with ties and zeros at scales from 1e-8 to 1e4, weights over ten decades."""
    rows, size = draw(st.integers(1, 4)), draw(st.integers(1, 80))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    values = torch.randn(rows, size, generator=generator)
    if draw(st.booleans()):
        values = (values * draw(st.sampled_from([1.0, 4.0]))).round()
    values *= 10.0 ** draw(st.integers(-8, 4))
    weights = (
        draw(st.sampled_from([0.0, 1.0, 4.0])) * torch.randn(rows, size, generator=generator)
    ).exp()
    weights *= torch.rand(rows, size, generator=generator) >= draw(st.sampled_from([0.0, 0.5, 1.0]))
    return values, weights * 10.0 ** draw(st.integers(-12, 3))


def error(values: Tensor, weights: Tensor, centroids: Tensor) -> Tensor:
    distance = (values[:, :, None].double() - centroids[:, None].double()).abs().amin(dim=2)
    return (weights.double() * distance.square()).sum(dim=1)


def slack(values: Tensor, weights: Tensor) -> Tensor:
    """What rounding centroids to fp32 can do to the error of a row."""
    return 1e-12 * (weights.double() * values.double().square()).sum(dim=1)


@settings(max_examples=60, deadline=None)
@given(batches(), st.sampled_from([2, 4, 8, 16]), st.sampled_from(["lloyd", "exact"]))
def test_centroids_ascend_within_the_row(
    batch: tuple[Tensor, Tensor], clusters: int, solver: str
) -> None:
    values, weights = batch
    centroids = weighted_kmeans(values, weights, clusters, solver)
    assert centroids.shape == (values.shape[0], clusters)
    assert (centroids.diff(dim=1) >= 0).all()
    margin = 1e-6 * values.abs().amax(dim=1)
    assert (centroids[:, 0] >= values.amin(dim=1) - margin).all()
    assert (centroids[:, -1] <= values.amax(dim=1) + margin).all()


@settings(max_examples=60, deadline=None)
@given(batches(), st.sampled_from([2, 4, 8, 16]), st.sampled_from(["lloyd", "exact"]))
def test_few_distinct_values_are_exact(
    batch: tuple[Tensor, Tensor], clusters: int, solver: str
) -> None:
    values, weights = batch
    centroids = weighted_kmeans(values, weights, clusters, solver)
    for row, table in zip(values, centroids, strict=True):
        distinct = row.unique()
        if distinct.numel() <= clusters:
            assert torch.equal(table[: distinct.numel()], distinct)
            assert (table[distinct.numel() :] == distinct[-1]).all()


@settings(max_examples=60, deadline=None)
@given(batches(), st.sampled_from([2, 4, 8]))
def test_fast_solver_is_never_below_the_exact_one(
    batch: tuple[Tensor, Tensor], clusters: int
) -> None:
    values, weights = batch
    weights = torch.where((weights > 0).any(dim=1, keepdim=True), weights, 1.0)
    optimum = error(values, weights, weighted_kmeans(values, weights, clusters, "exact"))
    found = error(values, weights, weighted_kmeans(values, weights, clusters))
    assert (optimum <= found * (1 + 1e-5) + slack(values, weights)).all()


@settings(max_examples=60, deadline=None)
@given(batches(), st.integers(1, 9), st.data())
def test_lloyd_never_raises_the_error(
    batch: tuple[Tensor, Tensor], clusters: int, data: st.DataObject
) -> None:
    values, weights = batch
    rows = sort_rows(values, weights)
    size = values.shape[1]
    cuts = sorted(
        data.draw(st.lists(st.integers(0, size), min_size=clusters - 1, max_size=clusters - 1))
    )
    edges = torch.tensor([[0, *cuts, size]]).expand(values.shape[0], -1).contiguous()
    weights = torch.where((weights > 0).any(dim=1, keepdim=True), weights, 1.0)
    order = values.argsort(dim=1, stable=True)
    x, w = values.gather(1, order).double(), weights.gather(1, order).double()
    before = torch.zeros(values.shape[0], dtype=torch.float64)
    for left, right in zip([0, *cuts], [*cuts, size], strict=True):
        run, mass = x[:, left:right], w[:, left:right]
        mean = (run * mass).sum(dim=1, keepdim=True) / mass.sum(dim=1, keepdim=True)
        before += (mass * (run - mean).square()).sum(dim=1).nan_to_num()
    after = error(values, weights, lloyd(rows, edges))
    assert (after <= before * (1 + 1e-5) + slack(values, weights)).all()


@settings(max_examples=30, deadline=None)
@given(batches(), st.sampled_from([4, 16]), st.integers(-60, 60))
def test_scale_of_the_weights_is_irrelevant(
    batch: tuple[Tensor, Tensor], clusters: int, exponent: int
) -> None:
    values, weights = batch
    scaled = weights * 2.0**exponent
    if ((scaled * 2.0**-exponent) != weights).any():  # left the range of fp32
        return
    assert torch.equal(
        weighted_kmeans(values, weights, clusters), weighted_kmeans(values, scaled, clusters)
    )


@settings(max_examples=30, deadline=None)
@given(batches(), st.sampled_from([2, 8]))
def test_quantized_rows_are_quantized_to_themselves(
    batch: tuple[Tensor, Tensor], clusters: int
) -> None:
    values, weights = batch
    table = weighted_kmeans(values, weights, clusters)
    once = table.gather(1, nearest_entry(values, table).long())
    again = weighted_kmeans(once, weights, clusters)
    assert torch.equal(once, again.gather(1, nearest_entry(once, again).long()))


@settings(max_examples=60, deadline=None)
@given(
    batches(), st.sampled_from([1, 2, 16, 256]), st.sampled_from([torch.float16, torch.bfloat16])
)
def test_nearest_entry_is_nearest(
    batch: tuple[Tensor, Tensor], entries: int, dtype: torch.dtype
) -> None:
    values, weights = batch
    table = weighted_kmeans(values, weights, entries).to(dtype)
    index = nearest_entry(values, table).long()
    assert int(index.max()) < entries
    distance = (values[:, :, None].double() - table[:, None].double()).abs()
    chosen = distance.gather(2, index[:, :, None])[:, :, 0]
    # Midpoints are rounded to fp32.
    assert (chosen <= distance.amin(dim=2) + 1e-7 * values.abs().double()).all()
