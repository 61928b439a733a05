"""SqueezeLLM's dense-and-sparse quantization for Hugging Face Transformers.

    from transformers import AutoModelForCausalLM
    from squeezellm_hf import SqueezeLLMConfig

    model = AutoModelForCausalLM.from_pretrained(
        "HuggingFaceTB/SmolLM2-135M-Instruct", quantization_config=SqueezeLLMConfig(bits=3)
    )
    model.save_pretrained("SmolLM2-135M-Instruct-SqueezeLLM-3bit")

Importing this package is cheap: names are imported when first used.
"""

import importlib
from typing import Any

from squeezellm_hf.integration import autoload

_HOMES = {
    "DistillationSettings": "squeezellm_hf.distillation.settings",
    "SqueezeLLMConfig": "squeezellm_hf.integration.config",
    "SqueezeLLMHfQuantizer": "squeezellm_hf.integration.quantizer",
    "SqueezeLLMLinear": "squeezellm_hf.nn",
    "distill": "squeezellm_hf.integration.distill",
    "lut_dequantize": "squeezellm_hf.ops",
    "lut_linear": "squeezellm_hf.ops",
    "quantize_model": "squeezellm_hf.integration.in_memory",
}

__all__ = ["__version__", *_HOMES]

autoload.install()


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("squeezellm-hf")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
