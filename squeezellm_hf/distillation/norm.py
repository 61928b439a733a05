"""A norm while its weight is trained."""

from typing import Any

import torch
from torch import Tensor, nn


class TrainableNorm(nn.Module):
    """Runs a norm with fp32 copies of its parameters, rounded to the dtype they are stored in.

    The rounding passes gradients through. The copies are held relative to their root mean square.

    Args:
        norm: left as it is until :meth:`store`.
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        # In a list, so that its parameters are not taken for this module's.
        self._norm = [norm]
        self._scales = {
            name: float(p.detach().float().square().mean().sqrt()) or 1.0
            for name, p in norm.named_parameters()
        }
        self.masters = nn.ParameterDict(
            {name: p.detach().float() / self._scales[name] for name, p in norm.named_parameters()}
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the norm returns."""
        return torch.func.functional_call(self._norm[0], self.rounded(), args, kwargs)

    def rounded(self) -> dict[str, Tensor]:
        """The parameters as they would be stored."""
        return {
            name: (self.masters[name] * self._scales[name]).to(p.dtype)
            for name, p in self._norm[0].named_parameters()
        }

    @property
    def stored(self) -> list[nn.Parameter]:
        """The norm's own parameters."""
        return list(self._norm[0].parameters())

    @torch.no_grad()
    def store(self) -> None:
        """Write the rounded parameters into the norm."""
        rounded = self.rounded()
        for name, parameter in self._norm[0].named_parameters():
            parameter.copy_(rounded[name])

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Whether a module is a norm: by its class's name, with 1-dimensional parameters alone."""
        parameters = list(module.parameters())
        return (
            "norm" in type(module).__name__.lower()
            and not list(module.children())
            and bool(parameters)
            and all(p.dim() == 1 and p.is_floating_point() for p in parameters)
        )
