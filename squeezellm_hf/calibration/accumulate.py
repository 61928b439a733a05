"""One walk over the calibration sequences, for all statistics that are taken on the way."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from squeezellm_hf.calibration.objectives import CausalLM, Objective, Sample, to_device

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
    sequences: Sequence[Sample],
    statistics: Sequence[Statistic],
    *,
    objective: Objective | None = None,
    after_sequence: AfterSequence | None = None,
) -> None:
    """Add the sequences that ``statistics`` still lack, in order, one at a time.

    The model is in evaluation mode meanwhile (dropout would make the sums depend on more than the
    data), without gradients but those that a statistic asks for, and left as it was.

    Args:
        model: a module that ``objective`` can call, as those of Transformers are.
        sequences: token ids, int64 [sequence_length] each, or keyword arguments of the model.
        statistics: at least one.
        objective: what is differentiated. Default: the mean token cross-entropy of a causal
            language model, ``model(input_ids=, labels=, use_cache=False).loss``.
        after_sequence: called with the number of sequences done, after each.

    Raises:
        ValueError: if the model gives no loss, or a loss or a sum is not finite.
    """
    objective = objective or CausalLM()
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
            with torch.set_grad_enabled(backward):
                loss = objective(model, to_device(sequences[index], device), index)
                check_loss(loss, index)
                if backward and loss.requires_grad:
                    (loss * scale).backward()
            del loss
            for statistic in statistics:
                statistic.sequences = max(statistic.sequences, index + 1)
            if after_sequence is not None:
                after_sequence(index + 1)
    for statistic in statistics:
        statistic.check()


def check_loss(loss: Tensor, index: int) -> None:
    """Raise ValueError unless the loss of a sequence is finite."""
    if not bool(loss.isfinite()):
        raise ValueError(
            f"calibration sequence {index} gives the loss {loss.item()}, "
            "which must be a finite number"
        )


def input_device(model: Any) -> torch.device:
    """Where a model wants its inputs."""
    try:
        device: torch.device = model.get_input_embeddings().weight.device
    except (AttributeError, NotImplementedError):
        return next(model.parameters()).device
    return device


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
