"""Sizes of a checkpoint's tensors, from the headers of its safetensors files alone."""

from __future__ import annotations

import copy
import json
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from squeezellm_hf.evaluation.footprint import TensorSize

_INDEX = "model.safetensors.index.json"
_BITS = {"BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F4": 4}


def checkpoint_sizes(
    model: str | Path, *, revision: str | None = None, token: str | None = None
) -> dict[str, TensorSize]:
    """Read names, shapes and bytes of all tensors of a checkpoint, without their values.

    Args:
        model: Folder of a checkpoint, or id of a Hub repository (some kilobytes are downloaded).
        revision: Branch, tag or commit of a Hub repository.
        token: Access token for a private repository.

    Raises:
        ValueError: A file is no safetensors file, or is cut off.
        OSError: There is no such folder or repository, or it has no safetensors files.
    """
    folder = Path(model)
    if not folder.is_dir():
        return _hub_sizes(str(model), revision, token)
    sizes: dict[str, TensorSize] = {}
    for path in _files(folder):
        try:
            with safe_open(path, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (it is no dict)
                    part = tensors.get_slice(name)
                    sizes[name] = _size(part.get_shape(), part.get_dtype())
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    return sizes


def _files(folder: Path) -> list[Path]:
    index = folder / _INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{index} is not an index of safetensors files: {error}") from error
        # The index is a stranger's: it may not lead out of the folder.
        files = [folder / Path(name).name for name in names]
    else:
        files = sorted(folder.glob("*.safetensors"))
    missing = [path.name for path in files if not path.is_file()]
    if missing or not files:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing) or 'safetensors files'}")
    return files


def _hub_sizes(model: str, revision: str | None, token: str | None) -> dict[str, TensorSize]:
    from huggingface_hub import get_safetensors_metadata
    from huggingface_hub.errors import NotASafetensorsRepoError

    try:
        metadata = get_safetensors_metadata(model, revision=revision, token=token)
    except NotASafetensorsRepoError as error:
        raise FileNotFoundError(f"{model} has no safetensors files") from error
    return {
        name: _size(tensor.shape, tensor.dtype)
        for file in metadata.files_metadata.values()
        for name, tensor in file.tensors.items()
    }


def _size(shape: list[int], dtype: str) -> TensorSize:
    digits = "".join(filter(str.isdigit, dtype))
    bits = _BITS[dtype] if dtype in _BITS else int(digits)
    return TensorSize(tuple(shape), (prod(shape) * bits + 7) // 8)


def linear_sizes(config: Any, *, trust_remote_code: bool = False) -> dict[str, int]:
    """Input sizes of all linear layers of a model, by name, from its config alone.

    Args:
        config: of the model.
        trust_remote_code: whether Python code that comes with the model may run.

    Returns:
        `in_features` by module name; empty for an architecture that transformers does not know.
    """
    from transformers import AutoModelForCausalLM

    from squeezellm_hf.integration.expand import expand

    plain = copy.deepcopy(config)
    # Nothing is loaded, so that nothing may be quantized either.
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(plain, trust_remote_code=trust_remote_code)
            expand(model)
    except (ValueError, ImportError):
        return {}
    return {
        name: module.in_features
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
