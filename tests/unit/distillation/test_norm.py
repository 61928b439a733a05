"""Norms with fp32 masters."""

import pytest
import torch
from torch import nn

from squeezellm_hf.distillation.norm import TrainableNorm
from tests.conftest import tiny_llama


@pytest.mark.parametrize("norm", [nn.LayerNorm(16), nn.RMSNorm(16)])
def test_gradient_and_output_are_those_of_the_norm(norm: nn.Module) -> None:
    nn.init.normal_(norm.weight)
    trained = TrainableNorm(norm)
    x = torch.randn(5, 16)
    y, expected = trained(x), norm(x)
    torch.testing.assert_close(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    for name, parameter in norm.named_parameters():
        scale = float(parameter.detach().square().mean().sqrt()) or 1.0
        torch.testing.assert_close(trained.masters[name].grad, scale * parameter.grad)


def test_runs_with_what_it_stores() -> None:
    norm = nn.RMSNorm(16, dtype=torch.bfloat16)
    trained = TrainableNorm(norm)
    x = torch.randn(5, 16, dtype=torch.bfloat16)
    with torch.no_grad():
        trained.masters["weight"] += 0.01 * torch.randn(16)
    y = trained(x)
    assert norm.weight.equal(torch.ones_like(norm.weight))
    trained.store()
    assert norm.weight.dtype == torch.bfloat16
    assert norm.weight.equal(trained.rounded()["weight"])
    assert not norm.weight.equal(torch.ones_like(norm.weight))
    assert norm(x).equal(y)


def test_finds_the_norms_of_a_model() -> None:
    names = [name for name, module in tiny_llama().named_modules() if TrainableNorm.fits(module)]
    assert names == [
        *(
            f"model.layers.{i}.{kind}_layernorm"
            for i in range(2)
            for kind in ("input", "post_attention")
        ),
        "model.norm",
    ]
