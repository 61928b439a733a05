"""Which modules of a Transformers model stay as they are, if nobody says otherwise.

1. The output head (unless ``quantize_lm_head``), and any other layer whose weight is tied.
2. Task heads: what is outside of ``model.base_model`` (classifiers, the transform before BERT's
   masked-LM head).
3. Of models that do more than read text (their config has a text part), everything that does not
   belong to the text part: towers for images and sound, and the projectors between.
4. What the model wants in fp32: always (``_keep_in_fp32_modules_strict``), or where it is fp16
   (``_keep_in_fp32_modules``: T5's ``wo`` overflows there, and only there).

A pattern with a "!" in ``modules_to_not_convert`` takes modules out of 2, 3 and 4.
"""

import re
from collections.abc import Iterable
from typing import Any

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
    default = {
        name
        for name in linears
        if not any(matches(pattern, name) for pattern in excepted)
        and (
            _is_task_head(model, name)
            or not _is_text(model, name)
            or any(matches(pattern, name) for pattern in _kept_in_fp32(model))
        )
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


def _is_task_head(model: Any, name: str) -> bool:
    base = model.base_model
    if base is model:
        return False
    prefix = next(name for name, module in model.named_modules() if module is base)
    return not f"{name}.".startswith(f"{prefix}.")


def _is_text(model: Any, name: str) -> bool:
    """Whether the innermost part of the model that has a config of its own is one for text."""
    # Later than this module: transformers is not yet complete when it meets us (autoload.py).
    from transformers import PreTrainedModel

    enclosing, module = [model], model
    for child in name.split(".")[:-1]:
        module = getattr(module, child)
        if isinstance(module, PreTrainedModel):
            enclosing.append(module)
    parts = [part for outer in enclosing for part in text_configs(outer)]
    if not parts:
        return True
    inner = enclosing[-1]
    # Not by identity: some models copy the config of a part.
    return not text_configs(inner) and any(type(inner.config) is type(part) for part in parts)


def _kept_in_fp32(model: Any) -> list[str]:
    patterns = set(getattr(model, "_keep_in_fp32_modules_strict", None) or [])
    if model.dtype == torch.float16:
        patterns |= set(getattr(model, "_keep_in_fp32_modules", None) or [])
    return [pattern.removesuffix(".weight") for pattern in patterns]


def _tied(model: Any) -> dict[str, str]:
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def _prefixes(names: Iterable[str], linears: list[str]) -> list[str]:
    """Patterns of layers, by the outermost modules that hold no other layers."""
    chosen, found = set(names), set()
    for name in chosen:
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            prefix = ".".join(parts[:depth])
            if all(other in chosen for other in linears if f"{other}.".startswith(f"{prefix}.")):
                # A pattern may stand anywhere in a name: this one must not fit others.
                is_exact = all(n in chosen for n in linears if matches(prefix, n))
                found.add(prefix if is_exact else rf"re:{re.escape(prefix)}(\.|$)")
                break
    return sorted(found)
