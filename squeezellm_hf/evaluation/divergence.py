"""How far a quantized model's predictions are from the original's, token by token."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from squeezellm_hf.evaluation.perplexity import Windows, window_logits

# Rows of logits in float64 at a time: two copies of 64 x 128,256 entries are 131 MB.
_CHUNK = 64


@dataclass(frozen=True)
class Divergence:
    """Divergence of a model from its original on a text.

    Attributes:
        kl_mean: Mean over tokens of KL(original || quantized), in nats.
        kl_99: Its 99th percentile over tokens, in nats.
        top1_agreement: Share of tokens, in [0, 1], whose likeliest next token is the same.
        n_tokens: Number of predictions compared.
    """

    kl_mean: float
    kl_99: float
    top1_agreement: float
    n_tokens: int


@dataclass
class DivergenceMeter:
    """Collects KL(p || q) = sum_v p_v (log p_v - log q_v), in float64, one number a token."""

    _kl: list[Tensor] = field(default_factory=list)
    _agreeing: int = 0

    def update(self, original: Tensor, quantized: Tensor) -> None:
        """Add the logits of both models for the same tokens, each floats [n_tokens, vocab_size].

        Raises:
            ValueError: The shapes differ.
        """
        if original.shape != quantized.shape:
            raise ValueError(
                f"logits differ in shape: {list(original.shape)} of the original, "
                f"{list(quantized.shape)} of the quantized model"
            )
        quantized = quantized.to(original.device)
        for p_logits, q_logits in zip(original.split(_CHUNK), quantized.split(_CHUNK), strict=True):
            log_p = p_logits.double().log_softmax(-1)
            log_q = q_logits.double().log_softmax(-1)
            # p = 0 contributes nothing, even where log p is -inf.
            terms = torch.where(log_p.isneginf(), 0.0, log_p.exp() * (log_p - log_q))
            self._kl.append(terms.sum(-1).clamp_min(0).cpu())
        self._agreeing += int((original.argmax(-1) == quantized.argmax(-1)).sum())

    def result(self) -> Divergence:
        """Return the divergence over all tokens so far."""
        kl = torch.cat(self._kl)
        return Divergence(
            kl_mean=kl.mean().item(),
            kl_99=_quantile(kl, 0.99),
            top1_agreement=self._agreeing / kl.numel(),
            n_tokens=kl.numel(),
        )


def _quantile(values: Tensor, share: float) -> float:
    # torch.quantile refuses more than 16 M values.
    rank = share * (values.numel() - 1)
    ordered = values.sort().values
    low, high = ordered[int(rank)], ordered[min(int(rank) + 1, values.numel() - 1)]
    return torch.lerp(low, high, rank - int(rank)).item()


@torch.inference_mode()
def divergence(
    original: Any,
    quantized: Any,
    input_ids: Tensor,
    *,
    sequence_length: int = 2048,
    stride: int | None = None,
    progress: bool = False,
) -> Divergence:
    """Compare the predictions of two models with the same vocabulary on a text.

    Args:
        original, quantized: Causal language models of transformers, in evaluation mode.
        input_ids, sequence_length, stride: See `perplexity.Windows`.
        progress: Show a progress bar.

    Raises:
        ValueError: The vocabularies differ, the text is shorter than a window, or an argument is
            out of range.
    """
    windows = Windows(input_ids, sequence_length, stride)
    meter = DivergenceMeter()
    for window, first in tqdm(windows, desc="divergence", unit="window", disable=not progress):
        meter.update(
            window_logits(original, window, first), window_logits(quantized, window, first)
        )
    return meter.result()
