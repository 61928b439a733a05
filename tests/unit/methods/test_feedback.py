"""Error feedback against GPTQ as it is usually written: through the inverse Hessian, in fp64."""

import numpy as np
import pytest
import torch

from squeezellm_hf.methods.squeezellm.feedback import feedback_rounding, unit_factor
from tests.unit.methods import oracle
from tests.unit.methods.test_assignment import nearest, problem


def gptq(hessian: np.ndarray, weight: np.ndarray, kept: np.ndarray, table: np.ndarray):
    """One row; each column's error is passed on to the columns after it."""
    inverse = np.linalg.inv(hessian.astype(np.float64))
    weight, result = weight.astype(np.float64).copy(), np.empty(len(weight))
    original = weight.copy()
    for i in range(len(weight)):
        entry = table[np.abs(table - weight[i]).argmin()]
        # A cell that is kept exact makes up for nothing: its error is its own drift.
        result[i] = entry if kept[i] else original[i]
        weight -= inverse[i] * (weight[i] - result[i]) / inverse[i, i]
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
        weight[i], inverse[i, i] = result[i], 1.0
    return result


@pytest.mark.parametrize(("columns", "entries"), [(1, 2), (9, 4), (60, 8), (140, 4)])
def test_equals_gptq(columns: int, entries: int) -> None:
    hessian, weight, kept, table = problem(2, 3, columns, entries, seed=columns)
    result = feedback_rounding(hessian, weight, kept, table).numpy()
    for b in range(2):
        for r in range(3):
            expected = gptq(
                hessian[b].numpy(),
                weight[b, :, r].numpy(),
                kept[b, :, r].numpy(),
                table[b, r].numpy(),
            )
            np.testing.assert_allclose(result[b, :, r], expected, rtol=0, atol=1e-6)


def test_better_than_rounding_to_nearest_on_the_whole() -> None:
    hessian, weight, kept, table = problem(1, 40, 100, 8, seed=3)
    before, after = (
        sum(
            oracle.quadratic(hessian[0].numpy(), weight[0, :, r].numpy(), values[0, :, r].numpy())
            for r in range(40)
        )
        for values in (nearest(weight, kept, table),
                       feedback_rounding(hessian, weight, kept, table))
    )  # fmt: skip
    assert after < 0.85 * before


@pytest.mark.parametrize("columns", [1, 5, 80])
def test_the_factor(columns: int) -> None:
    hessian = oracle.random_hessian(columns, 2 * columns)
    factor = unit_factor(hessian).double()
    assert (factor.diagonal() == 1).all()
    assert (factor.triu(1) == 0).all()
    inverse = torch.linalg.inv(factor)
    diagonal = inverse.T @ hessian.double() @ inverse
    rest = diagonal - diagonal.diagonal().diag()
    assert float(rest.abs().max()) <= 1e-4 * float(diagonal.abs().max())


def test_a_singular_hessian_is_damped() -> None:
    rows = torch.randn(4, 30, generator=torch.Generator().manual_seed(0))
    factor = unit_factor(rows.T @ rows)
    assert factor.isfinite().all()
    assert not factor.equal(torch.eye(30))


def test_without_a_factor_there_is_no_feedback() -> None:
    assert unit_factor(-torch.eye(5)).equal(torch.eye(5))
