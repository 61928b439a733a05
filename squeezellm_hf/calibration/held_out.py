"""Sequences that calibration does not see."""

import torch
from torch import Tensor

# Two windows share text if an aligned run of so many tokens of one is anywhere in the other.
_RUN = 16


def held_out(candidates: Tensor, sequences: Tensor, count: int) -> Tensor:
    """Choose sequences that share no text with those of the calibration, spread over the data.

    Args:
        candidates: token ids, int64 [m, length], for instance other windows of the same data.
        sequences: token ids of the calibration, int64 [n, length].
        count: how many are wanted, at least 1.

    Returns:
        At most ``count`` rows of ``candidates``; none if all of them share text.
    """
    run = min(_RUN, candidates.shape[1])
    seen = {_key(row[i : i + run]) for row in sequences for i in range(len(row) - run + 1)}
    free = [
        row
        for row in candidates
        if not any(_key(part) in seen for part in row.split(run) if len(part) == run)
    ]
    if not free:
        return candidates[:0]
    places = torch.linspace(0, len(free) - 1, min(count, len(free))).round().long()
    return torch.stack([free[i] for i in places.tolist()])


def _key(ids: Tensor) -> bytes:
    return ids.numpy().tobytes()
