"""How far a changed model's predictions are from the original's, on a few sequences."""

from typing import Any

import torch
from torch import Tensor

from squeezellm_hf.calibration.accumulate import input_device

# Rows of logits in fp32 at a time.
_CHUNK = 64


class ReferenceLogits:
    """The original's next-token logits, kept on the CPU in its own dtype.

    Memory: sequences * sequence_length * vocab_size numbers.

    Args:
        model: the original, called as ``model(input_ids=, use_cache=False)``, whose result has
            ``.logits``.
        sequences: token ids, int64 [n, sequence_length].

    Raises:
        ValueError: if the model gives no logits [1, sequence_length, vocab_size].
    """

    def __init__(self, model: Any, sequences: Tensor) -> None:
        self.sequences = sequences
        self._logits = [_logits(model, ids).cpu() for ids in sequences]

    def divergence(self, model: Any) -> float:
        """Mean over all tokens of KL(original || model) of the next token, in nats."""
        total, tokens = 0.0, 0
        for ids, original in zip(self.sequences, self._logits, strict=True):
            changed = _logits(model, ids)
            for p, q in zip(original.split(_CHUNK), changed.split(_CHUNK), strict=True):
                log_p = p.to(q.device).float().log_softmax(-1)
                terms = log_p.exp() * (log_p - q.float().log_softmax(-1))
                # A word that the original excludes (log p = -inf) contributes nothing.
                total += float(torch.where(log_p.isneginf(), 0.0, terms).double().sum())
            tokens += len(changed)
        return max(0.0, total / tokens)


@torch.no_grad()
def _logits(model: Any, ids: Tensor) -> Tensor:
    was_training = model.training
    model.eval()
    try:
        output = model(input_ids=ids[None].to(input_device(model)), use_cache=False)
    finally:
        model.train(was_training)
    logits: Tensor | None = getattr(output, "logits", None)
    if logits is None or logits.dim() != 3:
        raise ValueError(
            f"{type(model).__name__} gives no logits of every token, so that its divergence from "
            "the original cannot be measured"
        )
    return logits[0]
