"""What every peer is: a dataclass of its options that quantizes the weights of a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Stored:
    """A quantized matrix.

    Attributes:
        weight: What it stands for, floats [out_features, in_features].
        n_bits: Bits that are stored for it: indices and whatever differs from matrix to matrix
            (scales, zeros, tables, permutations, sparse values). What is the same for all of them,
            as NF4's 16 levels are, counts nothing.
    """

    weight: Tensor
    n_bits: int


class Peer:
    """A method and its options.

    Attributes:
        package: What must be installed for it; None for what is part of this project.
    """

    package: ClassVar[str | None] = None

    def quantize(
        self, model: Any, names: Sequence[str], sequences: Tensor, *, progress: bool = False
    ) -> int:
        """Replace weights by what is left of them after quantization, in place.

        Args:
            model: A causal language model of transformers.
            names: The linear layers.
            sequences: Calibration data, token ids int64 [n_samples, sequence_length].
            progress: Show a progress bar.

        Returns:
            Bits that are stored for all these weights.
        """
        raise NotImplementedError


@torch.no_grad()
def quantize_each(model: Any, names: Sequence[str], quantize: Callable[[Tensor], Stored]) -> int:
    """Quantize layers by their weights alone, in place; return the bits stored."""
    n_bits = 0
    for name in names:
        linear: nn.Linear = model.get_submodule(name)
        stored = quantize(linear.weight.detach())
        linear.weight.copy_(stored.weight)
        n_bits += stored.n_bits
    return n_bits
