"""Expand a whole model, and fold it again."""

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from squeezellm_hf.integration.expand.conv1d import to_conv1d, to_linear
from squeezellm_hf.integration.expand.experts import ExpandedExperts, layout_of
from squeezellm_hf.nn import Experts

# Of a model: names of the layers that were Conv1D. (Experts know by themselves what they were.)
_CONV1D = "_expanded_conv1d"
_EXPERTS_RULE = re.compile(r"\.experts(\.|$)")
_ROUTER = re.compile(r"router|gate(?!_proj|_up_proj)")


def expand(model: nn.Module, wanted: Callable[[str], bool] = lambda name: True) -> None:
    """Put linear layers in the place of fused experts and of ``Conv1D``.

    The values are unchanged, and memory grows by the largest of these modules at most.

    Args:
        model: changed in place; may lie on meta.
        wanted: which modules, by name. Default: all.
    """
    for name in _names(model):  # not the modules: each is to be freed when it is replaced
        module = model.get_submodule(name)
        if wanted(name) and (expanded := _expanded(module)) is not None:
            model.set_submodule(name, expanded)
            if isinstance(module, Conv1D):
                _conv1d_names(model).add(name)
    if any(isinstance(module, Experts) for module in model.modules()):
        _forget_parallel_plans(model)


def fold(model: nn.Module) -> None:
    """Undo :func:`expand` wherever all linear layers are plain ones."""
    names = _conv1d_names(model)
    for name in _names(model):
        module = model.get_submodule(name)
        if isinstance(module, ExpandedExperts) and module.is_plain:
            model.set_submodule(name, module.fold())
        elif name in names and type(module) is nn.Linear:
            model.set_submodule(name, to_conv1d(module))
            names.discard(name)


@contextmanager
def structure(model: nn.Module) -> Iterator[None]:
    """``model`` as :func:`expand` would leave it, what is expanded being on the meta device.

    Afterwards it is as it was; no weight is copied.
    """
    originals: dict[str, nn.Module] = {}
    try:
        for name, module in list(model.named_modules()):
            if (expanded := _expanded(module, "meta")) is not None:
                originals[name] = module
                model.set_submodule(name, expanded)
        yield
    finally:
        for name, module in originals.items():
            model.set_submodule(name, module)


def routers(model: nn.Module) -> list[str]:
    """Linear layers that choose experts or weigh them: tiny, and every error of theirs counts.

    These are layers beside experts (fused or expanded), with an output an expert or a single one,
    named after a gate or a router.
    """
    found = []
    for name in _names(model):
        module = model.get_submodule(name)
        if not (isinstance(module, Experts) or layout_of(module)):
            continue
        outputs: tuple[int, ...] = (1, module.num_experts)  # type: ignore[assignment]
        path = name.rpartition(".")[0]
        for inner, layer in model.get_submodule(path).named_modules():
            named = any(_ROUTER.search(part) for part in inner.split("."))
            if named and isinstance(layer, nn.Linear) and layer.out_features in outputs:
                found.append(f"{path}.{inner}")
    return found


def warn_of_unknown(model: nn.Module) -> None:
    """Name the experts that no part of this package can expand; they are left unquantized."""
    kinds: dict[str, list[str]] = {}
    for name in _names(model):
        module = model.get_submodule(name)
        if "Expert" in type(module).__name__ and module._parameters and _expanded(module) is None:
            kinds.setdefault(type(module).__name__, []).append(name)
    for kind, names in kinds.items():
        count = sum(p.numel() for n in names for p in model.get_submodule(n).parameters(False))
        warnings.warn(
            f"{kind} ({names[0]}{', ...' if names[1:] else ''}) holds its experts in a layout that "
            f"is not supported: {count / 1e6:.0f}M weights stay as they are",
            stacklevel=2,
        )


def _forget_parallel_plans(model: Any) -> None:
    """Every process of several runs all experts: plans for fused ones would add up their sums."""
    for plans in ("_tp_plan", "_ep_plan"):
        plan = getattr(model, plans, None) or {}
        for rule in [rule for rule in plan if _EXPERTS_RULE.search(rule)]:
            del plan[rule]


def _names(model: nn.Module) -> list[str]:
    """Of all modules but the model and what lies within experts, which come and go with them."""
    names: list[str] = []
    within = None
    for name, module in model.named_modules():
        if not name or (within is not None and name.startswith(within)):
            continue
        names.append(name)
        if isinstance(module, Experts) or layout_of(module) is not None:
            within = f"{name}."
    return names


def _expanded(module: Any, device: str | None = None) -> nn.Module | None:
    if isinstance(module, Conv1D):
        return to_linear(module, device)
    if layout_of(module) is not None:
        return ExpandedExperts(module, device)
    return None


def _conv1d_names(model: nn.Module) -> set[str]:
    names: set[str] = model.__dict__.setdefault(_CONV1D, set())
    return names
