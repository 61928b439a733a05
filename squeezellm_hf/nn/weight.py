"""The weight of a quantized layer, for code that reads it instead of calling the layer."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


class DequantizedWeight(Tensor):
    """Shape, dtype and device of a weight at once; its values whenever an operation needs them.

    Some models read ``layer.weight`` beside calling the layer: T5 for its dtype, three times a
    token; Mamba for a product of its own. The first must not cost a dequantization, and neither
    may hold the full-precision weight for longer than the operation lasts (nor do gradients: what
    autograd keeps for the backward pass is this object).

    Args:
        layer: has ``out_features``, ``in_features``, ``qweight`` and ``dequantize(dtype)``.
        dtype: of the values.
    """

    _layer: Any
    # Transformers would draw initial values for it after loading a model.
    _is_hf_initialized = True

    @staticmethod
    def __new__(cls, layer: Any, dtype: torch.dtype) -> "DequantizedWeight":
        shape = (layer.out_features, layer.in_features)
        made: DequantizedWeight = Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=layer.qweight.device
        )
        made._layer = layer
        return made

    # Results are plain tensors.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run ``func`` on the values."""

        def values(item: Any) -> Any:
            return item._layer.dequantize(item.dtype) if isinstance(item, cls) else item

        return func(*tree_map(values, args), **tree_map(values, kwargs or {}))

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"DequantizedWeight({list(self.shape)}, {self.dtype}, {self.device})"
