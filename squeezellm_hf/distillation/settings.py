"""Settings of a distillation."""

import math
from dataclasses import dataclass

# Peak learning rate by bits, relative to the root mean square of a layer's table; wider indices as
# 4, narrower as 2.
LEARNING_RATES = {2: 2.5e-3, 3: 1.5e-3, 4: 1e-3}
INDEX_RATE = 4.0


@dataclass(frozen=True)
class DistillationSettings:
    """Settings of a distillation, checked.

    Attributes:
        steps: updates of the tables.
        lr: peak learning rate of everything trained, relative to the root mean square of the
            tensor. None: by the bits of each layer, :data:`LEARNING_RATES`.
        batch_size: sequences an update.
        sequence_length: tokens a sequence.
        micro_batch_size: sequences that pass through the model together; None: all of an update.
            Fewer need less memory; the result differs by rounding alone.
        train_norms: train the weights (and biases) of the norms, too.
        train_values: train the weights of the sparse part, too.
        train_indices: train the indices, too: 16 bytes more a weight in memory, and in a kept
            state.
        index_lr: peak learning rate of the weights behind trained indices, relative to the root
            mean square of the table. None: four times ``lr``, for they start in the middle of
            their cells and have half a cell to go before anything changes.
        held_out: sequences that are not trained on and decide what is kept; at most an eighth of
            the data.
        evaluations: how often the held-out divergence is measured, spread over the steps.
        patience: after so many measurements without a new least one, training stops.
        seed: chooses the order of the sequences.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
    """

    steps: int = 300
    lr: float | None = None
    batch_size: int = 8
    sequence_length: int = 512
    micro_batch_size: int | None = None
    train_norms: bool = False
    train_values: bool = False
    train_indices: bool = False
    index_lr: float | None = None
    held_out: int = 16
    evaluations: int = 12
    patience: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        _check_integer("steps", self.steps)
        for name in ("batch_size", "held_out", "evaluations", "patience"):
            _check_integer(name, getattr(self, name))
        _check_integer("sequence_length", self.sequence_length, low=2)
        if self.micro_batch_size is not None:
            _check_integer("micro_batch_size", self.micro_batch_size)
        _check_integer("seed", self.seed, low=0)
        for name in ("train_norms", "train_values", "train_indices"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        for name in ("lr", "index_lr"):
            lr = getattr(self, name)
            number = isinstance(lr, int | float) and not isinstance(lr, bool)
            if lr is not None and not (number and math.isfinite(lr) and lr > 0):
                raise ValueError(f"{name} must be a positive number or None, got {lr!r}")

    @property
    def micro_batch(self) -> int:
        """Sequences that pass through the model together."""
        return min(self.batch_size, self.micro_batch_size or self.batch_size)

    @property
    def evaluation_interval(self) -> int:
        """Steps from one measurement of the held-out divergence to the next."""
        return -(-self.steps // self.evaluations)

    def learning_rate(self, bits: int) -> float:
        """Peak learning rate of tables of ``2**bits`` entries."""
        return self.lr or LEARNING_RATES[min(max(bits, 2), 4)]

    def index_learning_rate(self, bits: int) -> float:
        """Peak learning rate of the weights behind the indices into such tables."""
        return self.index_lr or INDEX_RATE * self.learning_rate(bits)


def _check_integer(name: str, value: object, low: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name} must be an integer of at least {low}, got {value!r}")
