"""lut_linear_group against lut_linear, bit for bit, and what it refuses."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from squeezellm_hf import ops
from tests.ops.groups import GROUP, arguments, refused_steps
from tests.ops.oracle import TORCH_DTYPES, make_weight, make_x


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


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_steps_before_and_behind(dtype: str) -> None:
    """Against fp64, and each step rounded."""
    kind = TORCH_DTYPES[dtype]
    weights, x = make_weights(4), make_x(6, 40, dtype).view(2, 3, 40)
    x[0, 0] = 0  # only eps keeps the norm finite
    norm_weight, factor = torch.linspace(0.5, 1.5, 40).to(kind), x.flip(-1)
    x64 = x.double()
    scale = (x64.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    relative = torch.finfo(kind).eps
    for steps, changed in (
        ({"norm_weight": norm_weight, "norm_eps": 1e-5}, norm_weight * (x64 * scale).to(kind)),
        ({"factor": factor}, (x64 * factor.double()).to(kind)),
    ):
        results = GROUP(*arguments(x, weights, 4), **steps, silu=2)
        for place, (weight, y) in enumerate(zip(weights, results, strict=True)):
            expected = ops.lut_linear(changed, **weight, bits=4)
            if place == 2:
                expected = (expected.double() * expected.double().sigmoid()).to(kind)
            scale_of_y = float(expected.double().abs().max())
            torch.testing.assert_close(y, expected, rtol=0, atol=4 * relative * scale_of_y)
    residual = torch.randn(2, 3, 9).to(kind)
    (y,) = GROUP(*arguments(x, weights[:1], 4), residual=residual)
    assert torch.equal(y, ops.lut_linear(x, **weights[0], bits=4) + residual)


def test_errors_name_the_step() -> None:
    x, weights = make_x(2, 40, "fp32"), make_weights(4)
    for steps, message in refused_steps(x, len(weights)):
        with pytest.raises(ValueError, match=message):
            GROUP(*arguments(x, weights, 4), **steps)
    with pytest.raises(ValueError, match=r"residual must have .* the shape \[2, 9\], got"):
        GROUP(*arguments(x, weights[:1], 4), residual=x)
