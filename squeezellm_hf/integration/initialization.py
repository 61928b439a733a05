"""Keep transformers from initializing weights that a quantized model has not.

After loading, it calls ``_init_weights`` on every module, loaded or not, and each function in there
passes by the tensors that are marked as loaded. Some families initialize a layer's weight from the
module around it (``init.normal_(module.c_proj.weight)`` in GPT-2, T5, CLIP, ...): without a
``weight`` that would be an error.
"""

from typing import Any

import torch
from torch import nn


def attach_weight(module: nn.Module, shape: tuple[int, ...]) -> None:
    """Give ``module`` a weight on meta, marked as loaded: an attribute, not a parameter."""
    stand_in: Any = torch.empty(shape, device="meta")
    stand_in._is_hf_initialized = True
    module.__dict__["weight"] = stand_in


def detach_weight(module: nn.Module) -> None:
    """Undo :func:`attach_weight`."""
    del module.__dict__["weight"]
