"""Perplexity: how surprised a model is by a text it has not seen."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm

# Rows of logits that are widened to float32 at a time: 256 x 128,256 entries are 131 MB.
_CHUNK = 256


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of a model on a text.

    Attributes:
        perplexity: exp(nll).
        nll: Mean negative log-likelihood, in nats per predicted token.
        n_tokens: Number of predicted tokens.
    """

    perplexity: float
    nll: float
    n_tokens: int


@dataclass
class PerplexityMeter:
    """Sums -log p(token) over windows, each token in float32, the sum in float64."""

    nll_sum: float = 0.0
    n_tokens: int = 0

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Add predictions.

        Args:
            logits: Floats [n_tokens, vocab_size].
            targets: The tokens that followed, int64 [n_tokens].
        """
        for some_logits, some_targets in zip(
            logits.split(_CHUNK), targets.split(_CHUNK), strict=True
        ):
            losses = functional.cross_entropy(some_logits.float(), some_targets, reduction="none")
            self.nll_sum += losses.double().sum().item()
        self.n_tokens += targets.numel()

    def result(self) -> Perplexity:
        """Return the perplexity so far; it is infinite where exp(nll) overflows."""
        nll = self.nll_sum / self.n_tokens
        try:
            perplexity = math.exp(nll)
        except OverflowError:
            perplexity = math.inf
        return Perplexity(perplexity, nll, self.n_tokens)


@dataclass(frozen=True)
class Windows:
    """Cuts a text into overlapping or adjoining windows, so that every token is predicted once.

    Adjoining windows (stride = sequence_length, the default) are what published perplexities
    use: the first token of a window has no context and is not predicted. With a smaller stride a
    window predicts only its last `stride` tokens, with at least sequence_length - stride tokens of
    context; the first window predicts all but its first.
    Tokens behind the last full window are left out.

    Attributes:
        input_ids: The text, int64 [n_tokens]; or int64 [n, length], a window a row.
        sequence_length: Tokens a window, >= 2; not used for [n, length].
        stride: Tokens from one window to the next, in 1 .. sequence_length; None: adjoining.
    """

    input_ids: Tensor
    sequence_length: int = 2048
    stride: int | None = None
    _starts: range = field(init=False, repr=False)

    def __post_init__(self) -> None:
        ids = self.input_ids
        if ids.dim() not in (1, 2) or ids.dtype.is_floating_point:
            raise ValueError(
                f"input_ids are {ids.dtype} {list(ids.shape)}; allowed are integers [n_tokens] or "
                "[n, length]"
            )
        if ids.dim() == 2:
            object.__setattr__(self, "sequence_length", ids.shape[1])
        length = self.sequence_length
        if length < 2:
            raise ValueError(f"sequence_length={length}: a window needs at least 2 tokens")
        stride = length if self.stride is None or ids.dim() == 2 else self.stride
        if not 1 <= stride <= length:
            raise ValueError(f"stride={stride} is not in 1 .. sequence_length={length}")
        if ids.numel() < length:
            raise ValueError(
                f"the text is too short: found {ids.numel()} tokens, and one window needs {length}"
            )
        object.__setattr__(self, "_starts", range(0, ids.numel() - length + 1, stride))

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        """Yield (window, int64 [1, sequence_length]; position of the first token to predict)."""
        flat = self.input_ids.reshape(-1)
        length = self.sequence_length
        for start in self._starts:
            n_new = length if start == 0 else self._starts.step
            yield flat[start : start + length].unsqueeze(0), max(1, length - n_new)


def window_logits(model: Any, window: Tensor, first: int) -> Tensor:
    """Run a model on a window.

    Args:
        model: A causal language model of transformers.
        window: int64 [1, length].
        first: Position of the first token to predict, >= 1.

    Returns:
        The logits that predict tokens first .. length - 1: floats [length - first, vocab_size].
    """
    logits: Tensor = model(input_ids=window.to(model.device), use_cache=False).logits
    return logits[0, first - 1 : -1]


@torch.inference_mode()
def perplexity(
    model: Any,
    input_ids: Tensor,
    *,
    sequence_length: int = 2048,
    stride: int | None = None,
    progress: bool = False,
) -> Perplexity:
    """Measure exp of the mean cross entropy of a text, token by token.

    Args:
        model: A causal language model of transformers, in evaluation mode.
        input_ids, sequence_length, stride: See `Windows`.
        progress: Show a progress bar.

    Raises:
        ValueError: The text is shorter than a window, or an argument is out of range.
    """
    windows = Windows(input_ids, sequence_length, stride)
    meter = PerplexityMeter()
    for window, first in tqdm(windows, desc="perplexity", unit="window", disable=not progress):
        logits = window_logits(model, window, first)
        meter.update(logits, window[0, first:].to(logits.device))
    return meter.result()
