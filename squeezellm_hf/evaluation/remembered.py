"""The original's predictions, kept while many models are compared with it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


class RememberedModel:
    """Answers what it was asked before from memory, in the place of a model.

    Args:
        model: A causal language model of transformers.
        max_bytes: Of logits that are kept, in the CPU's memory; what is beyond that is computed
            anew.
    """

    def __init__(self, model: Any, max_bytes: int = 4 * 10**9) -> None:
        self._model = model
        self._left = max_bytes
        self._logits: dict[bytes, Tensor] = {}

    @property
    def device(self) -> torch.device:
        """Where the model wants its token ids, and where its logits are."""
        device: torch.device = self._model.device
        return device

    def __call__(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        """Return an object with `logits`, as the model does."""
        key = input_ids.cpu().numpy().tobytes()
        if key in self._logits:
            return SimpleNamespace(logits=self._logits[key].to(self.device))
        logits: Tensor = self._model(input_ids=input_ids, use_cache=use_cache).logits
        size = logits.numel() * logits.element_size()
        if size <= self._left:
            self._left -= size
            self._logits[key] = logits.cpu()
        return SimpleNamespace(logits=logits)
