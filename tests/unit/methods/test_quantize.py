import re
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from squeezellm_hf.formats.csr import check_csr, decode_columns, row_indices
from squeezellm_hf.formats.packing import packed_words, unpack
from squeezellm_hf.methods.squeezellm import (
    SqueezeLLMParameters,
    chunks,
    quantize_weight,
    weighted_squared_error,
)

DENSE = {"outlier_fraction": 0.0, "sensitive_fraction": 0.0}


def dequantize(tensors: dict[str, Tensor], bits: int, in_features: int) -> Tensor:
    table = tensors["lookup_table"].float()
    dense = table.gather(1, unpack(tensors["qweight"], bits, in_features).long())
    if "values" in tensors:
        values = tensors["values"].float()
        rows = row_indices(tensors["crow_indices"], values.numel())
        dense[rows, decode_columns(tensors["col_indices"])] += values
    return dense


def example(out_features: int = 24, in_features: int = 70) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    weight = 0.05 * torch.randn(out_features, in_features, generator=generator)
    return weight, (3 * torch.randn(out_features, in_features, generator=generator) - 12).exp()


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_are_those_of_the_format(bits: int, dtype: torch.dtype) -> None:
    weight, fisher = example()
    tensors = quantize_weight(weight.to(dtype), fisher, SqueezeLLMParameters(bits, 0.02, 0.01))
    assert tensors["qweight"].dtype == torch.int32
    assert tensors["qweight"].shape == (24, packed_words(70, bits))
    assert tensors["lookup_table"].dtype == torch.float16
    assert tensors["lookup_table"].shape == (24, 2**bits)
    assert (tensors["lookup_table"].float().diff(dim=1) >= 0).all()
    assert tensors["values"].dtype == torch.float16
    assert tensors["values"].numel() == 34 + 17
    check_csr(
        tensors["crow_indices"],
        tensors["col_indices"],
        tensors["values"],
        out_features=24,
        in_features=70,
    )


def test_error_falls_with_every_bit() -> None:
    weight, fisher = example()
    errors = [
        weighted_squared_error(
            weight,
            dequantize(quantize_weight(weight, fisher, SqueezeLLMParameters(bits)), bits, 70),
            fisher,
        ).sum()
        for bits in range(1, 7)
    ]
    assert all(more > 2 * less for more, less in pairwise(errors))


def test_exact_solver_is_at_least_as_good() -> None:
    weight, fisher = example(64, 200)
    lloyd, exact = (
        weighted_squared_error(
            weight,
            dequantize(
                quantize_weight(weight, fisher, SqueezeLLMParameters(solver=solver)), 4, 200
            ),
            fisher,
        ).sum()
        for solver in ("lloyd", "exact")
    )
    assert exact <= lloyd <= 1.005 * exact


def test_removed_cells_have_no_influence_on_the_table() -> None:
    weight = example()[0].bfloat16()
    parameters = SqueezeLLMParameters(bits=2, outlier_fraction=0.01)
    weight[5, 7] = 40.0
    one = quantize_weight(weight, None, parameters)
    weight[5, 7] = -90.0
    other = quantize_weight(weight, None, parameters)
    assert torch.equal(one["lookup_table"], other["lookup_table"])
    assert dequantize(one, 2, 70)[5, 7].bfloat16() == 40.0
    assert dequantize(other, 2, 70)[5, 7].bfloat16() == -90.0


def test_no_sparse_tensors_without_sparse_cells() -> None:
    weight, fisher = example()
    assert set(quantize_weight(weight, fisher, SqueezeLLMParameters(**DENSE))) == {
        "qweight",
        "lookup_table",
    }


def test_same_bytes_twice_and_in_any_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, fisher = example()
    parameters = SqueezeLLMParameters(3, 0.02, 0.01)
    threads = torch.get_num_threads()
    first = quantize_weight(weight, fisher, parameters)
    again = quantize_weight(weight.clone(), fisher.clone(), parameters)
    monkeypatch.setattr(chunks, "_CPU_CELLS", 200)
    chunked = quantize_weight(weight, fisher, parameters)
    assert torch.get_num_threads() == threads
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
        assert torch.equal(tensor, chunked[name])


def test_arguments_are_left_alone() -> None:
    weight, fisher = example()
    before = weight.clone(), fisher.clone()
    quantize_weight(weight, fisher, SqueezeLLMParameters())
    assert torch.equal(weight, before[0])
    assert torch.equal(fisher, before[1])


def test_default_dtype_has_no_influence() -> None:
    """Transformers changes it while it loads a model."""
    weight, fisher = example()
    before = quantize_weight(weight, fisher, SqueezeLLMParameters(3, 0.02, 0.01))
    torch.set_default_dtype(torch.bfloat16)
    try:
        after = quantize_weight(weight, fisher, SqueezeLLMParameters(3, 0.02, 0.01))
    finally:
        torch.set_default_dtype(torch.float32)
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor, after[name])


def test_parameters_of_a_model_leave_no_graph() -> None:
    weight, fisher = example()
    tensors = quantize_weight(torch.nn.Parameter(weight), fisher, SqueezeLLMParameters())
    assert not any(tensor.requires_grad for tensor in tensors.values())


@pytest.mark.parametrize("solver", ["lloyd", "exact"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (3, 2), (2, 33)])
def test_narrow_matrices(shape: tuple[int, int], solver: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).half()
    parameters = SqueezeLLMParameters(bits=6, solver=solver)
    restored = dequantize(quantize_weight(weight, weight.abs(), parameters), 6, shape[1])
    assert torch.equal(restored.half(), weight)


@pytest.mark.parametrize("solver", ["lloyd", "exact"])
@pytest.mark.parametrize("value", [0.0, 0.25, -3.0])
def test_constant_rows(value: float, solver: str) -> None:
    weight = torch.full((3, 50), value)
    tensors = quantize_weight(weight, torch.rand(3, 50), SqueezeLLMParameters(3, solver=solver))
    assert torch.equal(dequantize(tensors, 3, 50), weight)
    assert (tensors["lookup_table"] == value).all()


def test_few_distinct_values_fill_the_table_with_the_last() -> None:
    weight = torch.tensor([[1.0, -2.0, 1.0, 0.5, 0.5]])
    tensors = quantize_weight(weight, None, SqueezeLLMParameters(3, **DENSE))
    assert tensors["lookup_table"].tolist() == [[-2.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]]
    assert torch.equal(dequantize(tensors, 3, 5), weight)


def test_row_whose_every_cell_is_sparse() -> None:
    weight, fisher = example(10, 20)
    weight[4] += torch.sign(weight[4]) * 100
    tensors = quantize_weight(weight.half(), fisher, SqueezeLLMParameters(2, 0.1, 0.0))
    assert int(tensors["crow_indices"].diff()[4]) == 20
    assert torch.equal(dequantize(tensors, 2, 20)[4].half(), weight[4].half())


def test_rows_without_fisher_count_as_ones() -> None:
    weight, fisher = example()
    fisher[3] = 0.0
    fisher[4] = 1.0
    weight[4] = weight[3]
    table = quantize_weight(weight, fisher, SqueezeLLMParameters(**DENSE))["lookup_table"]
    assert torch.equal(table[3], table[4])


def test_spare_entries_go_to_cells_without_fisher() -> None:
    weight, _ = example(2, 64)
    fisher = torch.zeros(2, 64)
    fisher[:, 0] = 1.0
    restored = dequantize(quantize_weight(weight, fisher, SqueezeLLMParameters(**DENSE)), 4, 64)
    assert torch.allclose(restored[:, 0], weight[:, 0], rtol=1e-3)
    assert (restored - weight).square().mean() < 0.05 * weight.square().mean()


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1e-4, 1.0, 1e4, 1e30])
def test_relative_error_does_not_depend_on_the_scale(scale: float) -> None:
    weight, fisher = example()
    restored = dequantize(quantize_weight(weight * scale, fisher, SqueezeLLMParameters()), 4, 70)
    error = (restored.double() / scale - weight).square().mean()
    assert error < 0.01 * weight.square().mean()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e38])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    weight, fisher = example()
    weight[2, 3] = bad
    message = re.escape("layers.0.up_proj must be finite and below 2**126")
    with pytest.raises(ValueError, match=message + ".*row 2, column 3"):
        quantize_weight(weight, fisher, SqueezeLLMParameters(), name="layers.0.up_proj")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1e-9])
def test_fisher_that_is_not_a_variance_is_refused(bad: float) -> None:
    weight, fisher = example()
    fisher[2, 3] = bad
    with pytest.raises(ValueError, match=r"fisher of up must be finite.*row 2, column 3"):
        quantize_weight(weight, fisher, SqueezeLLMParameters(), name="up")


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(0, 4),
        torch.zeros(4, 0),
        torch.zeros(4),
        torch.zeros(2, 2, 2),
        torch.zeros(2, 2, dtype=torch.int32),
        torch.zeros(2, 2, dtype=torch.float64),
    ],
)
def test_what_is_no_weight_matrix_is_refused(weight: Tensor) -> None:
    with pytest.raises(ValueError, match="weight must be a non-empty"):
        quantize_weight(weight, None, SqueezeLLMParameters())


@pytest.mark.parametrize("fisher", [torch.zeros(2, 3), torch.zeros(3, 2, dtype=torch.int64)])
def test_fisher_of_another_shape_or_dtype_is_refused(fisher: Tensor) -> None:
    with pytest.raises(ValueError, match=r"fisher of weight must be a floating-point matrix"):
        quantize_weight(torch.ones(3, 2), fisher, SqueezeLLMParameters())


def test_weighted_squared_error() -> None:
    weight, restored = (
        torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
        torch.tensor([[1.5, 2.0], [3.0, 2.0]]),
    )
    fisher = torch.tensor([[2.0, 9.0], [9.0, 0.5]])
    assert weighted_squared_error(weight, restored).tolist() == [0.25, 4.0]
    assert weighted_squared_error(weight, restored, fisher).tolist() == [0.5, 2.0]
