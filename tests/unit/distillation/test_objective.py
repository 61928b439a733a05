"""KL and its gradient, against SciPy and against autograd in fp64."""

import pytest
import torch
from scipy.special import log_softmax, rel_entr, softmax

from squeezellm_hf.distillation import objective
from squeezellm_hf.distillation.causal_lm import CausalLM
from squeezellm_hf.distillation.objective import kl_divergence
from tests.conftest import tiny_llama


def logits(seed: int, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(17, 50, generator=torch.Generator().manual_seed(seed))


def test_value_against_scipy() -> None:
    q, p = logits(0), logits(1)
    expected = rel_entr(softmax(p.double().numpy(), -1), softmax(q.double().numpy(), -1)).sum()
    assert kl_divergence(q, p).item() == pytest.approx(expected, rel=1e-5)


def test_of_equal_logits_is_zero() -> None:
    q = logits(0).requires_grad_()
    kl = kl_divergence(q, q.detach().clone())
    kl.backward()
    assert kl.item() == 0.0
    assert not q.grad.any()


def test_excluded_words_contribute_nothing() -> None:
    q, p = logits(0), logits(1)
    p[:, 7] = -torch.inf
    finite = [i for i in range(50) if i != 7]
    p_log, q_log = (log_softmax(t.double().numpy(), -1) for t in (p[:, finite], q))
    expected = (softmax(p[:, finite].double().numpy(), -1) * (p_log - q_log[:, finite])).sum()
    assert kl_divergence(q, p).item() == pytest.approx(expected, rel=1e-5)


def test_logits_that_are_no_numbers_show() -> None:
    q, p = logits(0), logits(1)
    q[3, 4] = torch.nan
    assert kl_divergence(q, p).isnan()
    assert kl_divergence(logits(0), q).isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_against_autograd_in_fp64(dtype: torch.dtype) -> None:
    q, p = logits(0).to(dtype).requires_grad_(), logits(1).to(dtype)
    (0.25 * kl_divergence(q, p)).backward()
    exact = q.detach().double().requires_grad_()
    log_p = p.double().log_softmax(-1)
    (0.25 * (log_p.exp() * (log_p - exact.log_softmax(-1))).sum()).backward()
    assert q.grad.dtype == dtype
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]
    torch.testing.assert_close(q.grad.double(), exact.grad, rtol=tolerance, atol=tolerance)


def test_other_vocabulary_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"\[17, 50\] of the original, \[17, 49\]"):
        kl_divergence(logits(0)[:, :49], logits(1))


@pytest.mark.parametrize("cells", [1, 128 * 7, 1 << 26])
def test_pieces_of_a_batch_add_up(monkeypatch: pytest.MonkeyPatch, cells: int) -> None:
    """The gradient of the embeddings, through the whole model, in one piece and in many."""
    monkeypatch.setattr(objective, "_CPU_CELLS", cells)
    ids = torch.arange(40).view(2, 20)
    teacher = torch.randn(2, 20, 64, generator=torch.Generator().manual_seed(5))
    lm = CausalLM(tiny_llama())
    weight = lm.model.model.embed_tokens.weight
    lm.model.requires_grad_(False)
    weight.requires_grad_()
    loss = objective.backward(lm, ids, teacher, scale=0.5)

    model = tiny_llama().double()
    model.requires_grad_(False)
    exact = model.model.embed_tokens.weight.requires_grad_()
    log_p = model.lm_head(teacher.double()).log_softmax(-1)
    log_q = model(input_ids=ids).logits.log_softmax(-1)
    expected = 0.5 * (log_p.exp() * (log_p - log_q)).sum()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert objective.divergence(lm, ids, teacher).item() == pytest.approx(
        2 * expected.item(), rel=1e-4
    )
    torch.testing.assert_close(weight.grad.double(), exact.grad, rtol=1e-3, atol=1e-4)
