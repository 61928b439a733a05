"""What a bit budget chose, as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from squeezellm_hf.evaluation.footprint import LayerFootprint, ModelFootprint
from squeezellm_hf.evaluation.report import Column, decimals, percent

ALLOCATION_COLUMNS = (
    Column("kind", "layers"),
    Column("count", "number"),
    Column("widths", "bits x layers"),
    Column("sparse_fraction", "sparse", percent(3)),
    Column("bits_per_weight", "bits/weight", decimals(3)),
)


def allocation_rows(size: ModelFootprint) -> list[dict[str, Any]]:
    """A row for each kind of layer, by the last part of its name, and one for all of them."""
    kinds: dict[str, list[LayerFootprint]] = {}
    for layer in size.layers:
        kinds.setdefault(layer.name.rpartition(".")[2], []).append(layer)
    return [
        *(_row(kind, tuple(layers)) for kind, layers in kinds.items()),
        _row("all", size.layers),
    ]


def allocation_summary(budget: Mapping[str, float | None]) -> str:
    """In words, what `quantization_config.budget` of a checkpoint records."""
    lines = [
        f"Divergence from the original, nats a token: {budget['predicted_kl']:.4g} predicted"
        + (f", {budget['measured_kl']:.4g} measured" if budget["measured_kl"] is not None else "")
    ]
    if budget["gap"]:
        lines.append(f"a better allocation could save at most {100 * budget['gap']:.2g} %")
    else:
        lines.append("no allocation is predicted to be better")
    scale = f"measured {budget['scale']:.2f} times as predicted in {budget['probes']} layers"
    if budget["correlation"] is not None:
        scale += f", correlation {budget['correlation']:.2f}"
    return "; ".join([*lines, scale])


def _row(kind: str, layers: tuple[LayerFootprint, ...]) -> dict[str, Any]:
    part = ModelFootprint(layers, {})
    widths = Counter(layer.bits for layer in layers)
    return {
        "kind": kind,
        "count": len(layers),
        "widths": ", ".join(f"{bits} x {widths[bits]}" for bits in sorted(widths)),
        "sparse_fraction": part.sparse_fraction,
        "bits_per_weight": part.bits_per_weight,
    }
