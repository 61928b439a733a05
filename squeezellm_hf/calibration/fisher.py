"""The diagonal of the empirical Fisher information: how sensitive the loss is to each weight.

SqueezeLLM (arXiv 2306.07629), section 4.1, equation 4: F = sum over sequences of g * g, with g
the gradient of the mean token cross-entropy of one sequence.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# An fp16 gradient below 6e-8 is zero; the loss is scaled so that few are, as in fp16 training.
FP16_LOSS_SCALE = 1024.0

AfterSequence = Callable[[int, Mapping[str, Tensor]], None]


def calibrate_fisher(
    model: Any,
    linears: Mapping[str, nn.Linear],
    sequences: Sequence[Tensor],
    *,
    fisher: dict[str, Tensor] | None = None,
    first: int = 0,
    after_sequence: AfterSequence | None = None,
) -> dict[str, Tensor]:
    """Sum the squared gradients of the weights of ``linears`` over ``sequences``.

    Beside the model, memory holds the sum itself (4 bytes a weight), the activations of one
    sequence, and the gradient of one layer: each is squared, added and dropped as soon as the
    backward pass has produced it.

    Args:
        model: a module, called as ``model(input_ids=, labels=, use_cache=False)``, whose result
            has a ``.loss``, the mean token cross-entropy, as every causal language model of
            Transformers has.
        linears: the layers by name; their weights may lie on several devices.
        sequences: token ids, int64 [sequence_length] each.
        fisher: a sum to go on from, as returned by an earlier call, with ``first`` sequences in it.
        first: index of the first sequence to add.
        after_sequence: called with the number of sequences done and the sum so far.

    Returns:
        fp32 [out_features, in_features] per name, on the device of the weight.

    Raises:
        ValueError: if the model gives no loss, or a loss or gradient is not finite.
    """
    if fisher is None:
        fisher = {
            name: torch.zeros_like(linear.weight, dtype=torch.float32)
            for name, linear in linears.items()
        }
    half = any(linear.weight.dtype == torch.float16 for linear in linears.values())
    scale = FP16_LOSS_SCALE if half else 1.0
    weights = {name: linear.weight for name, linear in linears.items()}
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    was_training = model.training
    device = model.get_input_embeddings().weight.device if hasattr(
        model, "get_input_embeddings") else next(model.parameters()).device  # fmt: skip

    def add_square(name: str) -> Callable[[Tensor], None]:
        def hook(weight: Tensor) -> None:
            gradient = weight.grad
            weight.grad = None
            if gradient is not None:
                gradient = gradient.float()
                fisher[name].addcmul_(gradient, gradient, value=1.0 / scale**2)

        return hook

    model.requires_grad_(False)
    model.eval()  # dropout would make the sum depend on more than the data
    hooks = []
    for name, weight in weights.items():
        weight.requires_grad_(True)
        hooks.append(weight.register_post_accumulate_grad_hook(add_square(name)))
    try:
        with torch.enable_grad():
            for index in range(first, len(sequences)):
                input_ids = sequences[index].to(device).unsqueeze(0)
                loss = model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
                if loss is None or not bool(loss.isfinite()):
                    raise ValueError(
                        f"calibration sequence {index} gives the loss "
                        f"{None if loss is None else loss.item()}, which must be a finite number"
                    )
                (loss * scale).backward()
                del loss
                if after_sequence is not None:
                    after_sequence(index + 1, fisher)
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, required in trainable.items():
            parameter.requires_grad_(required)
            parameter.grad = None
        model.train(was_training)
    for name, total in fisher.items():
        if not bool(total.isfinite().all()):
            raise ValueError(
                f"the squared gradients of {name}.weight are not finite; "
                f"calibrate in bfloat16 or float32, not {weights[name].dtype}"
            )
    return fisher
