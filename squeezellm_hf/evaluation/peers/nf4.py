"""4-bit NormalFloat of bitsandbytes (QLoRA, arXiv 2305.14314), through its public functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from squeezellm_hf.evaluation.peers.peer import Peer, Stored, quantize_each


@dataclass(frozen=True)
class NF4(Peer):
    """16 fixed levels a block, scaled by the block's greatest magnitude.

    An fp32 scale a block: 4 + 32 / block_size bits a weight. With double quantization an 8-bit
    scale, and an fp32 scale for 256 of these: 4 + 8 / block_size + 32 / (256 block_size).

    Attributes:
        block_size: Weights that share a scale.
        double_quant: Quantize the scales, too.
    """

    package: ClassVar[str | None] = "bitsandbytes"

    block_size: int = 64
    double_quant: bool = False

    def quantize(
        self, model: Any, names: Sequence[str], sequences: Tensor, *, progress: bool = False
    ) -> int:
        """See `Peer.quantize`."""
        return quantize_each(model, names, self._quantize)

    def _quantize(self, weight: Tensor) -> Stored:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        packed, state = quantize_4bit(
            weight.contiguous(),
            blocksize=self.block_size,
            quant_type="nf4",
            compress_statistics=self.double_quant,
        )
        tensors = [packed, state.absmax]
        if state.nested:
            tensors += [state.state2.absmax, state.offset]
        n_bits = sum(8 * tensor.numel() * tensor.element_size() for tensor in tensors)
        return Stored(dequantize_4bit(packed, state), n_bits)
