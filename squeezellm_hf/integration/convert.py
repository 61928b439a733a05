"""Turn a checkpoint of the public SqueezeLLM code into one of ours, layer by layer."""

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from squeezellm_hf.formats.legacy import LegacyLayer, check_layer
from squeezellm_hf.integration.config import SqueezeLLMConfig
from squeezellm_hf.integration.in_memory import mark_quantized
from squeezellm_hf.integration.legacy_file import LegacyFile, read_legacy
from squeezellm_hf.integration.legacy_model import (
    fill_from_base,
    other_tensors,
    quantized_linears,
    skeleton,
)
from squeezellm_hf.integration.record import hub_id, record_layers
from squeezellm_hf.methods.squeezellm.transcode import Transcoded, transcode
from squeezellm_hf.nn import SqueezeLLMLinear

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Conversion:
    """What became of a checkpoint.

    Attributes:
        model: the quantized model; its tensors lie in files that are gone after the conversion
            where the operating system allows it, so load the saved one to use it.
        errors: for each layer that is not exact the greatest difference of a weight.
        from_base: the tensors that were read from the base model.
    """

    model: Any
    errors: dict[str, float]
    from_base: tuple[str, ...]


def convert_checkpoint(
    checkpoint: str | Path,
    out: str | Path,
    *,
    base_model: str | None = None,
    bits: int | None = None,
    dtype: torch.dtype | None = None,
    table_dtype: torch.dtype | None = None,
    max_shard_size: str = "5GB",
    progress: Progress | None = None,
    **options: Any,
) -> Conversion:
    """Convert a ``.pt`` file (see :mod:`squeezellm_hf.formats.legacy`) and save it as ours.

    Each layer in turn is read from the mapped file, checked, written to a temporary file beside
    ``out`` and mapped from there, so that memory holds one layer. On an error ``out`` is as before.

    Args:
        checkpoint: the file, or a folder with it. ``config.json`` is read from the folder if it is
            there, else that of the base model.
        out: folder of the new checkpoint.
        base_model: Hub id or folder of the model that was quantized. What the file lacks
            (embeddings, norms, output head, in some files) is read from it.
        bits: 3 or 4; None: from ``quant_config.json`` beside the file or from the tables.
        dtype: of the tensors that are not quantized; None: as they are stored.
        table_dtype: of lookup tables and sparse values; None: for each layer the first of fp16,
            bf16 and fp32 with which its weights are exact.
        max_shard_size: of a safetensors file.
        progress: called before each layer with its name, its number from 0, and the number of all.
        options: for the Hub: revision (of the base model), token, trust_remote_code.

    Raises:
        ValueError: naming the tensor, if the file is unsound or does not fit the architecture.
        OSError: if a file or the base model cannot be found.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={str(out)!r} is a file; a folder is needed")
    file = read_legacy(Path(checkpoint), bits)
    model = skeleton(file, base_model, options)
    linears = quantized_linears(model, file)
    layers = {name: _checked(file, name, linear) for name, linear in linears.items()}
    rest = other_tensors(model, file, linears)
    from_base = fill_from_base(model, rest, base_model, linears, options)
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}-layers-", dir=out.parent))
    try:
        errors = {}
        for number, (name, layer) in enumerate(layers.items()):
            if progress is not None:
                progress(name, number, len(layers))
            tensors, error = _transcode(layer, name, dtype, table_dtype)
            converted = _mapped(tensors, layer, work / f"{number}.safetensors")
            model.set_submodule(name, converted)
            if error:
                errors[name] = error
        storages: set[int] = set()
        for names, tensor in rest:
            _assign(model, names, _own(_cast(tensor, dtype), storages))
        _record(model, file, list(linears))
        model.save_pretrained(out, max_shard_size=max_shard_size)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return Conversion(model.eval(), errors, from_base)


def _checked(file: LegacyFile, name: str, linear: nn.Linear) -> LegacyLayer:
    """The layer, sound in itself and of the size of ``linear``."""
    layer = check_layer(file.layers[name], prefix=f"{name}.", bits=file.bits)
    shape = [layer.out_features, layer.in_features]
    if shape != list(linear.weight.shape):
        raise ValueError(
            f"{name}.qweight stands for [out_features, in_features]={shape} at {layer.bits} bits; "
            f"config.json says {list(linear.weight.shape)}"
        )
    if (layer.bias is None) != (linear.bias is None):
        found, wanted = ("no", "one") if layer.bias is None else ("one", "none")
        raise ValueError(f"{name}.bias: the file has {found}, config.json says {wanted}")
    return layer


def _transcode(
    layer: LegacyLayer, name: str, dtype: torch.dtype | None, table_dtype: torch.dtype | None
) -> Transcoded:
    cells, sums = layer.sparse_sum()
    result = transcode(
        layer.indices,
        layer.lookup_table,
        cells,
        sums,
        bits=layer.bits,
        in_features=layer.in_features,
        table_dtype=table_dtype,
        name=f"{name}.weight",
    )
    if layer.bias is not None:
        result.tensors["bias"] = _cast(layer.bias, dtype).contiguous()
    return result


def _mapped(tensors: dict[str, Tensor], layer: LegacyLayer, path: Path) -> SqueezeLLMLinear:
    """The converted layer, in a file instead of in memory."""
    save_file(tensors, path)
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in tensors}
    return SqueezeLLMLinear.from_tensors(tensors, bits=layer.bits, in_features=layer.in_features)


def _cast(tensor: Any, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def _own(tensor: Tensor, storages: set[int]) -> Tensor:
    """The tensor, copied if it cannot be saved as it lies, or shares memory with another one."""
    address = tensor.untyped_storage().data_ptr()
    if not tensor.is_contiguous() or address in storages:
        return tensor.clone(memory_format=torch.contiguous_format)
    storages.add(address)
    return tensor


def _assign(model: nn.Module, names: list[str], tensor: Tensor) -> None:
    """Put one tensor into all its places."""
    parameter = nn.Parameter(tensor, requires_grad=False)
    for key in names:
        module, _, leaf = key.rpartition(".")
        owner = model.get_submodule(module)
        if leaf in owner._parameters:
            setattr(owner, leaf, parameter)
        else:
            owner._buffers[leaf] = tensor


def _record(model: Any, file: LegacyFile, names: list[str]) -> None:
    layers = {name: model.get_submodule(name) for name in names}
    weights = sum(layer.in_features * layer.out_features for layer in layers.values())
    config = SqueezeLLMConfig(
        preset="fast",
        bits=max(layer.bits for layer in layers.values()),
        outlier_fraction=min(0.499, sum(layer.nnz for layer in layers.values()) / weights),
        sensitive_fraction=0.0,
        dataset=None,
    )
    config.converted_from = file.path.name
    record_layers(config, layers)
    config.base_model = hub_id(model)
    mark_quantized(model, config)
