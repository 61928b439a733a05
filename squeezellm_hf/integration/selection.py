"""Which modules of a Transformers model stay as they are, if nobody says otherwise.

1. The output head (unless ``quantize_lm_head``), and any other layer whose weight is tied.
2. Task heads: what is outside of ``model.base_model``, or of that of a part of the model
   (classifiers, the transform before BERT's masked-LM head).
3. Of models that do more than read text (their config has a text part), everything that does not
   belong to the text part: towers for images and sound, and the projectors between.
4. What the model wants in fp32: always (``_keep_in_fp32_modules_strict``), or where it is fp16
   (``_keep_in_fp32_modules``: T5's ``wo`` overflows there, and only there).

A pattern with a "!" in ``modules_to_not_convert`` takes modules out of 2, 3 and 4.
"""

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from squeezellm_hf.integration.config import SqueezeLLMConfig
from squeezellm_hf.pipeline.linears import is_linear
from squeezellm_hf.pipeline.plan import matches

EXCEPT = "!"
# Where the config of a model that does more than read text keeps that of a part that does.
_TEXT_CONFIGS = ("text_config", "text_encoder", "decoder", "generator")


def modules_to_skip(model: Any, config: SqueezeLLMConfig) -> list[str]:
    """Patterns of the modules that are not quantized: those above, and the user's.

    Args:
        model: a ``PreTrainedModel``, may be on meta.
        config: its ``modules_to_not_convert`` and ``quantize_lm_head`` count.

    Raises:
        ValueError: if ``quantize_lm_head`` is asked of a model that has no linear output head.
    """
    given = list(config.modules_to_not_convert or [])
    excepted = [pattern.removeprefix(EXCEPT) for pattern in given if pattern.startswith(EXCEPT)]
    linears = [name for name, module in model.named_modules() if is_linear(module)]
    parts, in_fp32 = _parts(model), _kept_in_fp32(model)

    def is_skipped(name: str) -> bool:
        around = [part for part in parts if _is_below(name, part.name)]
        return (
            _is_task_head(name, around)
            or not _is_text(around)
            or any(matches(pattern, name) for pattern in in_fp32)
        )

    default = {
        name
        for name in linears
        if not any(matches(pattern, name) for pattern in excepted) and is_skipped(name)
    }
    head = head_name(model)
    tied = {key.rpartition(".")[0] for pair in _tied(model).items() for key in pair}
    fixed = {name for name in linears if name in tied or name == head}
    if config.quantize_lm_head:
        if head is None or head not in linears:
            raise ValueError(
                f"quantize_lm_head=True: {type(model).__name__} has no linear output head"
            )
        fixed.discard(head)
        default.discard(head)
    return [*_prefixes(default | fixed, linears), *(p for p in given if p[:1] != EXCEPT)]


def head_name(model: Any) -> str | None:
    """The dotted name of the output head, or None without one."""
    head = model.get_output_embeddings()
    if head is None:
        return None
    return next((name for name, module in model.named_modules() if module is head), None)


def text_configs(model: Any) -> list[Any]:
    """The parts of a model's config that read or write text; empty if that is all it does."""
    if not getattr(model.config, "sub_configs", None):
        return []
    # The encoder of an encoder-decoder model may be one of images or sound.
    names = (*_TEXT_CONFIGS, *(["encoder"] if model.main_input_name == "input_ids" else []))
    parts = [getattr(model.config, name, None) for name in names]
    return [part for part in parts if part is not None and hasattr(part, "to_dict")]


def _other_configs(model: Any) -> list[Any]:
    """What else is in the config of a model that reads text itself: GIT's vision_config."""
    if model.main_input_name != "input_ids":
        return []
    names = set(getattr(model.config, "sub_configs", None) or {}) - {*_TEXT_CONFIGS, "encoder"}
    return [getattr(model.config, name, None) for name in names]


def _is_task_head(name: str, parts: list["_Part"]) -> bool:
    return any(not _is_below(name, part.base) for part in parts)


def _is_text(parts: list["_Part"]) -> bool:
    """Whether the innermost of the parts around a layer is one for text."""
    configs = [config for part in parts for config in text_configs(part.model)]
    inner = parts[-1].model
    if not configs:
        others = [config for part in parts for config in _other_configs(part.model)]
        return not any(type(inner.config) is type(c) for c in others)
    # Not by identity: some models copy the config of a part.
    return not text_configs(inner) and any(type(inner.config) is type(c) for c in configs)


class _Part(NamedTuple):
    """A part of a model with a config of its own: its name, and that of its base model."""

    model: Any
    name: str
    base: str


def _parts(model: Any) -> list[_Part]:
    """The model itself, and those below it, from the outside to the inside."""
    # Later than this module: transformers is not yet complete when it meets us (autoload.py).
    from transformers import PreTrainedModel

    names = {module: name for name, module in model.named_modules()}
    return [
        _Part(module, name, names.get(module.base_model, name))
        for module, name in names.items()
        if isinstance(module, PreTrainedModel)
    ]


def _is_below(name: str, prefix: str) -> bool:
    return not prefix or f"{name}.".startswith(f"{prefix}.")


def _kept_in_fp32(model: Any) -> list[str]:
    patterns = set(getattr(model, "_keep_in_fp32_modules_strict", None) or [])
    if model.dtype == torch.float16:
        patterns |= set(getattr(model, "_keep_in_fp32_modules", None) or [])
    return [pattern.removesuffix(".weight") for pattern in patterns]


def _tied(model: Any) -> dict[str, str]:
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def _prefixes(names: Iterable[str], linears: list[str]) -> list[str]:
    """Patterns of layers, by the outermost modules that hold no other layers."""
    chosen = set(names)
    others = {prefix for name in linears if name not in chosen for prefix in _ancestry(name)}
    found = {next(prefix for prefix in _ancestry(name) if prefix not in others) for name in chosen}
    # A pattern may stand anywhere in a name: it must not fit others.
    return sorted(
        prefix
        if all(name in chosen for name in linears if matches(prefix, name))
        else rf"re:{re.escape(prefix)}(\.|$)"
        for prefix in found
    )


def _ancestry(name: str) -> list[str]:
    """Of "a.b.c" all of "a", "a.b", "a.b.c"."""
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]
