"""Whole matrices with Hessians: objective, sparse part, groups, and wrong arguments."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from squeezellm_hf.methods.squeezellm import (
    SqueezeLLMParameters,
    WeightMatrix,
    lnq,
    quadratic_error,
    quantize_weight,
    quantize_weights,
)
from tests.unit.methods import oracle
from tests.unit.methods.test_quantize import dequantize, example

SPARSE = {"outlier_fraction": 0.02, "sensitive_fraction": 0.01}


def hessians(groups: int, columns: int = 70, seed: int = 0) -> Tensor:
    return torch.stack([oracle.random_hessian(columns, 150, seed + g) for g in range(groups)])


def parameters(codebook: str, bits: int = 3, **changes: Any) -> SqueezeLLMParameters:
    return SqueezeLLMParameters(bits=bits, codebook=codebook, **{**SPARSE, **changes})


def error(weight: Tensor, tensors: dict[str, Tensor], hessian: Tensor, bits: int = 3) -> Tensor:
    return quadratic_error(weight, dequantize(tensors, bits, weight.shape[1]), hessian)


def test_quadratic_error() -> None:
    weight, _ = example(5, 6)
    restored = weight + 0.1
    hessian = hessians(2, 6)
    rows = quadratic_error(weight, restored, hessian)
    for o, group in enumerate([0, 0, 1, 1, 1]):
        expected = oracle.quadratic(hessian[group].numpy(), weight[o].numpy(), restored[o].numpy())
        assert float(rows[o]) == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(("codebook", "groups"), [("lnq", 1), ("guided", 4), ("guided", 5)])
def test_no_row_is_worse_than_k_means(
    codebook: str, groups: int, bits: int, dtype: torch.dtype
) -> None:
    weight, fisher = example()
    weight = weight.to(dtype)
    hessian = hessians(groups)
    before = quantize_weight(weight, fisher, parameters("kmeans", bits))
    after = quantize_weight(
        weight, fisher, parameters(codebook, bits, guided_groups=groups), hessian=hessian
    )
    assert {k: (t.shape, t.dtype) for k, t in before.items()} == {
        k: (t.shape, t.dtype) for k, t in after.items()
    }
    assert (after["lookup_table"].float().diff(dim=1) >= 0).all()
    mean = hessian.diagonal(dim1=1, dim2=2).mean(dim=1)
    hessian = hessian + lnq.DAMPING * mean[:, None, None] * torch.eye(70)
    was, now = error(weight, before, hessian, bits), error(weight, after, hessian, bits)
    assert (now <= was * 1.0001 + 1e-9).all()
    if bits < 8:  # 256 entries hold 70 weights exactly
        assert now.sum() < 0.9 * was.sum()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_sparse_part_is_that_of_k_means_and_exact(dtype: torch.dtype) -> None:
    weight, fisher = example(40, 200)
    weight = weight.to(dtype)
    fisher[3], weight[4] = 0.0, 0.0
    before = quantize_weight(weight, fisher, parameters("kmeans"))
    after = quantize_weight(weight, fisher, parameters("lnq"), hessian=hessians(1, 200))
    for name in ("crow_indices", "col_indices"):
        assert before[name].equal(after[name])
    counts = after["crow_indices"].long().diff()
    rows = torch.repeat_interleave(torch.arange(40), counts)
    columns = after["col_indices"].long()
    restored = dequantize(after, 3, 200)
    exact = restored[rows, columns].to(dtype) == weight[rows, columns]
    assert exact.float().mean() > 0.98
    difference = (restored[rows, columns] - weight[rows, columns].float()).abs()
    assert float(difference.max()) <= 2**-9 * float(weight.abs().max())
    assert (restored[4] == 0).all()


def test_matrices_side_by_side_give_what_each_gives_alone() -> None:
    matrices = []
    for seed, codebook, bits in [(0, "lnq", 3), (1, "guided", 3), (2, "guided", 3),
                                 (3, "kmeans", 3), (4, "guided", 2), (5, "lnq", 3)]:  # fmt: skip
        weight, fisher = example()
        weight = weight.roll(seed, 0)
        hessian = {"lnq": hessians(1, seed=seed), "guided": hessians(4, seed=seed)}.get(codebook)
        changes = {"lnq_sweeps": 2} if seed == 5 else {}
        matrices.append(
            WeightMatrix(weight, fisher, parameters(codebook, bits, **changes), hessian)
        )
    together = quantize_weights(matrices)
    for matrix, tensors in zip(matrices, together, strict=True):
        alone = quantize_weight(
            matrix.weight, matrix.fisher, matrix.parameters, hessian=matrix.hessian
        )
        assert alone.keys() == tensors.keys()
        assert all(tensors[name].equal(alone[name]) for name in alone)


def test_without_fisher_and_with_one() -> None:
    weight, _ = example()
    hessian = hessians(1)
    tensors = quantize_weight(weight, None, parameters("lnq"), hessian=hessian)
    plain = quantize_weight(weight, None, parameters("kmeans"))
    assert error(weight, tensors, hessian).sum() < 0.8 * error(weight, plain, hessian).sum()


def test_k_means_has_no_use_for_a_hessian() -> None:
    weight, fisher = example()
    one = quantize_weight(weight, fisher, parameters("kmeans"))
    other = quantize_weight(weight, fisher, parameters("kmeans"), hessian=hessians(1))
    assert all(one[name].equal(other[name]) for name in one)


def test_parameters_of_a_model_leave_no_graph() -> None:
    weight, fisher = example()
    tensors = quantize_weight(
        torch.nn.Parameter(weight), fisher, parameters("lnq"), hessian=hessians(1)
    )
    assert not any(tensor.requires_grad for tensor in tensors.values())


def test_arguments_are_left_alone() -> None:
    weight, fisher = example()
    hessian = hessians(4)
    before = weight.clone(), fisher.clone(), hessian.clone()
    quantize_weight(weight, fisher, parameters("guided"), hessian=hessian)
    assert all(a.equal(b) for a, b in zip(before, (weight, fisher, hessian), strict=True))


@pytest.mark.parametrize("codebook", ["lnq", "guided"])
def test_a_missing_hessian_is_an_error(codebook: str) -> None:
    weight, fisher = example()
    message = f"codebook='{codebook}' needs the Hessian of layers.0.up, got None; calibrate, or"
    with pytest.raises(ValueError, match=message):
        quantize_weight(weight, fisher, parameters(codebook), name="layers.0.up")


@pytest.mark.parametrize(
    "hessian",
    [torch.eye(70), torch.eye(69)[None], torch.eye(70)[None].repeat(3, 1, 1),
     torch.eye(70, dtype=torch.int64)[None]],
)  # fmt: skip
def test_hessians_of_another_shape_or_dtype_are_refused(hessian: Tensor) -> None:
    weight, fisher = example()
    message = re.escape("hessian of up must be a floating-point tensor [1, 70, 70], got")
    with pytest.raises(ValueError, match=message):
        quantize_weight(weight, fisher, parameters("lnq"), hessian=hessian, name="up")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_hessians_that_are_none_are_refused(bad: float) -> None:
    weight, fisher = example()
    hessian = hessians(4)
    hessian[2, 5, 5] = bad
    with pytest.raises(ValueError, match="hessian of up must be finite in fp32 and not negative"):
        quantize_weight(weight, fisher, parameters("guided"), hessian=hessian, name="up")


def test_more_groups_than_rows() -> None:
    weight, fisher = example(3, 70)
    hessian = hessians(3)
    tensors = quantize_weight(weight, fisher, parameters("guided"), hessian=hessian)
    plain = quantize_weight(weight, fisher, parameters("kmeans"))
    assert error(weight, tensors, hessian).sum() < error(weight, plain, hessian).sum()
