"""lut_linear_group against lut_linear, bit for bit, and what it refuses."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from squeezellm_hf import ops
from tests.ops.oracle import TORCH_DTYPES, make_weight, make_x

NAMES = ("qweight", "lookup_table", "crow_indices", "col_indices", "values", "bias")
GROUP = torch.ops.squeezellm_hf.lut_linear_group


def make_weights(bits: int, rows: Sequence[int] = (9, 17, 5), density: float = 0.1) -> list[Any]:
    """Weights of 40 columns: the first without a sparse part, the second with a bias."""
    weights = []
    for index, out_features in enumerate(rows):
        made = make_weight(out_features, 40, bits, density=density * (index > 0), seed=index)
        tensors = dict(made.tensors)
        if index == 1:
            tensors["bias"] = torch.linspace(-1, 1, out_features)
        weights.append(tensors)
    return weights


def arguments(x: Tensor, weights: Sequence[dict[str, Tensor]], bits: int) -> tuple[Any, ...]:
    return (x, *([weight.get(name) for weight in weights] for name in NAMES), bits)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("bits", [1, 3, 4, 8])
def test_is_one_call_after_the_other(bits: int, dtype: str) -> None:
    weights = make_weights(bits)
    for shape in ((40,), (1, 40), (2, 3, 40), (0, 40)):
        x = make_x(6, 40, dtype).flatten()[: torch.Size(shape).numel()].view(shape)
        results = GROUP(*arguments(x, weights, bits))
        for weight, y in zip(weights, results, strict=True):
            assert torch.equal(y, ops.lut_linear(x, **weight, bits=bits))
            assert y.dtype == TORCH_DTYPES[dtype]


def test_groups_of_one_and_none() -> None:
    x = make_x(2, 40, "fp32")
    weight = make_weights(4)[1]
    (y,) = GROUP(*arguments(x, [weight], 4))
    assert torch.equal(y, ops.lut_linear(x, **weight, bits=4))
    assert GROUP(*arguments(x, [], 4)) == []


def test_opcheck() -> None:
    for density in (0.0, 0.1):
        weights = make_weights(4, density=density)
        torch.library.opcheck(GROUP.default, arguments(make_x(2, 40, "bf16"), weights, 4))


def test_errors_name_the_weight_and_the_tensor() -> None:
    x = make_x(2, 40, "fp32")
    weights = make_weights(4)
    weights[2]["lookup_table"] = weights[1]["lookup_table"]
    with pytest.raises(
        ValueError, match=r"weight 2 of the group: lookup_table must be .*\[5, 16\]"
    ):
        GROUP(*arguments(x, weights, 4))
    weights = make_weights(4)
    del weights[1]["values"]
    with pytest.raises(ValueError, match=r"weight 1 of the group: crow_indices, .* not at all"):
        GROUP(*arguments(x, weights, 4))
    with pytest.raises(ValueError, match="weight 0 of the group: qweight must"):
        GROUP(*arguments(x[:, :24], make_weights(4), 4))
    x, *lists, bits = arguments(x, make_weights(4), 4)
    lists[3] = lists[3][:2]
    with pytest.raises(ValueError, match="the lists must be of one length"):
        GROUP(x, *lists, bits)
