"""The alternation: objectives against a brute-force fp64 one, and what is hard on it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from squeezellm_hf.methods.squeezellm import lnq
from squeezellm_hf.methods.squeezellm.codebook import nearest_entry
from squeezellm_hf.methods.squeezellm.lnq import RowGroup, refine
from tests.unit.methods import oracle


def group(
    rows: int = 6,
    columns: int = 50,
    entries: int = 4,
    seed: int = 0,
    *,
    removed: float = 0.05,
    hessian: Tensor | None = None,
    dtype: torch.dtype = torch.float16,
) -> RowGroup:
    """A start as k-means would leave it, roughly: equal steps, nearest entries."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    quantiles = torch.linspace(0, 1, 2 * entries + 1)[1::2]
    table = weight.quantile(quantiles, dim=1).t().contiguous().to(dtype)
    if hessian is None:
        hessian = oracle.random_hessian(columns, 2 * columns, seed)
    mask = torch.rand(rows, columns, generator=generator) < removed
    return RowGroup(hessian, weight, mask, table, nearest_entry(weight, table))


def objectives(g: RowGroup) -> np.ndarray:
    """Of every row, with the damping that the solver adds to H."""
    hessian = g.hessian.double()
    hessian = hessian + lnq.DAMPING * hessian.diagonal().mean() * torch.eye(len(hessian))
    values = torch.where(g.removed, g.weight, g.table.float().gather(1, g.indices.long()))
    return np.array(
        [
            oracle.quadratic(hessian.numpy(), w.numpy(), v.numpy())
            for w, v in zip(g.weight.float(), values.float(), strict=True)
        ]
    )


def copy(g: RowGroup) -> RowGroup:
    return RowGroup(*(tensor.clone() for tensor in g))


def refined(g: RowGroup, rounds: int = 2, sweeps: int = 4) -> RowGroup:
    g = copy(g)
    refine([g], rounds, sweeps)
    return g


@settings(max_examples=40, deadline=None)
@given(
    columns=st.integers(1, 40),
    bits=st.integers(1, 4),
    seed=st.integers(0, 10_000),
    spread=st.floats(0, 4),
    tokens=st.integers(1, 80),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
)
def test_no_row_gets_worse_and_more_rounds_are_no_worse(
    columns: int, bits: int, seed: int, spread: float, tokens: int, dtype: torch.dtype
) -> None:
    hessian = oracle.random_hessian(columns, tokens, seed, spread)
    start = group(5, columns, 2**bits, seed, hessian=hessian, dtype=dtype)
    before = objectives(start)
    for rounds in (1, 2, 3):
        after = objectives(refined(start, rounds, sweeps=2))
        assert (after <= before * (1 + 1e-4)).all()
        before = after


def test_much_better_than_the_start() -> None:
    start = group(20, 200, 8)
    assert (objectives(refined(start)) < 0.8 * objectives(start)).all()


def test_often_the_optimum_of_all_assignments() -> None:
    """Coordinate descent stops at local optima; of 2^7 assignments it finds the best quite often,
    and never one that is better than the best."""
    ratios = []
    for seed in range(5):
        start = group(8, 7, 2, seed, removed=0.0)
        hessian = start.hessian.double()
        hessian += lnq.DAMPING * hessian.diagonal().mean() * torch.eye(7)
        least = [
            oracle.optimum(hessian.numpy(), w.numpy(), np.ones(7, bool), 2) for w in start.weight
        ]
        ratios.extend(objectives(refined(start, rounds=4)) / np.array(least))
    assert min(ratios) >= 1 - 1e-3
    assert np.mean(np.array(ratios) < 1.01) > 0.5


def test_an_uncorrelated_hessian_gives_weighted_lloyd() -> None:
    """H diagonal: the objective is that of k-means, and its fixed points are Lloyd's."""
    diagonal = torch.linspace(0.5, 2, 60)
    result = refined(group(4, 60, 4, hessian=diagonal.diag(), removed=0.0), rounds=60)
    assert result.indices.equal(nearest_entry(result.weight, result.table))
    one_hot = torch.nn.functional.one_hot(result.indices.long(), 4).float() * diagonal[:, None]
    means = torch.einsum("rnk,rn->rk", one_hot, result.weight) / one_hot.sum(dim=1)
    torch.testing.assert_close(result.table.float(), means, rtol=1e-3, atol=1e-3)


def test_tables_ascend_and_indices_are_in_range() -> None:
    for entries in (2, 16, 256):
        result = refined(group(4, 90, entries))
        assert (result.table.float().diff(dim=1) >= 0).all()
        assert int(result.indices.max()) < entries
        assert result.table.dtype == torch.float16


def test_many_groups_at_once_give_what_each_gives_alone() -> None:
    starts = [group(5, 60, 4, seed) for seed in range(7)]
    starts += [group(9, 60, 4, 9), group(5, 33, 4, 10), group(5, 60, 8, 11)]
    together = [copy(g) for g in starts]
    refine(together, 2, 3)
    for start, result in zip(starts, together, strict=True):
        alone = refined(start, 2, 3)
        assert result.table.equal(alone.table)
        assert result.indices.equal(alone.indices)


def test_groups_that_are_cut_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    start = group(40, 60, 4)
    whole = refined(start)
    monkeypatch.setattr(lnq, "_CPU_CELLS", 7 * 60)
    cut = refined(start)
    assert np.allclose(objectives(cut), objectives(whole), rtol=1e-3)


def test_only_table_and_indices_are_written() -> None:
    start = group()
    before = copy(start)
    refine([start], 1, 1)
    for name in ("hessian", "weight", "removed"):
        assert getattr(start, name).equal(getattr(before, name))


def test_a_layer_that_no_token_reached_stays_as_it_is() -> None:
    start = group(hessian=torch.zeros(50, 50))
    other = group(seed=3)
    results = [copy(start), copy(other)]
    refine(results, 2, 4)
    assert results[0].table.equal(start.table)
    assert results[0].indices.equal(start.indices)
    assert not results[1].indices.equal(other.indices)


def test_dead_inputs() -> None:
    """Inputs that are always zero: any entry would do, and one near the weight is taken."""
    hessian = oracle.random_hessian(50, 100)
    hessian[10:30] = 0
    hessian[:, 10:30] = 0
    result = refined(group(hessian=hessian, removed=0.0))
    assert result.indices[:, 10:30].equal(nearest_entry(result.weight, result.table)[:, 10:30])


def test_fewer_tokens_than_inputs() -> None:
    start = group(6, 80, 4, hessian=oracle.random_hessian(80, 5))
    assert (objectives(refined(start)) < 0.2 * objectives(start)).all()


@pytest.mark.parametrize("scale", [1e-25, 1e-6, 1e6, 1e25])
def test_the_scale_of_the_hessian_has_no_influence(scale: float) -> None:
    start = group()
    scaled = refined(start._replace(hessian=start.hessian * scale))
    expected = refined(start)
    assert np.allclose(objectives(scaled._replace(hessian=start.hessian)), objectives(expected))


def test_one_huge_input() -> None:
    """A massive activation: the error must vanish along it, in fp32."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(400, 64, generator=generator).double()
    rows[:, 7] *= 3000
    rows += 300 * torch.randn(64, generator=generator)
    start = group(16, 64, 8, hessian=(rows.T @ rows).float())
    before, after = objectives(start), objectives(refined(start))
    assert (after < 0.5 * before).all()
    assert after.sum() < 0.05 * before.sum()


def test_rows_of_zeros_and_of_removed_cells() -> None:
    start = group()
    start.weight[1] = 0.0
    start.table[1] = 0.0
    start.removed[2] = True
    result = refined(start)
    assert objectives(result)[[1, 2]].tolist() == [0.0, 0.0]
    assert result.table.isfinite().all()
