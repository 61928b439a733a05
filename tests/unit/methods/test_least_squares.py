"""The table step against numpy's least squares."""

import numpy as np
import pytest
import torch
from torch import Tensor

from squeezellm_hf.methods.squeezellm import least_squares
from squeezellm_hf.methods.squeezellm.least_squares import refit
from tests.unit.methods import oracle


def problem(
    rows: int = 6, columns: int = 40, entries: int = 4, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hessian = oracle.random_hessian(columns, 2 * columns, seed)
    weight = torch.randn(rows, columns, generator=generator)
    indices = torch.randint(0, entries, (rows, columns), generator=generator)
    kept = torch.rand(rows, columns, generator=generator) > 0.1
    table = torch.randn(rows, entries, generator=generator).half().float()
    return hessian, weight, indices, kept, table


def fit(
    hessian: Tensor,
    weight: Tensor,
    indices: Tensor,
    kept: Tensor,
    table: Tensor,
    dtype: torch.dtype = torch.float16,
) -> Tensor:
    error = torch.where(kept, table.gather(1, indices) - weight, 0.0)
    return refit(hessian, error @ hessian, indices.to(torch.uint8), kept, table, dtype)


def objectives(hessian: Tensor, weight: Tensor, indices: Tensor, kept: Tensor, table: Tensor):
    values = torch.where(kept, table.gather(1, indices), weight)
    pairs = zip(weight, values, strict=True)
    return np.array([oracle.quadratic(hessian.numpy(), w.numpy(), v.numpy()) for w, v in pairs])


@pytest.mark.parametrize(("entries", "columns"), [(2, 10), (4, 40), (8, 200), (16, 64)])
def test_equals_numpy(entries: int, columns: int) -> None:
    arguments = problem(5, columns, entries)
    hessian, weight, indices, kept, _ = arguments
    table = fit(*arguments)
    for r in range(5):
        expected = oracle.best_table(
            hessian.numpy(), weight[r].numpy(), kept[r].numpy(), indices[r].numpy(), entries
        )
        used = np.isin(np.arange(entries), indices[r][kept[r]].numpy())
        np.testing.assert_allclose(table[r].numpy()[used], expected[used], rtol=2e-3, atol=2e-3)


def test_chunks_have_no_influence(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = fit(*problem(20))
    monkeypatch.setattr(least_squares, "_CPU_BYTES", 1)
    torch.testing.assert_close(fit(*problem(20)), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("seed", range(5))
def test_never_raises_the_objective(dtype: torch.dtype, seed: int) -> None:
    hessian, weight, indices, kept, table = problem(8, 30, 8, seed)
    table = table.to(dtype).float()
    before = objectives(hessian, weight, indices, kept, table)
    new = fit(hessian, weight, indices, kept, table, dtype)
    assert new.equal(new.to(dtype).float())
    after = objectives(hessian, weight, indices, kept, new)
    assert (after < before).all()
    again = fit(hessian, weight, indices, kept, new, dtype)
    assert (objectives(hessian, weight, indices, kept, again) <= after * (1 + 1e-6)).all()


def test_entries_without_cells_keep_their_value() -> None:
    hessian, weight, indices, kept, table = problem(4, 40, 8)
    indices[indices == 5] = 4
    kept[2] &= indices[2] != 0
    kept[3] = False
    new = fit(hessian, weight, indices, kept, table)
    assert new[:, 5].equal(table[:, 5])
    assert new[2, 0] == table[2, 0]
    assert new[3].equal(table[3])
    assert (new[:3, 1] != table[:3, 1]).all()


def test_a_singular_system_is_damped() -> None:
    """One token: P^T H P has rank 1, and the table can make the error vanish all the same."""
    _, weight, indices, kept, table = problem(4, 30, 4)
    token = torch.randn(30, generator=torch.Generator().manual_seed(1))
    hessian = torch.outer(token, token)
    before = objectives(hessian, weight, indices, kept, table)
    new = fit(hessian, weight, indices, kept, table)
    assert new.isfinite().all()
    assert (objectives(hessian, weight, indices, kept, new) <= 1e-4 * before).all()


def test_a_system_that_cannot_be_solved_leaves_the_table() -> None:
    """An indefinite matrix is none of a Gram matrix; nothing is done rather than harm."""
    _, weight, indices, kept, table = problem(4, 30, 4)
    hessian = -torch.eye(30)
    assert fit(hessian, weight, indices, kept, table).equal(table)


def test_entries_out_of_range_of_the_dtype_are_refused() -> None:
    hessian, weight, indices, kept, table = problem(4, 30, 4)
    weight[1] += 1e6
    new = fit(hessian, weight, indices, kept, table)
    assert new[1].equal(table[1])
    assert not new[0].equal(table[0])
