"""Read a ``.pt`` file of the public SqueezeLLM code: tensors alone, mapped, grouped by layer."""

import json
import pickle
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from squeezellm_hf.formats import legacy

QUANT_CONFIG = "quant_config.json"
THRESHOLD = "sparse_threshold."
# What the models of its time saved and today's compute: no part of the weights.
_OBSOLETE = re.compile(r".*\.rotary_emb\.inv_freq")


@dataclass(frozen=True)
class LegacyFile:
    """What a file holds, sorted but not checked.

    Attributes:
        path: of the ``.pt`` file.
        bits: as asked for or as ``quant_config.json`` says; None: the tables tell.
        layers: the tensors of each quantized layer, by module and name.
        others: all other tensors by name.
    """

    path: Path
    bits: int | None
    layers: dict[str, dict[str, Tensor]]
    others: dict[str, Tensor]


def read_legacy(path: Path, bits: int | None = None) -> LegacyFile:
    """Open a checkpoint; its tensors stay on disk until they are used.

    Args:
        path: the file, or a folder with one ``.pt`` file.
        bits: 3 or 4; None: from ``quant_config.json`` beside the file, if it is there.

    Raises:
        ValueError: for a file that is damaged or holds more than tensors and numbers (no code in
            it is run), or entries that contradict each other.
        FileNotFoundError: if there is no such file.
    """
    file = _find(path)
    bits = _bits(file.parent / QUANT_CONFIG, bits)
    layers: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    thresholds: dict[str, Any] = {}
    state = _load(file)
    quantized = {key.rpartition(".")[0] for key in state if key.endswith(".qweight")}
    kinds = set(legacy.NAMES) - {"bias"}
    for key, value in state.items():
        if key.startswith(THRESHOLD):
            thresholds[key.removeprefix(THRESHOLD)] = value
            continue
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta:
            raise ValueError(f"{file.name}: {key} must be a dense tensor, got {_describe(value)}")
        module, _, name = key.rpartition(".")
        if name in kinds or (name == "bias" and module in quantized):
            layers.setdefault(module, {})[name] = value
        elif not _OBSOLETE.fullmatch(key):
            others[key] = value
    if not layers:
        raise ValueError(
            f"{file.name} holds no quantized layer (no tensor named *.qweight among {len(state)})"
        )
    for module, nnz in thresholds.items():
        _check_threshold(module, nnz, layers)
    return LegacyFile(file, bits, layers, others)


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(
            f"there is no file or folder {str(path)!r} (download a Hub repository first: "
            "hf download ID --local-dir FOLDER)"
        )
    found = sorted(path.glob("*.pt"))
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise ValueError(f"{str(path)!r} must hold one .pt file, got {names}; name the file itself")
    return found[0]


def _bits(quant_config: Path, bits: int | None) -> int | None:
    if bits is not None and bits not in legacy.BITS:
        raise ValueError(f"bits must be one of {legacy.BITS}, got {bits!r}")
    if not quant_config.is_file():
        return bits
    try:
        found = json.loads(quant_config.read_text(encoding="utf-8"))["wbits"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{quant_config} must hold {{"wbits": N}}: {error!r}') from error
    if found not in legacy.BITS or isinstance(found, bool):
        raise ValueError(f"wbits in {quant_config} must be one of {legacy.BITS}, got {found!r}")
    if bits is not None and bits != found:
        raise ValueError(f"bits={bits} contradicts {quant_config}, which says wbits={found}")
    return int(found)


def _load(file: Path) -> dict[str, Any]:
    """Unpickle tensors, containers and numbers, and nothing else."""
    # Only the format of torch 1.6 and later (a zip file) can be mapped.
    mapped = zipfile.is_zipfile(file)
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f" ({found[1].rstrip('.')})" if found else ""
        raise ValueError(
            f"{file} is refused: it is no plain state dict, but damaged or a pickle that would run "
            f"code{what}; only tensors, containers and numbers are read"
        ) from error
    except Exception as error:  # torch raises what its readers do: RuntimeError, EOFError, KeyError
        if isinstance(error, (OSError, MemoryError)) and not isinstance(error, EOFError):
            raise
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{file} is damaged or no file of torch.save: {line}") from error
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise ValueError(
            f"{file} must hold a state dict (names to tensors), got {_describe(state)}"
        )
    return state


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of layout {value.layout} on {value.device}"
    return type(value).__name__


def _check_threshold(module: str, nnz: Any, layers: dict[str, dict[str, Tensor]]) -> None:
    name = f"{THRESHOLD}{module}"
    if isinstance(nnz, bool) or not isinstance(nnz, int):
        raise ValueError(f"{name} must be an integer, the nnz of the layer, got {nnz!r}")
    if module not in layers:
        raise ValueError(f"{name} names a layer without any tensor")
    vals = layers[module].get("vals")
    if nnz != (0 if vals is None else vals.numel()):
        raise ValueError(
            f"{name}={nnz} must be the size of {module}.vals, "
            f"got {'no such tensor' if vals is None else list(vals.shape)}"
        )
