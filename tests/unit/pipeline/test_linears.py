"""Which modules count as linear layers."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from squeezellm_hf.pipeline.linears import is_linear


class Renamed(nn.Linear):
    """As FalconLinear."""

    def forward(self, input: Tensor) -> Tensor:
        product = input @ self.weight.T
        return product if self.bias is None else product + self.bias


class Inherited(nn.Linear):
    pass


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Router(nn.Linear):
    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(input).topk(2)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_subclasses_count_by_what_they_compute(bias: bool, device: str) -> None:
    with torch.device(device):
        for kind, expected in (
            (nn.Linear, True), (Inherited, True), (Renamed, True), (Scaled, False), (Router, False),
        ):  # fmt: skip
            module = kind(6, 7, bias=bias)
            module.register_forward_hook(lambda *_: pytest.fail("the layer itself was called"))
            assert is_linear(module) is expected, kind
            assert module.weight.shape == (7, 6)
            assert module.in_features == 6


def test_what_only_looks_like_a_linear_layer() -> None:
    assert not is_linear(nn.MultiheadAttention(8, 2).out_proj)
    assert not is_linear(weight_norm(nn.Linear(6, 7)))
    assert not is_linear(nn.Bilinear(3, 3, 3))
    assert not is_linear(nn.LayerNorm(3))


def test_draws_no_global_random_number() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    is_linear(Renamed(2, 2, device="meta"))
    assert torch.rand(1).equal(expected)
