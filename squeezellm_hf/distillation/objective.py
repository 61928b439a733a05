"""The objective: KL(original || quantized) of the next-token distributions.

    KL = sum over tokens t, words v of  p_tv (log p_tv - log q_tv)        d KL / d logits = q - p

G. Hinton, O. Vinyals, J. Dean, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531,
at temperature 1, on all words. The logits are made, compared and dropped for a few tokens at a
time: the whole of them, 4,096 tokens of 128,256 words, would take 2 GB a copy.
"""

from typing import Any

import torch
from torch import Tensor

from squeezellm_hf.distillation.causal_lm import CausalLM

# Logits of so many cells at a time: 268 MB in fp32, of which about five copies are alive. On a CPU
# few enough that they stay in its cache and the allocator keeps their pages: four times faster.
_CELLS = 1 << 26
_CPU_CELLS = 1 << 22


class _KL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        log_q = student.log_softmax(-1, dtype=torch.float32)
        log_p = teacher.log_softmax(-1, dtype=torch.float32)
        p = log_p.exp()
        # A word that the original excludes (log p = -inf) contributes nothing.
        terms = torch.where(log_p.isneginf(), 0.0, p * (log_p - log_q))
        ctx.save_for_backward(log_q.exp_().sub_(p).to(student.dtype))
        return terms.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (difference,) = ctx.saved_tensors
        return difference * grad.to(difference.dtype), None


def kl_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student), summed over tokens, in nats.

    Args:
        student: logits, floats [n_tokens, vocab_size].
        teacher: logits of the same shape; no gradient flows to them.

    Returns:
        fp32 scalar.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"logits differ in shape: {list(teacher.shape)} of the original, "
            f"{list(student.shape)} of the quantized model"
        )
    return _KL.apply(student, teacher)


def _pieces(model: CausalLM, *states: Tensor) -> Any:
    cells = _CPU_CELLS if model.device.type == "cpu" else _CELLS
    tokens = max(1, cells // model.vocab_size)
    return zip(*(state.flatten(0, 1).split(tokens) for state in states), strict=True)


@torch.no_grad()
def divergence(model: CausalLM, input_ids: Tensor, teacher_states: Tensor) -> Tensor:
    """KL of all tokens of a batch, summed, fp64 scalar.

    Args:
        model: the quantized model.
        input_ids: int64 [batch, sequence_length].
        teacher_states: [batch, sequence_length, hidden_size], the original's last hidden states.
    """
    total = torch.zeros((), dtype=torch.float64, device=teacher_states.device)
    for student, teacher in _pieces(model, model.hidden_states(input_ids), teacher_states):
        total += kl_divergence(model.logits(student), model.logits(teacher))
    return total


def backward(model: CausalLM, input_ids: Tensor, teacher_states: Tensor, scale: float) -> Tensor:
    """Add the gradient of ``scale`` times the summed KL of a batch to what requires one.

    Args: as of :func:`divergence`.

    Returns:
        ``scale`` times the sum, fp32 scalar.
    """
    hidden = model.hidden_states(input_ids)
    total = torch.zeros((), device=hidden.device)
    gradients = []
    for student, teacher in _pieces(model, hidden.detach(), teacher_states):
        student.requires_grad_(True)
        with torch.no_grad():
            target = model.logits(teacher)
        loss = kl_divergence(model.logits(student), target) * scale
        (gradient,) = torch.autograd.grad(loss, student)
        gradients.append(gradient)
        total += loss.detach()
    hidden.flatten(0, 1).backward(torch.cat(gradients))
    return total
