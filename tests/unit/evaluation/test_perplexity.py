import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from squeezellm_hf.evaluation.perplexity import PerplexityMeter, Windows, perplexity


def oracle(model: Any, text: Tensor, length: int, stride: int) -> tuple[float, int]:
    """Sum of -log p over tokens, each predicted by the first window that can, one at a time."""
    total, done = 0.0, set()
    for start in range(0, len(text) - length + 1, stride):
        with torch.no_grad():
            logits = model(text[None, start : start + length]).logits[0].double()
        for i in range(1, length):
            token = start + i
            # Adjoining windows: nothing predicts a window's first token.
            if token not in done:
                done.add(token)
                row = logits[i - 1]
                total -= (row[text[token]] - torch.logsumexp(row, 0)).item()
    return total, len(done)


@pytest.mark.parametrize(("length", "stride"), [(83, 83), (16, 16), (16, 7), (16, 1), (2, 1)])
def test_against_one_token_at_a_time(model: Any, text: Tensor, length: int, stride: int) -> None:
    nll_sum, n_tokens = oracle(model, text, length, stride)
    result = perplexity(model, text, sequence_length=length, stride=stride)
    assert result.n_tokens == n_tokens
    assert result.nll == pytest.approx(nll_sum / n_tokens, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(nll_sum / n_tokens), rel=1e-5)


def test_rows_are_windows(model: Any, text: Tensor) -> None:
    rows = text[:80].view(5, 16)
    assert perplexity(model, rows) == perplexity(model, text[:80], sequence_length=16)


def test_equals_the_loss_of_transformers(model: Any, text: Tensor) -> None:
    with torch.no_grad():
        loss = model(text[None], labels=text[None]).loss.item()
    assert perplexity(model, text, sequence_length=83).nll == pytest.approx(loss, rel=1e-5)


@given(n_tokens=st.integers(2, 60), length=st.integers(2, 20), stride=st.integers(1, 20))
def test_every_token_is_predicted_once(n_tokens: int, length: int, stride: int) -> None:
    if n_tokens < length or stride > length:
        with pytest.raises(ValueError, match=r"too short|stride="):
            Windows(torch.arange(n_tokens), length, stride)
        return
    windows = Windows(torch.arange(n_tokens), length, stride)
    predicted = [token for window, first in windows for token in window[0, first:].tolist()]
    assert len(list(windows)) == len(windows)
    assert len(set(predicted)) == len(predicted)
    last = int(list(windows)[-1][0][0, -1])
    if stride < length:
        assert predicted == list(range(1, last + 1))
    else:
        assert predicted == [token for token in range(last + 1) if token % length]


def test_meter_sums_over_chunks_of_any_size() -> None:
    logits, targets = torch.randn(700, 11) * 5, torch.randint(0, 11, (700,))
    meter = PerplexityMeter()
    for piece, labels in zip(
        logits.split([1, 300, 399]), targets.split([1, 300, 399]), strict=True
    ):
        meter.update(piece, labels)
    log_p = logits.double().log_softmax(-1)
    expected = -log_p[torch.arange(700), targets].mean().item()
    assert meter.result().nll == pytest.approx(expected, rel=1e-6)


def test_half_precision_logits_are_widened() -> None:
    logits, targets = (torch.randn(50, 1000) * 3).bfloat16(), torch.randint(0, 1000, (50,))
    meter = PerplexityMeter()
    meter.update(logits, targets)
    expected = -logits.double().log_softmax(-1)[torch.arange(50), targets].mean().item()
    assert meter.result().nll == pytest.approx(expected, rel=1e-6)


def test_a_perplexity_beyond_the_floats_is_infinite() -> None:
    meter = PerplexityMeter()
    meter.update(torch.tensor([[0.0, -5000.0]]), torch.tensor([1]))
    assert meter.result().perplexity == math.inf


@pytest.mark.parametrize(
    ("ids", "length", "stride", "message"),
    [
        (torch.arange(5), 6, None, "found 5 tokens, and one window needs 6"),
        (torch.arange(5), 1, None, "sequence_length=1"),
        (torch.arange(5), 4, 5, "stride=5"),
        (torch.arange(5), 4, 0, "stride=0"),
        (torch.rand(5), 4, None, "float32"),
        (torch.ones(1, 2, 3).long(), 4, None, r"\[1, 2, 3\]"),
        (torch.ones(0, 3).long(), 4, None, "found 0 tokens"),
    ],
)
def test_bad_arguments(ids: Tensor, length: int, stride: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Windows(ids, length, stride)
