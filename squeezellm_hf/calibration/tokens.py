"""How many tokens of the calibration data came by each layer."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class TokenCounts:
    """Numbers of input rows of linear layers, a :class:`~.accumulate.Statistic`.

    Args:
        linears: the layers by name.
        sums: counts to go on from, with ``sequences`` sequences in them.
        sequences: 0 without ``sums``.

    Attributes:
        sums: int64 [1] per name, on the CPU.
    """

    needs_gradients = False

    def __init__(
        self,
        linears: Mapping[str, nn.Linear],
        sums: dict[str, Tensor] | None = None,
        sequences: int = 0,
    ) -> None:
        self.linears = linears
        self.sequences = sequences
        self.active = True
        self.sums = sums if sums is not None else {
            name: torch.zeros(1, dtype=torch.int64) for name in linears
        }  # fmt: skip

    def attach(self, loss_scale: float) -> list[RemovableHandle]:
        """Look at the shapes of the inputs."""
        return [
            linear.register_forward_pre_hook(self._hook(name))
            for name, linear in self.linears.items()
        ]

    def _hook(self, name: str) -> Callable[..., None]:
        def add(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            if self.active:
                self.sums[name] += inputs[0].shape[:-1].numel()

        return add

    def check(self) -> None:
        """Counts are always finite."""
