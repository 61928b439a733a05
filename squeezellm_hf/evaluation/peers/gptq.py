"""GPTQ (Frantar et al., ICLR 2023, arXiv 2210.17323), from its equations, in fp32.

Columns are rounded one after the other; each one's error is made up for by the columns that are
not rounded yet, in the way that least changes the layer's outputs. With H = X^T X + damping, X the
layer's inputs, and H^-1 = U^T U (U upper triangular), for column i (equations 4 and 5 and step 3 of
the paper):

    e = (w_i - round(w_i)) / U_ii         w_j -= e U_ij  for j > i
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from squeezellm_hf.evaluation.peers.blocks import quantize_blocks
from squeezellm_hf.evaluation.peers.peer import Peer, Stored
from squeezellm_hf.evaluation.peers.uniform import Grid, check_grid, grid_bits

_INDEX_BITS = 32
# Errors reach the columns behind a block when the block is done.
_BLOCK = 128


@dataclass(frozen=True)
class GPTQ(Peer):
    """GPTQ with groups, block by block: each block sees what the quantized ones before it give.

    Attributes:
        bits: Width of an index.
        group_size: Weights that share a scale and a zero point.
        act_order: Round the columns in the order of falling H_ii ("desc_act").
        static_groups: Groups of neighbours in the matrix, their grids from the original weights.
            Otherwise groups follow the order of rounding, their grids come from weights that have
            taken up errors, and with act_order the checkpoint keeps the group of each column, 32
            bits each.
        damping: Share of the mean of H's diagonal that is added to it.
    """

    bits: int = 4
    group_size: int = 128
    act_order: bool = True
    static_groups: bool = False
    damping: float = 0.01

    def __post_init__(self) -> None:
        check_grid(self.bits, self.group_size)

    def quantize(
        self, model: Any, names: Sequence[str], sequences: Tensor, *, progress: bool = False
    ) -> int:
        """See `Peer.quantize`.

        Raises:
            ValueError: The model's blocks do not follow one another, or H cannot be inverted.
        """
        return quantize_blocks(model, names, sequences, self.quantize_weights, progress=progress)

    def quantize_weights(self, weights: Sequence[Tensor], hessian: Tensor) -> list[Stored]:
        """Quantize matrices with the same inputs, side by side.

        Args:
            weights: Floats [out_features, in_features] each.
            hessian: X^T X, fp32 [in_features, in_features].
        """
        rows = torch.cat([weight.float() for weight in weights])
        order = torch.arange(rows.shape[1], device=rows.device)
        if self.act_order:
            order = hessian.diagonal().argsort(descending=True, stable=True)
        factor = _inverse_factor(hessian[order][:, order], self.damping)
        rounded = torch.empty_like(rows)
        rounded[:, order] = self._round_columns(rows, order, factor)
        orders = self.act_order and not self.static_groups
        return [
            Stored(
                part,
                grid_bits(part, self.bits, self.group_size) + orders * _INDEX_BITS * part.shape[1],
            )
            for part in rounded.split([weight.shape[0] for weight in weights])
        ]

    def _round_columns(self, rows: Tensor, order: Tensor, factor: Tensor) -> Tensor:
        """Return the rounded columns in the order in which they are rounded."""
        # A column a row: that is what is read and written, again and again.
        left = rows.t()[order]
        static = [Grid.of(group, self.bits) for group in rows.split(self.group_size, dim=1)]
        groups = (order // self.group_size).tolist()
        rounded = torch.empty_like(left)
        n = left.shape[0]
        start = 0
        while start < n:
            # No block goes beyond a group, so that a grid is made of weights that are up to date.
            stop = min(start + _BLOCK, n, (start // self.group_size + 1) * self.group_size)
            if start % self.group_size == 0:
                grid = Grid.of(left[start : start + self.group_size].t(), self.bits)
            errors = torch.empty_like(left[start:stop])
            for i in range(start, stop):
                if self.static_groups:
                    grid = static[groups[i]]
                rounded[i] = grid.round(left[i, :, None])[:, 0]
                errors[i - start] = (left[i] - rounded[i]) / factor[i, i]
                left[i + 1 : stop].addr_(factor[i, i + 1 : stop], errors[i - start], alpha=-1)
            left[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
            start = stop
        return rounded.t()


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Return U, upper triangular fp32 [n, n], with H^-1 = U^T U for the damped H."""
    damped = hessian.double()
    diagonal = damped.diagonal()
    # An input that is always zero: its weights are rounded, and nothing makes up for anything.
    diagonal[diagonal == 0] = 1.0
    diagonal += damping * diagonal.mean()
    lower, failed = torch.linalg.cholesky_ex(damped)
    if bool(failed):
        raise ValueError(f"X^T X is not positive definite; damping={damping} is too little")
    inverse = torch.cholesky_inverse(lower)
    return torch.linalg.cholesky(inverse, upper=True).float()
