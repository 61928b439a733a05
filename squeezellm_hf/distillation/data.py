"""Which sequences are trained on, in which order, and which are held out."""

from typing import NamedTuple

import torch
from torch import Tensor

from squeezellm_hf.distillation.settings import DistillationSettings


class Sequences(NamedTuple):
    """Token ids, int64 [n, sequence_length] each."""

    train: Tensor
    held_out: Tensor

    @property
    def all(self) -> Tensor:
        """Training sequences, then held-out ones."""
        return torch.cat([self.train, self.held_out])


def tokens_wanted(settings: DistillationSettings) -> int:
    """Tokens with which no sequence is trained on twice."""
    sequences = settings.steps * settings.batch_size + settings.held_out
    return sequences * settings.sequence_length


def split_tokens(token_ids: Tensor, settings: DistillationSettings) -> Sequences:
    """Cut a text into adjoining sequences and hold some out, spread evenly over the text.

    Args:
        token_ids: int64 [n_tokens]. Tokens behind the last whole sequence are left out.
        settings: sequence_length, batch_size and held_out.

    Raises:
        ValueError: if the text has fewer than ``batch_size + 1`` sequences.
    """
    length = settings.sequence_length
    n = token_ids.numel() // length
    if n < settings.batch_size + 1:
        raise ValueError(
            f"the data for distillation is too short: found {token_ids.numel()} tokens, which is "
            f"{n} sequences of {length}; at least {settings.batch_size} (batch_size) + 1 to hold "
            "out are needed. Lower distill_batch_size or distill_sequence_length, or give more text"
        )
    windows = token_ids[: n * length].view(n, length)
    count = min(settings.held_out, max(1, n // 8), n - settings.batch_size)
    # The middle of each of `count` equal parts of the text.
    chosen = (2 * torch.arange(count) + 1) * n // (2 * count)
    held_out = torch.zeros(n, dtype=torch.bool)
    held_out[chosen] = True
    return Sequences(windows[~held_out], windows[held_out])


def batch_rows(step: int, n: int, batch_size: int, seed: int) -> Tensor:
    """The sequences of an update, int64 [batch_size]: a new order in every pass over the data.

    A function of its arguments alone, so that a run that goes on sees what it would have seen.
    What is left of a pass that a batch does not fill is left out.

    Args:
        step: from 0.
        n: number of training sequences, at least ``batch_size``.
    """
    epoch, batch = divmod(step, n // batch_size)
    generator = torch.Generator().manual_seed(seed + epoch)
    order = torch.randperm(n, generator=generator)
    return order[batch * batch_size : (batch + 1) * batch_size]
