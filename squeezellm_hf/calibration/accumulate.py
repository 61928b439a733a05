"""One walk over the calibration sequences, for all statistics that are taken on the way."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

# An fp16 gradient below 6e-8 is zero; the loss is scaled so that few are, as in fp16 training.
FP16_LOSS_SCALE = 1024.0


class Statistic(Protocol):
    """A sum over calibration sequences, collected by hooks while the model runs.

    Attributes:
        sequences: how many sequences are in the sum. Earlier ones are passed over, so that
            statistics that stopped at different places go on together.
        active: whether the sequence under way is to be added.
        needs_gradients: whether the loss has to be differentiated.
        linears: the layers that it is taken of.
    """

    sequences: int
    active: bool
    needs_gradients: bool
    linears: Any

    def attach(self, loss_scale: float) -> list[RemovableHandle]:
        """Hook into the model, in which no parameter requires a gradient; may change that.

        Args:
            loss_scale: what the loss, and so every gradient, will be multiplied by.
        """

    def check(self) -> None:
        """Raise ValueError, naming the layer, unless every sum is finite."""


AfterSequence = Callable[[int], None]


def accumulate(
    model: Any,
    sequences: Sequence[Tensor],
    statistics: Sequence[Statistic],
    *,
    after_sequence: AfterSequence | None = None,
) -> None:
    """Add the sequences that ``statistics`` still lack, in order, one at a time.

    The model is in evaluation mode meanwhile (dropout would make the sums depend on more than the
    data), without gradients but those that a statistic asks for, and left as it was.

    Args:
        model: a module, called as ``model(input_ids=, labels=, use_cache=False)``, whose result
            has a ``.loss``, the mean token cross-entropy, as every causal language model of
            Transformers has.
        sequences: token ids, int64 [sequence_length] each.
        statistics: at least one.
        after_sequence: called with the number of sequences done, after each.

    Raises:
        ValueError: if the model gives no loss, or a loss or a sum is not finite.
    """
    half = any(
        linear.weight.dtype == torch.float16 for s in statistics for linear in s.linears.values()
    )
    scale = FP16_LOSS_SCALE if half else 1.0
    backward = any(statistic.needs_gradients for statistic in statistics)
    device = input_device(model)
    with frozen(model), ExitStack() as cleanup:
        for statistic in statistics:
            for hook in statistic.attach(scale):
                cleanup.callback(hook.remove)
        for index in range(min(s.sequences for s in statistics), len(sequences)):
            for statistic in statistics:
                statistic.active = statistic.sequences <= index
            _run(model, sequences[index].to(device), index, scale, backward)
            for statistic in statistics:
                statistic.sequences = max(statistic.sequences, index + 1)
            if after_sequence is not None:
                after_sequence(index + 1)
    for statistic in statistics:
        statistic.check()


def input_device(model: Any) -> torch.device:
    """Where a model wants its token ids."""
    if hasattr(model, "get_input_embeddings"):
        device: torch.device = model.get_input_embeddings().weight.device
        return device
    return next(model.parameters()).device


def _run(model: Any, ids: Tensor, index: int, scale: float, backward: bool) -> None:
    ids = ids.unsqueeze(0)
    with torch.set_grad_enabled(backward):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        if loss is None or not bool(loss.isfinite()):
            raise ValueError(
                f"calibration sequence {index} gives the loss "
                f"{None if loss is None else loss.item()}, which must be a finite number"
            )
        if backward:
            (loss * scale).backward()


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """In evaluation mode, with no parameter that requires a gradient; afterwards as before."""
    training, trainable = model.training, {p: p.requires_grad for p in model.parameters()}
    model.requires_grad_(False)
    model.eval()
    try:
        yield
    finally:
        for parameter, required in trainable.items():
            parameter.requires_grad_(required)
            parameter.grad = None
        model.train(training)
