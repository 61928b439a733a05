"""The model that a ``.pt`` file is for, and where each of its tensors comes from."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from squeezellm_hf.integration.base_tensors import read_base_tensors
from squeezellm_hf.integration.legacy_file import LegacyFile

# Names (several for a tied tensor) and the tensor, None where the file lacks it.
Tensors = list[tuple[list[str], Tensor | None]]


def config_source(checkpoint: Path, base_model: str | None) -> str:
    """Where config.json and the tokenizer come from: the folder of the file, or the base model."""
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    if (folder / "config.json").is_file():
        return str(folder)
    if base_model is None:
        raise ValueError(
            f"there is no config.json in {str(folder)!r}: the base model must be named "
            "(base_model=, --base-model), which also has the tensors that the file may lack"
        )
    return base_model


def skeleton(file: LegacyFile, base_model: str | None, options: Mapping[str, Any]) -> Any:
    """The model on the meta device, as config.json says.

    Raises:
        ValueError: if there is no config.json, or it is that of a quantized model.
    """
    source = config_source(file.path, base_model)
    hub = {key: value for key, value in options.items() if key != "trust_remote_code"}
    if source != base_model:
        hub.pop("revision", None)  # that of the base model
    trust = options.get("trust_remote_code", False)
    config = AutoConfig.from_pretrained(source, trust_remote_code=trust, **hub)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{source!r} is quantized itself; name the model that was quantized")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
    # Transformers leaves this empty, and with it the base model of the card.
    model.config.name_or_path = base_model or config.name_or_path
    with contextlib.suppress(OSError):  # many have none; the one made from the config stays
        model.generation_config = GenerationConfig.from_pretrained(source, **hub)
    return model


def quantized_linears(model: Any, file: LegacyFile) -> dict[str, nn.Linear]:
    """The linear layers that the file has quantized, by name, in the model's order.

    Raises:
        ValueError: naming the tensor, if the model has no such linear layer.
    """
    modules = dict(model.named_modules())
    for name in file.layers:
        if not isinstance(modules.get(name), nn.Linear):
            kind = type(modules[name]).__name__ if name in modules else "nothing"
            raise ValueError(
                f"{name}.qweight is in {file.path.name}, but {name} in {type(model).__name__} is "
                f"{kind}, not a linear layer"
            )
    return {name: modules[name] for name in modules if name in file.layers}


def other_tensors(model: Any, file: LegacyFile, linears: Mapping[str, nn.Linear]) -> Tensors:
    """All other tensors of the model, those that the file lacks as None.

    Raises:
        ValueError: naming the tensor, if it is none of the model's, has another shape than
            config.json says, or differs from one that it is tied to.
    """
    groups: dict[int, list[str]] = {}
    expected = model.state_dict(keep_vars=True)
    for key, tensor in expected.items():
        if key.rpartition(".")[0] not in linears:
            groups.setdefault(id(tensor), []).append(key)
    known = {key for names in groups.values() for key in names}
    for key, tensor in file.others.items():
        if key not in known:
            raise ValueError(
                f"{key} in {file.path.name} is unexpected: {type(model).__name__} has no such "
                "tensor beside the quantized layers"
            )
        _check(key, tensor, expected[key], file.path.name)
    result: Tensors = []
    for names in groups.values():
        found = [key for key in names if key in file.others]
        for key in found[1:]:
            if not file.others[key].equal(file.others[found[0]]):
                raise ValueError(f"{key} must be equal to {found[0]}, to which config.json ties it")
        result.append((names, file.others[found[0]] if found else None))
    return result


def _check(key: str, tensor: Tensor, expected: Tensor, source: str) -> None:
    if tensor.shape != expected.shape or (
        tensor.is_floating_point() != expected.is_floating_point()
    ):
        kind = "floating-point" if expected.is_floating_point() else str(expected.dtype)
        raise ValueError(
            f"{key} in {source} must be {kind} {list(expected.shape)} as config.json says, "
            f"got {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        )


def fill_from_base(
    model: Any,
    rest: Tensors,
    base_model: str | None,
    linears: Mapping[str, nn.Linear],
    options: Mapping[str, Any],
) -> tuple[str, ...]:
    """Fill in, in place, what the file lacks.

    A linear layer of the blocks must be in the file: a gap there is a damaged file.

    Returns:
        The names of the tensors that were read from the base model.

    Raises:
        ValueError: naming the tensor, if there is no base model or it does not have it.
    """
    missing = [names for names, tensor in rest if tensor is None]
    if not missing:
        return ()
    head = model.get_output_embeddings()
    for names in missing:
        module = model.get_submodule(names[0].rpartition(".")[0])
        if isinstance(module, nn.Linear) and module is not head:
            raise ValueError(
                f"{names[0]} is missing: the file has neither the quantized nor the plain weights "
                "of this linear layer"
            )
    if base_model is None:
        raise ValueError(
            f"{missing[0][0]} is missing ({len(missing)} tensors are): name the base model "
            "(base_model=, --base-model), from which they are read"
        )
    wanted = [key for names in missing for key in names]
    found = read_base_tensors(base_model, wanted, linears, **options)
    expected = model.state_dict(keep_vars=True)
    for place, (names, tensor) in enumerate(rest):
        if tensor is not None:
            continue
        key = next((key for key in names if key in found), None)
        if key is None:
            raise ValueError(f"{names[0]} is missing from the file and from {base_model!r}")
        _check(key, found[key], expected[key], base_model)
        rest[place] = (names, found[key])
    return tuple(names[0] for names in missing)
