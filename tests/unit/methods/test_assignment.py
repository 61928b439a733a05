"""Coordinate descent against one coordinate at a time in fp64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from squeezellm_hf.methods.squeezellm import assignment
from squeezellm_hf.methods.squeezellm.assignment import coordinate_descent
from tests.unit.methods import oracle


def problem(
    batch: int, rows: int, columns: int, entries: int, seed: int, removed: float = 0.1
) -> tuple[Tensor, ...]:
    """Hessians [B, n, n]; weights, kept [B, n, R]; tables [B, R, k], ascending."""
    generator = torch.Generator().manual_seed(seed)
    hessian = torch.stack(
        [oracle.random_hessian(columns, 2 * columns, seed + b) for b in range(batch)]
    )
    weight = torch.randn(batch, columns, rows, generator=generator)
    kept = torch.rand(batch, columns, rows, generator=generator) >= removed
    table = torch.randn(batch, rows, entries, generator=generator).sort(dim=2).values
    return hessian, weight, kept, table


def nearest(weight: Tensor, kept: Tensor, table: Tensor) -> Tensor:
    distance = (weight.transpose(1, 2)[..., None] - table[:, :, None]).abs()
    values = table.gather(2, distance.argmin(dim=3)).transpose(1, 2)
    return torch.where(kept, values, weight).contiguous()


def run(hessian: Tensor, weight: Tensor, kept: Tensor, table: Tensor, sweeps: int) -> Tensor:
    values = nearest(weight, kept, table)
    error = values - weight
    coordinate_descent(hessian, error, values, kept, table, sweeps)
    torch.testing.assert_close(error, values - weight, rtol=0, atol=1e-5)
    return values


@pytest.mark.parametrize(
    ("batch", "rows", "columns", "entries"),
    [(1, 3, 5, 2), (2, 2, 8, 4), (1, 2, 9, 8), (3, 2, 130, 4), (1, 1, 300, 16), (2, 1, 1, 2)],
)
@pytest.mark.parametrize("sweeps", [1, 2])
def test_equals_one_coordinate_at_a_time(
    batch: int, rows: int, columns: int, entries: int, sweeps: int
) -> None:
    arguments = problem(batch, rows, columns, entries, seed=columns)
    result = run(*arguments, sweeps)
    hessian, weight, kept, table = (tensor.numpy() for tensor in arguments)
    start = nearest(*arguments[1:]).numpy()
    for b in range(batch):
        for r in range(rows):
            expected = start[b, :, r]
            for _ in range(sweeps):
                expected = oracle.sweep(
                    hessian[b], weight[b, :, r], kept[b, :, r], table[b, r], expected
                )
            np.testing.assert_array_equal(result[b, :, r].numpy(), expected)


@pytest.mark.parametrize(("block", "leaf"), [(1, 1), (8, 2), (64, 64), (1024, 1)])
def test_the_size_of_blocks_has_no_influence(
    block: int, leaf: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = problem(2, 5, 100, 8, seed=1)
    expected = run(*arguments, sweeps=2)
    monkeypatch.setattr(assignment, "_BLOCK", block)
    monkeypatch.setattr(assignment, "_LEAF", leaf)
    assert run(*arguments, sweeps=2).equal(expected)


@settings(max_examples=40, deadline=None)
@given(
    columns=st.integers(1, 40),
    entries=st.sampled_from([2, 4, 8]),
    seed=st.integers(0, 10_000),
    spread=st.floats(0, 3),
)
def test_no_sweep_raises_the_objective(
    columns: int, entries: int, seed: int, spread: float
) -> None:
    _, weight, kept, table = problem(1, 4, columns, entries, seed)
    hessian = oracle.random_hessian(columns, columns + 1, seed, spread)
    hessian.diagonal().add_(1e-3 * hessian.diagonal().mean())
    before = None
    for sweeps in range(4):
        values = run(hessian[None], weight, kept, table, sweeps)
        now = [
            oracle.quadratic(hessian.numpy(), weight[0, :, r].numpy(), values[0, :, r].numpy())
            for r in range(4)
        ]
        if before is not None:
            assert all(new <= old * (1 + 1e-5) for new, old in zip(now, before, strict=True))
        before = now


def test_counting_and_searching_choose_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = problem(2, 5, 60, 16, seed=4)
    expected = run(*arguments, sweeps=2)
    monkeypatch.setattr(assignment, "_NARROW", 0)
    assert run(*arguments, sweeps=2).equal(expected)


def test_cells_that_are_not_kept_stay_without_error() -> None:
    hessian, weight, kept, table = problem(2, 6, 70, 4, seed=5, removed=0.5)
    kept[1, :, 3] = False
    values = run(hessian, weight, kept, table, sweeps=3)
    assert values[~kept].equal(weight[~kept])
    entries = (values.transpose(1, 2)[..., None] == table[:, :, None]).any(dim=3).transpose(1, 2)
    assert entries[kept].all()


def test_equal_entries_do_no_harm() -> None:
    hessian, weight, kept, table = problem(1, 4, 30, 8, seed=2)
    table[:, :, 3:] = table[:, :, 3:4]
    few = run(hessian, weight, kept, table[:, :, :4].contiguous(), sweeps=2)
    assert run(hessian, weight, kept, table, sweeps=2).equal(few)
