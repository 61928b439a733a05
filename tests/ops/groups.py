"""Calls of lut_linear_group, and what it refuses, on any device."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

NAMES = ("qweight", "lookup_table", "crow_indices", "col_indices", "values", "bias")
GROUP = torch.ops.squeezellm_hf.lut_linear_group


def arguments(x: Tensor, weights: Sequence[dict[str, Tensor]], bits: int) -> tuple[Any, ...]:
    """Of a call with these weights, without steps."""
    return (x, *([weight.get(name) for weight in weights] for name in NAMES), bits)


def call(x: Tensor, weights: Sequence[dict[str, Tensor]], bits: int, **steps: Any) -> list[Tensor]:
    results: list[Tensor] = GROUP(*arguments(x, weights, bits), **steps)
    return results


def refused_steps(x: Tensor, count: int) -> Iterator[tuple[dict[str, Any], str]]:
    """Steps that do not fit an x of two dimensions and several weights, and what is said."""
    rows, columns = x.shape
    like_x = "must have the dtype of x and the shape"
    other = torch.float16 if x.dtype == torch.float32 else torch.float32
    yield {"norm_weight": x}, rf"norm_weight {like_x} \[{columns}\], got"
    yield {"norm_weight": x[0].to(other)}, f"norm_weight {like_x}"
    yield {"factor": x[0]}, rf"factor {like_x} \[{rows}, {columns}\], got"
    yield {"factor": x, "norm_weight": x[0]}, "norm_weight and factor must not both be given"
    for place in (count, -2):
        yield {"silu": place}, f"silu must be the place of a weight, or -1, got {place}"
    yield {"residual": x}, f"residual is for one weight, got {count}"
