"""The state of a distillation on disk, so that a killed run goes on where it was."""

import os
import pickle
import time
from pathlib import Path
from typing import Any

import torch

# Changes with the meaning of what is in a state: one of another version is not gone on with.
STATE_VERSION = 1

# A state is written at most so often, in seconds; and it costs at most this part of the time.
SECONDS_BETWEEN_WRITES = 30.0
WRITE_SHARE = 0.05


class Checkpoint:
    """One file, always whole: written beside, flushed, renamed over.

    Args:
        path: named after all that the run depends on by the caller. None: nothing is kept.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._last_write = time.monotonic()
        self._write_seconds = 0.0

    def load(self, device: torch.device) -> dict[str, Any] | None:
        """What was saved last, or None.

        Raises:
            ValueError: if the file is damaged.
        """
        if self.path is None or not self.path.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(self.path, map_location=device, weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(
                f"{self.path} is damaged; delete it to distill anew: {error}"
            ) from error
        return state

    @property
    def is_due(self) -> bool:
        """Whether it is time for another write."""
        pause = max(SECONDS_BETWEEN_WRITES, self._write_seconds / WRITE_SHARE)
        return self.path is not None and time.monotonic() - self._last_write >= pause

    def save(self, state: dict[str, Any]) -> None:
        """Write ``state``: tensors, numbers, strings, in lists and dictionaries."""
        if self.path is None:
            return
        start = time.monotonic()
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)
        self._last_write = time.monotonic()
        self._write_seconds = self._last_write - start
