"""Flags made from the fields of `SqueezeLLMConfig`, which are declared there once."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated, Any

import tyro

from squeezellm_hf.integration.config import SqueezeLLMConfig

_ON_LOADING_ONLY = ("dequantize", "backend")
# Types of what a command line can say of a field that takes objects, too, or that is not given.
_TYPES: dict[str, Any] = {
    "codebook": str | None,
    "distill_steps": int | None,
    "distill_norms": bool | None,
    "distill_values": bool | None,
    "dataset": str | None,
    "distill_dataset": str | None,
    "tokenizer": str | None,
    "overrides": Annotated[str | None, tyro.conf.arg(metavar="JSON")],
}


def _flags() -> type:
    fields = [
        (field.name, _TYPES.get(field.name, field.type), dataclasses.field(default=field.default))
        for field in dataclasses.fields(SqueezeLLMConfig)
        if field.init and field.name not in _ON_LOADING_ONLY
    ]
    flags = dataclasses.make_dataclass("Flags", fields)
    flags.__doc__ = SqueezeLLMConfig.__doc__
    return flags


Flags: Any = _flags()


def config_from(flags: Any, tokenizer: Any = None, **fields: Any) -> SqueezeLLMConfig:
    """Make the config of a run.

    Args:
        flags: A `Flags`.
        tokenizer: Takes the place of the flag's, if given.
        fields: Fields that differ from the flags.

    Raises:
        ValueError: A value is out of range, or `overrides` is no JSON object.
    """
    values = {field.name: getattr(flags, field.name) for field in dataclasses.fields(flags)}
    values.update(fields)
    if values["dataset"] is not None and values["dataset"].lower() == "none":
        values["dataset"] = None
    if values["overrides"] is not None:
        try:
            values["overrides"] = json.loads(values["overrides"])
        except ValueError as error:
            raise ValueError(f"--overrides={values['overrides']!r} is not JSON: {error}") from error
    if tokenizer is not None:
        values["tokenizer"] = tokenizer
    return SqueezeLLMConfig(**values)
