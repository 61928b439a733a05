"""The weight of a quantized layer, read as if it were a plain tensor."""

import pytest
import torch
from torch import nn

from squeezellm_hf.methods.squeezellm import SqueezeLLMParameters
from squeezellm_hf.methods.squeezellm.quantize import quantize_weight
from squeezellm_hf.nn import SqueezeLLMLinear
from squeezellm_hf.nn.weight import DequantizedWeight


@pytest.fixture
def layer() -> SqueezeLLMLinear:
    weight = torch.randn(12, 40, generator=torch.Generator().manual_seed(0))
    tensors = quantize_weight(weight, None, SqueezeLLMParameters(outlier_fraction=0.05))
    return SqueezeLLMLinear.from_tensors(tensors, bits=4, in_features=40, dtype=torch.float32)


def test_looks_like_the_weight_of_a_linear_layer(layer: SqueezeLLMLinear) -> None:
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    assert weight.shape == (12, 40)
    assert weight.dtype == torch.float32
    assert weight.device == layer.qweight.device
    assert not weight.requires_grad
    assert "weight" not in layer.state_dict()
    assert repr(weight) == "DequantizedWeight([12, 40], torch.float32, cpu)"


def test_operations_see_the_dequantized_values(layer: SqueezeLLMLinear) -> None:
    dense = layer.dequantize(torch.float32)
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(1))
    for actual, expected in (
        (nn.functional.linear(x, layer.weight), x @ dense.t()),
        (layer.weight @ x.t(), dense @ x.t()),
        (layer.weight[2:5].float() + 1, dense[2:5] + 1),
        (torch.cat([layer.weight, dense]), torch.cat([dense, dense])),
        (layer.weight.to(torch.float64), dense.double()),
    ):
        assert type(actual) is torch.Tensor
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_the_backward_pass_goes_through_it(layer: SqueezeLLMLinear) -> None:
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(1), requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = nn.functional.linear(x, layer.weight)
    y.square().sum().backward()
    expected = 2 * y.detach() @ layer.dequantize(torch.float32)
    torch.testing.assert_close(x.grad, expected, rtol=1e-5, atol=1e-5)
    # A dequantized copy would be held from the forward to the backward pass.
    assert not any(type(t) is torch.Tensor and t.shape == (12, 40) for t in kept)


def test_metadata_costs_no_dequantization(
    layer: SqueezeLLMLinear, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    dequantize = SqueezeLLMLinear.dequantize
    monkeypatch.setattr(
        SqueezeLLMLinear,
        "dequantize",
        lambda self, dtype=None: calls.append(dtype) or dequantize(self, dtype),
    )
    assert layer.weight.dtype != torch.int8
    assert layer.weight.numel() == 480
    assert not calls
    layer.weight.sum()
    assert calls == [torch.float32]


def test_follows_the_dtype_of_the_model(layer: SqueezeLLMLinear) -> None:
    table = layer.lookup_table.clone()
    assert layer.to(torch.bfloat16).weight.dtype == torch.bfloat16
    assert layer.lookup_table.equal(table)
    assert layer.to("cpu").weight.dtype == torch.bfloat16
    assert layer.half().weight.dtype == torch.float16
    assert layer.to(torch.float32).weight.dtype == torch.float32
    tensors = dict(layer.state_dict())
    with_bias = {**tensors, "bias": torch.zeros(12, dtype=torch.bfloat16)}
    for given, dtype in ((tensors, torch.float16), (with_bias, torch.bfloat16)):
        made = SqueezeLLMLinear.from_tensors(given, bits=4, in_features=40)
        assert made.weight.dtype == dtype


def test_compiles(layer: SqueezeLLMLinear) -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wo = layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if isinstance(self.wo.weight, torch.Tensor) and x.dtype != self.wo.weight.dtype:
                x = x.to(self.wo.weight.dtype)
            return self.wo(x) + nn.functional.linear(x, self.wo.weight)

    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(1))
    module = Reader()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x), rtol=1e-5, atol=1e-5)
    assert isinstance(layer.weight, DequantizedWeight)
