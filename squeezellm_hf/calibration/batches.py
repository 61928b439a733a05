"""Calibration samples that are no plain text: keyword arguments of the model's forward.

They serve every model that plain text does not: ``{"input_features": ..., "labels": ...}`` of a
speech model, ``{"input_ids": ..., "pixel_values": ...}`` of one that sees, pairs of sentences,
chats with a mask.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def is_batches(dataset: Any) -> bool:
    """Whether a data set is a list of mappings."""
    return isinstance(dataset, (list, tuple)) and bool(dataset) and isinstance(dataset[0], Mapping)


def check_batches(dataset: Sequence[Any]) -> list[dict[str, Any]]:
    """Return the batches as plain dictionaries, their tensors detached, all as given otherwise.

    Raises:
        ValueError: naming the batch and key, unless every batch is a mapping from strings to
            tensors, numbers, strings, booleans or None, with a tensor among them, and all
            floating-point tensors are finite.
    """
    checked = []
    for position, batch in enumerate(dataset):
        where = f"dataset[{position}]"
        if not isinstance(batch, Mapping):
            raise ValueError(f"{where} is {type(batch).__name__}, not a mapping like dataset[0]")
        for key, value in batch.items():
            if not isinstance(key, str):
                raise ValueError(f"{where} has the key {key!r}; keys are arguments of forward")
            if not isinstance(value, Tensor | int | float | str | None):
                raise ValueError(
                    f"{where}[{key!r}] is {type(value).__name__}; allowed are tensors, numbers, "
                    "strings, booleans and None (a processor gives tensors with "
                    'return_tensors="pt")'
                )
            if isinstance(value, Tensor) and not bool(value.isfinite().all()):
                raise ValueError(f"{where}[{key!r}] holds NaN or infinite values")
        if not any(isinstance(value, Tensor) for value in batch.values()):
            raise ValueError(f"{where} holds no tensor")
        checked.append({k: v.detach() if isinstance(v, Tensor) else v for k, v in batch.items()})
    return checked


def digest(samples: Sequence[Any]) -> bytes:
    """A hash of samples: mappings, or tensors."""
    hashed = hashlib.sha256()
    for sample in samples:
        for key, value in (sample if isinstance(sample, Mapping) else {"": sample}).items():
            hashed.update(f"\0{key}\0".encode())
            if isinstance(value, Tensor):
                hashed.update(f"{value.dtype} {list(value.shape)}".encode())
                flat = value.detach().cpu().contiguous().flatten().view(torch.uint8)
                hashed.update(flat.numpy().tobytes())
            else:
                hashed.update(repr(value).encode())
        hashed.update(b"\1")
    return hashed.digest()
