"""Uniform grids with a scale and a zero point a group of weights, and rounding to nearest.

A group of consecutive weights of a row is stored as integers q of `bits` bits, an fp16 scale s and
a zero point z of `bits` bits, w' = s (q - z): bits + (16 + bits) / group_size bits a weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from squeezellm_hf.evaluation.peers.peer import Peer, Stored, quantize_each

_SCALE_BITS = 16


@dataclass(frozen=True)
class Grid:
    """Scales and zero points, fp32 [out_features, 1] each, of one group a row."""

    scale: Tensor
    zero: Tensor
    bits: int

    @classmethod
    def of(cls, weights: Tensor, bits: int) -> Grid:
        """Span the least and the greatest weight of every row, and zero.

        Args:
            weights: fp32 [out_features, group_size].
            bits: Width of an index.
        """
        low = weights.amin(dim=1, keepdim=True).clamp_max(0)
        high = weights.amax(dim=1, keepdim=True).clamp_min(0)
        scale = ((high - low) / (2**bits - 1)).half().float()
        scale = torch.where(scale > 0, scale, 1.0)
        return cls(scale, (-low / scale).round().clamp(0, 2**bits - 1), bits)

    def round(self, weights: Tensor) -> Tensor:
        """Return the grid points nearest to weights [out_features, n]."""
        indices = (weights / self.scale + self.zero).round().clamp(0, 2**self.bits - 1)
        return self.scale * (indices - self.zero)


def grid_bits(weight: Tensor, bits: int, group_size: int) -> int:
    """Bits of the indices, scales and zero points of a matrix [out_features, in_features]."""
    out_features, in_features = weight.shape
    n_groups = out_features * -(-in_features // group_size)
    return weight.numel() * bits + n_groups * (_SCALE_BITS + bits)


def check_grid(bits: int, group_size: int) -> None:
    """Raise ValueError unless these options describe a grid."""
    if not 1 <= bits <= 8:
        raise ValueError(f"bits={bits} is not in 1 .. 8")
    if group_size < 1:
        raise ValueError(f"group_size={group_size} is not >= 1")


def round_to_nearest(weight: Tensor, bits: int, group_size: int) -> Stored:
    """Quantize a matrix [out_features, in_features] group by group."""
    groups = weight.float().split(group_size, dim=1)
    rounded = [Grid.of(group, bits).round(group) for group in groups]
    return Stored(torch.cat(rounded, dim=1), grid_bits(weight, bits, group_size))


@dataclass(frozen=True)
class RoundToNearest(Peer):
    """Round to nearest, without any data.

    Attributes:
        bits: Width of an index.
        group_size: Weights that share a scale and a zero point.
    """

    bits: int = 4
    group_size: int = 64

    def __post_init__(self) -> None:
        check_grid(self.bits, self.group_size)

    def quantize(
        self, model: Any, names: Sequence[str], sequences: Tensor, *, progress: bool = False
    ) -> int:
        """See `Peer.quantize`."""
        return quantize_each(
            model, names, lambda weight: round_to_nearest(weight, self.bits, self.group_size)
        )
