"""The output head, where it is quantized: it needs a weight of its own.

Most models tie their output head to the input embeddings. A quantized head is another matrix: the
two are untied, and stay so when the model is saved and loaded again. For that the config says
``tie_word_embeddings=False``, unless other weights are tied by the same switch (the embeddings of
T5's encoder and decoder); then the record of quantized modules says it to :func:`forget_ties`.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from squeezellm_hf.integration.selection import head_name, text_configs


def untie_head(model: Any) -> None:
    """Give the output head of ``model`` parameters of its own, equal to those it had."""
    name = head_name(model)
    if name is None or not _ties_of(model, [name]):
        return
    head = model.get_submodule(name)
    for key, parameter in head.named_parameters(recurse=False):
        own = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
        setattr(head, key, own)
    forget_ties(model, [name])
    if not model.all_tied_weights_keys:
        for config in (model.config, *text_configs(model)):
            if hasattr(config, "tie_word_embeddings"):
                config.tie_word_embeddings = False


def forget_ties(model: Any, names: Collection[str]) -> None:
    """Make ``model`` forget that weights of the modules ``names`` are tied to others.

    Transformers ties weights again whenever it loads a model or resizes its embeddings.
    """
    gone = _ties_of(model, names)
    if not gone:
        return
    model.all_tied_weights_keys = {
        key: source for key, source in model.all_tied_weights_keys.items() if key not in gone
    }
    for prefix, part in model.named_modules():
        # What the part's class declares: patterns, changed for this instance alone.
        declared = getattr(part, "_tied_weights_keys", None)
        if isinstance(declared, Mapping):
            start = f"{prefix}." if prefix else ""
            part._tied_weights_keys = {
                target: source
                for target, source in declared.items()
                if not any(
                    re.match(re.escape(start) + target, tied_target)
                    and re.match(re.escape(start) + source, tied_source)
                    for tied_target, tied_source in gone.items()
                )
            }


def _ties_of(model: Any, names: Collection[str]) -> dict[str, str]:
    """The tied parameters, target and source, of which one belongs to a module of ``names``."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return {
        key: source
        for key, source in tied.items()
        if any(side.rpartition(".")[0] in names for side in (key, source))
    }
