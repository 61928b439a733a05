"""Which linear layers are quantized, and how: defaults, skips and per-module overrides."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from torch import nn

from squeezellm_hf.methods.squeezellm import SqueezeLLMParameters
from squeezellm_hf.pipeline.linears import is_linear

Plan = dict[str, SqueezeLLMParameters]

REGEX = "re:"


def matches(pattern: str, name: str) -> bool:
    """Whether a module's dotted name fits a pattern.

    ``"re:<expression>"`` is matched from the beginning of the name, as ``re.match`` does; any
    other pattern names whole components: ``"mlp"``, ``"layers.0"`` and ``"lm_head"`` fit
    ``"model.layers.0.mlp.up_proj"``, ..., wherever these components stand in the name.
    """
    if pattern.startswith(REGEX):
        return re.match(pattern[len(REGEX) :], name) is not None
    return f".{pattern}." in f".{name}."


def check_patterns(argument: str, patterns: Iterable[Any]) -> None:
    """Raise ValueError, naming ``argument``, for a pattern that is no string or no expression."""
    for pattern in patterns:
        if not isinstance(pattern, str) or not pattern:
            raise ValueError(f"{argument}: a pattern must be a non-empty string, got {pattern!r}")
        if pattern.startswith(REGEX):
            try:
                re.compile(pattern[len(REGEX) :])
            except re.error as error:
                raise ValueError(
                    f"{argument}: {pattern!r} is not a regular expression: {error}"
                ) from error


def check_overrides(overrides: Mapping[str, Any], defaults: SqueezeLLMParameters) -> None:
    """Raise ValueError unless every override names known options with allowed values."""
    if not isinstance(overrides, Mapping):
        raise ValueError(
            'overrides must be a mapping like {"re:.*down_proj": {"bits": 4}}, '
            f"got {overrides!r}"
        )
    check_patterns("overrides", overrides)
    allowed = [field.name for field in fields(SqueezeLLMParameters)]
    for pattern, options in overrides.items():
        if not isinstance(options, Mapping):
            raise ValueError(
                f'overrides[{pattern!r}] must be a mapping like {{"bits": 4}}, got {options!r}'
            )
        if "skip" in options:
            if len(options) > 1 or options["skip"] is not True:
                raise ValueError(
                    f'overrides[{pattern!r}]: skip must stand alone, as {{"skip": True}}, '
                    f"got {dict(options)!r}"
                )
            continue
        unknown = sorted(set(options) - set(allowed))
        if unknown:
            raise ValueError(
                f"overrides[{pattern!r}] has the unknown option {unknown[0]!r}; "
                f"allowed are {', '.join(allowed)} or skip"
            )
        try:
            replace(defaults, **options)
        except ValueError as error:
            raise ValueError(f"overrides[{pattern!r}]: {error}") from error


def make_plan(
    model: nn.Module,
    defaults: SqueezeLLMParameters,
    *,
    skip: Sequence[str] = (),
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
) -> Plan:
    """Choose the parameters of every linear layer of ``model`` that is to be quantized.

    Args:
        model: may lie on the meta device.
        defaults: the parameters of a layer that no override fits.
        skip: patterns (see :func:`matches`) of modules that stay as they are.
        overrides: parameters that differ, by pattern, or ``{"skip": True}``; the first pattern
            that fits a name counts.

    Returns:
        The parameters by dotted module name, in the order of the model.

    Raises:
        ValueError: if nothing is left to quantize, or an override fits no linear layer.
    """
    overrides = overrides or {}
    linears = [name for name, module in model.named_modules() if is_linear(module)]
    for pattern in overrides:
        if not any(matches(pattern, name) for name in linears):
            raise ValueError(
                f"overrides[{pattern!r}] fits no linear layer of {type(model).__name__}; "
                f"its linear layers are named like {', '.join(linears[:4]) or '(none)'}"
            )
    plan: Plan = {}
    for name in linears:
        if any(matches(pattern, name) for pattern in skip):
            continue
        options = next((o for pattern, o in overrides.items() if matches(pattern, name)), {})
        if not options.get("skip"):
            plan[name] = replace(defaults, **options)
    if not plan:
        raise ValueError(
            f"{type(model).__name__} has nothing to quantize: of its {len(linears)} linear layers "
            f"all are skipped (modules_to_not_convert: {sorted(skip)})"
            if linears
            else f"{type(model).__name__} has nothing to quantize: it has no nn.Linear layer"
        )
    return plan


def overridden(plan: Plan, overrides: Mapping[str, Any] | None) -> dict[str, frozenset[str]]:
    """By name, the options of each layer of a plan that an override sets."""
    return {
        name: next(
            (frozenset(o) for pattern, o in (overrides or {}).items() if matches(pattern, name)),
            frozenset(),
        )
        for name in plan
    }


def check_calibration(plan: Plan, has_data: bool) -> None:
    """Raise ValueError, naming the layer, if a codebook needs Hessians and there is no data."""
    for name, parameters in plan.items():
        if parameters.hessian_groups is not None and not has_data:
            raise ValueError(
                f"codebook={parameters.codebook!r} of {name} needs calibration data and there is "
                "none (dataset=None); give a dataset, or choose codebook='kmeans'"
            )
