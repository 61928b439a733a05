"""The codebook solvers on a GPU: as good as on a CPU, and not the same only in rounding."""

import pytest
import torch
from torch import Tensor, nn

from squeezellm_hf.calibration.accumulate import accumulate
from squeezellm_hf.calibration.hessian import Hessians
from squeezellm_hf.methods.squeezellm import (
    SqueezeLLMParameters,
    WeightMatrix,
    quadratic_error,
    quantize_weights,
)
from tests.conftest import tiny_llama
from tests.unit.methods.test_quantize import dequantize, example
from tests.unit.methods.test_quantize_hessian import hessians

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_as_good_as_on_a_cpu(bits: int) -> None:
    parameters = SqueezeLLMParameters(bits, 0.01, 0.01, codebook="guided", guided_groups=3)
    matrices = []
    for seed in range(5):
        weight, fisher = example(60, 200)
        matrices.append(WeightMatrix(weight.roll(seed, 1), fisher, parameters, hessians(3, 200)))
    errors = {}
    for device in ("cpu", "cuda"):
        moved = [
            WeightMatrix(*(x.to(device) if isinstance(x, Tensor) else x for x in matrix))
            for matrix in matrices
        ]
        results = quantize_weights(moved)
        assert all(t.device.type == device for tensors in results for t in tensors.values())
        errors[device] = [
            float(
                quadratic_error(
                    m.weight, dequantize({k: t.cpu() for k, t in r.items()}, bits, 200), m.hessian
                ).sum()
            )
            for m, r in zip(matrices, results, strict=True)
        ]
    # An index that rounding moves sends the descent to another local optimum.
    assert all(
        0.95 < theirs / ours < 1.05
        for ours, theirs in zip(errors["cpu"], errors["cuda"], strict=True)
    )


def test_hessians(token_ids: Tensor) -> None:
    sums = {}
    for device in ("cpu", "cuda"):
        model = tiny_llama().to(device)
        linears = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and name != "lm_head"
        }
        groups = {name: 2 if name.endswith("down_proj") else 0 for name in linears}
        statistic = Hessians(linears, groups)
        accumulate(model, list(token_ids), [statistic])
        sums[device] = {name: statistic.of(name).cpu() for name in linears}
    for name, expected in sums["cpu"].items():
        scale = float(expected.abs().max())
        torch.testing.assert_close(sums["cuda"][name], expected, rtol=1e-2, atol=1e-3 * scale)
