"""Which modules are linear layers: ``nn.Linear``, and what computes the same under another name."""

import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

_IN, _OUT = 5, 3


def is_linear(module: nn.Module) -> bool:
    """Whether ``module(x)`` is x W^T + bias, so that a quantized layer can take its place.

    A subclass of ``nn.Linear`` counts if it computes that of random numbers (Falcon's does; a
    router's, which returns more, does not). The output projection of ``nn.MultiheadAttention``
    does not count: its weight is read, it is never called.
    """
    if type(module) is nn.Linear:
        return True
    if not isinstance(module, nn.Linear) or type(module) is NonDynamicallyQuantizableLinear:
        return False
    return _computes_linear(module)


@torch.no_grad()
def _computes_linear(module: nn.Linear) -> bool:
    """Try a small copy on the CPU; the module itself may be on meta."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")

    weight, bias, x = normal(_OUT, _IN), normal(_OUT), normal(2, 4, _IN)
    probe = object.__new__(type(module))
    probe.__dict__.update(module.__dict__)
    probe.in_features, probe.out_features = _IN, _OUT
    probe._parameters = {
        "weight": nn.Parameter(weight),
        "bias": None if module.bias is None else nn.Parameter(bias),
    }
    expected = functional.linear(x, weight, None if module.bias is None else bias)
    try:
        actual = type(module).forward(probe, x)  # without hooks
        return actual.shape == expected.shape and torch.allclose(actual, expected)
    except Exception:
        return False
