"""Perplexity of a model and its divergence from the original, in one pass over a text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from squeezellm_hf.evaluation.divergence import Divergence, DivergenceMeter
from squeezellm_hf.evaluation.perplexity import (
    Perplexity,
    PerplexityMeter,
    Windows,
    window_logits,
)


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured; the last two are None without an original."""

    perplexity: Perplexity
    original_perplexity: Perplexity | None
    divergence: Divergence | None


@torch.inference_mode()
def evaluate(
    model: Any,
    input_ids: Tensor,
    *,
    original: Any = None,
    sequence_length: int = 2048,
    stride: int | None = None,
    progress: bool = False,
) -> Evaluation:
    """Measure the perplexity of a model, and compare it to the original token by token.

    Args:
        model: A causal language model of transformers, in evaluation mode.
        input_ids, sequence_length, stride: The text; see `perplexity.Windows`.
        original: The model before quantization; both are in memory at once.
        progress: Show a progress bar.

    Raises:
        ValueError: The vocabularies differ, the text is shorter than a window, or an argument is
            out of range.
    """
    windows = Windows(input_ids, sequence_length, stride)
    ours, theirs, between = PerplexityMeter(), PerplexityMeter(), DivergenceMeter()
    for window, first in tqdm(windows, desc="evaluate", unit="window", disable=not progress):
        targets = window[0, first:]
        logits = window_logits(model, window, first)
        ours.update(logits, targets.to(logits.device))
        if original is not None:
            original_logits = window_logits(original, window, first)
            theirs.update(original_logits, targets.to(original_logits.device))
            between.update(original_logits, logits)
    if original is None:
        return Evaluation(ours.result(), None, None)
    return Evaluation(ours.result(), theirs.result(), between.result())
