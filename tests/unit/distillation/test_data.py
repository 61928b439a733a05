"""Training and held-out sequences, and their order."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from squeezellm_hf.distillation.data import batch_rows, split_tokens, tokens_wanted
from squeezellm_hf.distillation.settings import DistillationSettings


@given(
    tokens=st.integers(60, 3000),
    length=st.integers(2, 12),
    batch=st.integers(1, 4),
    held_out=st.integers(1, 40),
)
def test_every_sequence_is_trained_on_or_held_out(
    tokens: int, length: int, batch: int, held_out: int
) -> None:
    settings = DistillationSettings(batch_size=batch, sequence_length=length, held_out=held_out)
    data = split_tokens(torch.arange(tokens), settings)
    assert 1 <= len(data.held_out) <= held_out
    assert len(data.train) >= batch
    assert data.all.shape == (tokens // length, length)
    starts = data.all[:, 0].sort().values
    assert starts.tolist() == list(range(0, tokens // length * length, length))
    assert (data.all.diff(dim=1) == 1).all()


def test_held_out_sequences_are_spread_over_the_text() -> None:
    settings = DistillationSettings(sequence_length=10, held_out=4)
    data = split_tokens(torch.arange(1000), settings)
    assert (data.held_out[:, 0] // 10).tolist() == [12, 37, 62, 87]


def test_too_short_a_text_is_an_error() -> None:
    settings = DistillationSettings(sequence_length=10)
    with pytest.raises(ValueError, match="found 89 tokens, which is 8 sequences of 10; at least 8"):
        split_tokens(torch.arange(89), settings)
    assert len(split_tokens(torch.arange(90), settings).train) == 8


def test_as_many_tokens_are_wanted_as_are_used_once() -> None:
    settings = DistillationSettings(steps=3, batch_size=4, sequence_length=10, held_out=2)
    assert tokens_wanted(settings) == (3 * 4 + 2) * 10
    # Also where an eighth of it is less than what was to be held out.
    data = split_tokens(torch.arange(tokens_wanted(settings)), settings)
    assert len(data.train) >= 12


@given(n=st.integers(1, 50), batch=st.integers(1, 50), seed=st.integers(0, 10))
def test_a_pass_shows_every_sequence_at_most_once(n: int, batch: int, seed: int) -> None:
    batch = min(n, batch)
    steps = n // batch
    for epoch in range(2):
        rows = torch.cat(
            [batch_rows(epoch * steps + step, n, batch, seed) for step in range(steps)]
        )
        assert rows.numel() == steps * batch == rows.unique().numel()
        assert 0 <= rows.min() <= rows.max() < n


def test_passes_and_seeds_differ() -> None:
    first = batch_rows(0, 50, 50, 0)
    assert not first.equal(batch_rows(1, 50, 50, 0))
    assert not first.equal(batch_rows(0, 50, 50, 5))
    assert first.equal(batch_rows(0, 50, 50, 0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be an integer of at least 1, got 0"),
        ({"steps": 1.5}, "steps must be an integer"),
        ({"lr": 0.0}, "lr must be a positive number or None, got 0.0"),
        ({"lr": float("nan")}, "lr must be a positive number"),
        ({"lr": "fast"}, "lr must be a positive number"),
        ({"batch_size": True}, "batch_size must be an integer"),
        ({"sequence_length": 1}, "sequence_length must be an integer of at least 2"),
        ({"micro_batch_size": 0}, "micro_batch_size must be"),
        ({"train_norms": 1}, "train_norms must be true or false, got 1"),
        ({"held_out": 0}, "held_out must be"),
        ({"seed": -1}, "seed must be an integer of at least 0"),
    ],
)
def test_bad_settings(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistillationSettings(**changes)


def test_learning_rates_by_bits() -> None:
    settings = DistillationSettings()
    assert [settings.learning_rate(bits) for bits in (1, 2, 3, 4, 8)] == [
        2.5e-3, 2.5e-3, 1.5e-3, 1e-3, 1e-3,
    ]  # fmt: skip
    assert DistillationSettings(lr=0.5).learning_rate(3) == 0.5
