"""Half-quadratic quantization (HQQ, Badri and Shaji 2023), through the package `hqq`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from squeezellm_hf.evaluation.peers.peer import Peer, Stored, quantize_each


@dataclass(frozen=True)
class HQQ(Peer):
    """Uniform grids whose zero points minimise a robust norm of the error, without any data.

    A scale and a zero point of 16 bits a group. 4 bits are packed without loss; of 3 bits the
    package puts ten into 32, which makes 3.2.

    Attributes:
        bits: Width of an index.
        group_size: Weights that share a scale and a zero point.
        axis: 1 for groups along the inputs, which fast kernels want; 0 along the outputs.
    """

    package: ClassVar[str | None] = "hqq"

    bits: int = 4
    group_size: int = 64
    axis: int = 1

    def quantize(
        self, model: Any, names: Sequence[str], sequences: Tensor, *, progress: bool = False
    ) -> int:
        """See `Peer.quantize`."""
        return quantize_each(model, names, self._quantize)

    def _quantize(self, weight: Tensor) -> Stored:
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
        half = weight.dtype if weight.dtype != torch.float32 else torch.float16
        layer = HQQLinear(
            linear,
            BaseQuantizeConfig(nbits=self.bits, group_size=self.group_size, axis=self.axis),
            compute_dtype=half,
            device=str(weight.device),
        )
        tensors = [layer.W_q, layer.meta["scale"], layer.meta["zero"]]
        n_bits = sum(8 * tensor.numel() * tensor.element_size() for tensor in tensors)
        return Stored(layer.dequantize(), n_bits)
