from typing import Any

import pytest
import torch

from squeezellm_hf.evaluation import throughput as module
from squeezellm_hf.evaluation.throughput import throughput

PROMPT = torch.arange(2, 12).repeat(3, 1)


def test_speeds_follow_from_the_times(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # A clock that only generating moves: 2 s for the prompt, 0.5 s for every further token.
    now = 0.0
    generate = model.generate

    def timed(ids: torch.Tensor, **arguments: Any) -> torch.Tensor:
        nonlocal now
        output = generate(ids, **arguments)
        now += 2 + 0.5 * (output.shape[1] - ids.shape[1] - 1)
        return output

    monkeypatch.setattr(model, "generate", timed)
    monkeypatch.setattr(module.time, "perf_counter", lambda: now)
    result = throughput(model, PROMPT, new_tokens=9, repeats=2)
    assert result.prefill_tokens_per_s == pytest.approx(30 / 2)
    assert result.decode_tokens_per_s == pytest.approx(3 / 0.5)


def test_the_end_of_text_token_ends_no_run(model: Any) -> None:
    bias = torch.zeros(model.config.vocab_size)
    bias[model.config.eos_token_id] = 1e4
    hook = model.lm_head.register_forward_hook(lambda module, x, y: y + bias)
    lengths = []
    generate = model.generate
    try:
        model.generate = lambda *a, **k: lengths.append(generate(*a, **k).shape[1])
        throughput(model, PROMPT, new_tokens=5, repeats=1)
    finally:
        hook.remove()
        del model.generate
    assert sorted(lengths) == [11, 12, 15]


def test_memory_is_that_of_the_parameters(model: Any) -> None:
    result = throughput(model, PROMPT, new_tokens=2, repeats=1)
    expected = sum(p.numel() * p.element_size() for p in model.parameters())
    assert result.memory_bytes >= expected
    assert result.peak_memory_bytes is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"new_tokens": 1}, "new_tokens=1"),
        ({"repeats": 0}, "repeats=0"),
        ({"input_ids": torch.arange(3)}, r"\[3\]"),
        ({"input_ids": torch.ones(2, 0).long()}, r"\[2, 0\]"),
    ],
)
def test_bad_arguments(model: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        throughput(model, **{"input_ids": PROMPT, **arguments})
