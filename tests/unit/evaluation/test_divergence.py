import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from squeezellm_hf.evaluation.divergence import DivergenceMeter, divergence
from squeezellm_hf.evaluation.evaluate import evaluate
from squeezellm_hf.evaluation.perplexity import perplexity


def kl_of_row(p_logits: Tensor, q_logits: Tensor) -> float:
    p, q = (np.exp(x.double().numpy() - x.double().numpy().max()) for x in (p_logits, q_logits))
    p, q = p / p.sum(), q / q.sum()
    return float(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0))


def test_against_the_definition(model: Any, other_model: Any, text: Tensor) -> None:
    result = divergence(model, other_model, text, sequence_length=83)
    with torch.no_grad():
        p, q = (m(text[None]).logits[0, :-1] for m in (model, other_model))
    kl = [kl_of_row(p[i], q[i]) for i in range(82)]
    assert result.n_tokens == 82
    assert result.kl_mean == pytest.approx(np.mean(kl), rel=1e-5)
    assert result.kl_99 == pytest.approx(np.quantile(kl, 0.99), rel=1e-5)
    agreeing = sum(int(p[i].argmax()) == int(q[i].argmax()) for i in range(82))
    assert result.top1_agreement == agreeing / 82


def test_direction_is_from_the_original(model: Any, other_model: Any, text: Tensor) -> None:
    there = divergence(model, other_model, text, sequence_length=83).kl_mean
    back = divergence(other_model, model, text, sequence_length=83).kl_mean
    assert abs(there - back) > 1e-3 * there


def test_a_model_does_not_diverge_from_itself(model: Any, text: Tensor) -> None:
    result = divergence(model, model, text, sequence_length=16)
    assert (result.kl_mean, result.kl_99, result.top1_agreement) == (0, 0, 1)


def test_masked_logits_contribute_nothing() -> None:
    p = torch.tensor([[0.0, 1.0, -math.inf]])
    q = torch.tensor([[1.0, 0.0, -math.inf]])
    meter = DivergenceMeter()
    meter.update(p, q)
    assert meter.result().kl_mean == pytest.approx(kl_of_row(p[0], q[0]))


@pytest.mark.parametrize("n_tokens", [1, 2, 100, 101, 257])
def test_percentile_is_that_of_numpy(n_tokens: int) -> None:
    torch.manual_seed(n_tokens)
    p, q = torch.randn(n_tokens, 5), torch.randn(n_tokens, 5)
    meter = DivergenceMeter()
    meter.update(p, q)
    expected = np.quantile([kl_of_row(p[i], q[i]) for i in range(n_tokens)], 0.99)
    assert meter.result().kl_99 == pytest.approx(expected, rel=1e-6)


def test_different_vocabularies() -> None:
    with pytest.raises(ValueError, match=r"\[2, 5\].*\[2, 6\]"):
        DivergenceMeter().update(torch.zeros(2, 5), torch.zeros(2, 6))


def test_evaluate_is_both_in_one_pass(model: Any, other_model: Any, text: Tensor) -> None:
    result = evaluate(other_model, text, original=model, sequence_length=16, stride=5)
    assert result.perplexity == perplexity(other_model, text, sequence_length=16, stride=5)
    assert result.original_perplexity == perplexity(model, text, sequence_length=16, stride=5)
    assert result.divergence == divergence(model, other_model, text, sequence_length=16, stride=5)


def test_evaluate_without_an_original(model: Any, text: Tensor) -> None:
    result = evaluate(model, text, sequence_length=16)
    assert result.perplexity == perplexity(model, text, sequence_length=16)
    assert result.original_perplexity is None
    assert result.divergence is None
