"""What config.json says of the quantized layers."""

import importlib.metadata
import os
from collections.abc import Mapping
from typing import Any

from squeezellm_hf.integration.config import SqueezeLLMConfig
from squeezellm_hf.nn import SqueezeLLMLinear

RECORDED_VERSIONS = ("squeezellm-hf", "torch", "transformers")


def record_layers(config: SqueezeLLMConfig, layers: Mapping[str, SqueezeLLMLinear]) -> None:
    """Record in ``config`` what a reload needs of ``layers``, and the versions at work."""
    config.modules = {
        name: {
            "bits": layer.bits,
            "nnz": layer.nnz,
            "table_dtype": str(layer.lookup_table.dtype).removeprefix("torch."),
        }
        for name, layer in layers.items()
    }
    config.versions = {
        package: importlib.metadata.version(package)
        for package in RECORDED_VERSIONS
        if _is_installed(package)
    }


def hub_id(model: Any) -> str | None:
    """The Hub id that the model came from, if it came from the Hub; never a local path."""
    name = str(getattr(model.config, "name_or_path", "") or "")
    is_id = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    return name if is_id and not os.path.exists(name) else None


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
