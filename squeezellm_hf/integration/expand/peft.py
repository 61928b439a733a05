"""Keep PEFT from translating names of layers that a model with expanded experts has.

Adapters of Transformers 4 name the layers of each expert (``experts.0.down_proj``), which fused
experts have not: PEFT maps such targets, and tensors, to the fused parameters. Expanded experts
have these layers again, and adapters on them are saved and loaded under their own names.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

from squeezellm_hf.nn import Experts

_MODULE = "peft.utils.transformers_weight_conversion"


def install(lora_model: Any) -> None:
    """Leave targets and adapters of expanded experts alone.

    Args:
        lora_model: PEFT's ``LoraModel``. Its translation is replaced when the first is made: now,
            PEFT may be half imported.
    """
    original = lora_model.__init__

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        _replace()
        original(self, *args, **kwargs)

    lora_model.__init__ = init


def _replace() -> None:
    try:
        conversion = importlib.import_module(_MODULE)
    except ImportError:  # a PEFT without this translation, or a Transformers too old for it
        return
    for name, unchanged in (
        ("convert_peft_config_for_transformers", _no_config),
        ("convert_peft_adapter_state_dict_for_transformers", _same_tensors),
    ):
        original = getattr(conversion, name, None)
        if original is not None and not hasattr(original, "__wrapped__"):
            setattr(conversion, name, _unless_expanded(original, unchanged))


def _unless_expanded(original: Callable[..., Any], unchanged: Callable[..., Any]) -> Any:
    @functools.wraps(original)
    def convert(*args: Any, **kwargs: Any) -> Any:
        model = kwargs.get("model") or next(a for a in args if hasattr(a, "modules"))
        expanded = any(isinstance(module, Experts) for module in model.modules())
        return (unchanged if expanded else original)(*args, **kwargs)

    return convert


def _no_config(*args: Any, **kwargs: Any) -> None:
    return None


def _same_tensors(
    model: Any, peft_config: Any, adapter_state_dict: Any, *args: Any, **kwargs: Any
) -> Any:
    return adapter_state_dict
