"""The diagonal of the empirical Fisher information: how sensitive the loss is to each weight.

SqueezeLLM (arXiv 2306.07629), section 4.1, equation 4: F = sum over sequences of g * g, with g
the gradient of the mean token cross-entropy of one sequence.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from squeezellm_hf.calibration.accumulate import accumulate

AfterSequence = Callable[[int, Mapping[str, Tensor]], None]


class FisherDiagonal:
    """Sums of squared weight gradients, a :class:`~.accumulate.Statistic`.

    Beside the model, memory holds the sum itself (4 bytes a weight) and the gradient of one
    layer: each is squared, added and dropped as soon as the backward pass has produced it.

    Args:
        linears: the layers by name; their weights may lie on several devices.
        sums: a sum to go on from, with ``sequences`` sequences in it.
        sequences: 0 without ``sums``.

    Attributes:
        sums: fp32 [out_features, in_features] per name, on the device of the weight.
    """

    needs_gradients = True

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
            name: torch.zeros_like(linear.weight, dtype=torch.float32)
            for name, linear in linears.items()
        }  # fmt: skip

    def attach(self, loss_scale: float) -> list[RemovableHandle]:
        """Ask for the gradients of the weights."""
        hooks = []
        for name, linear in self.linears.items():
            linear.weight.requires_grad_(True)
            hook = self._hook(name, 1.0 / loss_scale**2)
            hooks.append(linear.weight.register_post_accumulate_grad_hook(hook))
        return hooks

    def _hook(self, name: str, factor: float) -> Callable[[Tensor], None]:
        def add_square(weight: Tensor) -> None:
            gradient = weight.grad
            weight.grad = None
            if gradient is not None and self.active:
                gradient = gradient.float()
                self.sums[name].addcmul_(gradient, gradient, value=factor)

        return add_square

    def check(self) -> None:
        """Raise ValueError unless every sum is finite."""
        for name, total in self.sums.items():
            if not bool(total.isfinite().all()):
                raise ValueError(
                    f"the squared gradients of {name}.weight are not finite; calibrate in "
                    f"bfloat16 or float32, not {self.linears[name].weight.dtype}"
                )


def calibrate_fisher(
    model: Any,
    linears: Mapping[str, nn.Linear],
    sequences: Sequence[Tensor],
    *,
    fisher: dict[str, Tensor] | None = None,
    first: int = 0,
    after_sequence: AfterSequence | None = None,
) -> dict[str, Tensor]:
    """Sum the squared gradients of the weights of ``linears`` over ``sequences``.

    Args:
        model: as for :func:`~squeezellm_hf.calibration.accumulate.accumulate`.
        linears: the layers by name; their weights may lie on several devices.
        sequences: token ids, int64 [sequence_length] each.
        fisher: a sum to go on from, as returned by an earlier call, with ``first`` sequences in it.
        first: index of the first sequence to add.
        after_sequence: called with the number of sequences done and the sum so far.

    Returns:
        fp32 [out_features, in_features] per name, on the device of the weight.

    Raises:
        ValueError: if the model gives no loss, or a loss or gradient is not finite.
    """
    statistic = FisherDiagonal(linears, fisher, first)

    def report(count: int) -> None:
        if after_sequence is not None:
            after_sequence(count, statistic.sums)

    accumulate(model, sequences, [statistic], after_sequence=report)
    return statistic.sums
