"""Errors and bytes that are foretold, against those of matrices that are quantized."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from squeezellm_hf.evaluation.footprint import model_footprint
from squeezellm_hf.methods.squeezellm import (
    SqueezeLLMParameters,
    fisher_errors,
    quantize_weight,
    stored_bytes,
    weighted_squared_error,
)
from squeezellm_hf.nn import SqueezeLLMLinear

CANDIDATES = [
    SqueezeLLMParameters(bits=bits, outlier_fraction=0.02 * part, sensitive_fraction=0.01 * part)
    for bits in (2, 3, 4)
    for part in (0.0, 1.0)
]


def matrix(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    scale = torch.randn(rows, 1, generator=generator).mul(2).exp()
    return weight, scale * torch.randn(rows, columns, generator=generator).square()


def true_error(
    weight: torch.Tensor, fisher: torch.Tensor | None, parameters: SqueezeLLMParameters
) -> float:
    tensors = quantize_weight(weight, fisher, parameters)
    layer = SqueezeLLMLinear.from_tensors(
        tensors, bits=parameters.bits, in_features=weight.shape[1]
    )
    return float(weighted_squared_error(weight, layer.dequantize(torch.float32), fisher).sum())


@pytest.mark.parametrize("with_fisher", [True, False])
def test_is_the_error_of_the_quantized_matrix(with_fisher: bool) -> None:
    weight, fisher = matrix(40, 70)
    given_fisher = fisher if with_fisher else None
    found = fisher_errors(weight, given_fisher, CANDIDATES)
    # The sparse part is exact to 16 bits.
    expected = [true_error(weight, given_fisher, each) for each in CANDIDATES]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0.0)
    assert found[0] > found[2] > found[4] > 0
    assert found[0] > found[1]


def test_some_rows_stand_for_all() -> None:
    weight, fisher = matrix(400, 64)
    found = fisher_errors(weight, fisher, CANDIDATES, most_cells=400 * 64 // 4)
    expected = fisher_errors(weight, fisher, CANDIDATES)
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.0)
    assert found != expected


def test_a_single_row_is_enough() -> None:
    weight, fisher = matrix(5, 33)
    assert all(error > 0 for error in fisher_errors(weight, fisher, CANDIDATES, most_cells=1))


def test_a_bad_weight_is_named() -> None:
    weight, fisher = matrix(4, 8)
    weight[1, 2] = torch.nan
    with pytest.raises(ValueError, match=r"layer\.7 must be finite"):
        fisher_errors(weight, fisher, CANDIDATES, name="layer.7")


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 90),
    bits=st.integers(1, 8),
    outliers=st.floats(0, 0.3),
    sensitive=st.floats(0, 0.1),
)
def test_bytes_are_what_the_footprint_counts(
    rows: int, columns: int, bits: int, outliers: float, sensitive: float
) -> None:
    weight, fisher = matrix(rows, columns)
    parameters = SqueezeLLMParameters(
        bits=bits, outlier_fraction=outliers, sensitive_fraction=sensitive
    )
    tensors = quantize_weight(weight, fisher, parameters)
    model = nn.Module()
    model.layer = SqueezeLLMLinear.from_tensors(tensors, bits=bits, in_features=columns)
    (layer,) = model_footprint(model).layers
    assert stored_bytes(rows, columns, parameters) == layer.n_bytes


def test_wide_rows_have_wide_columns() -> None:
    sparse = SqueezeLLMParameters(bits=1, outlier_fraction=0.25, sensitive_fraction=0.0)
    narrow, wide = stored_bytes(1, 65_536, sparse), stored_bytes(1, 131_072, sparse)
    assert wide - 2 * narrow == 131_072 // 4 * 2 - (2 * 2 + 8)
