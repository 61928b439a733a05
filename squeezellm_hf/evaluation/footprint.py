"""Bits per weight and bytes of a quantized model, counted honestly.

A quantized weight matrix [out, in] costs, in bits per weight,

    bits + v * 2^bits / in + (16 + v) * nnz / (out * in) + 32 / in

for indices, lookup tables, sparse values (a 16-bit column and a value) and row pointers; v is 16,
or 32 where tables and values are fp32.
`bits_per_weight` is what the tensors truly take, `nominal_bits_per_weight` is that sum; they differ
where rows are padded to whole words, or columns need 32 bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import nn

from squeezellm_hf.nn import SqueezeLLMLinear

_COLUMN_BITS = 16
_ROW_POINTER_BITS = 32
_WORD_BITS = 32


@dataclass(frozen=True)
class TensorSize:
    """Shape and bytes of a tensor, which are known without its values."""

    shape: tuple[int, ...]
    n_bytes: int


@dataclass(frozen=True)
class LayerFootprint:
    """What one quantized linear layer takes, in bytes, its bias left out."""

    name: str
    out_features: int
    in_features: int
    bits: int
    nnz: int
    index_bytes: int
    table_bytes: int
    sparse_bytes: int
    row_pointer_bytes: int

    @property
    def n_weights(self) -> int:
        """Weights of the matrix."""
        return self.out_features * self.in_features

    @property
    def n_bytes(self) -> int:
        """Bytes that stand for the weights."""
        return self.index_bytes + self.table_bytes + self.sparse_bytes + self.row_pointer_bytes

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight as stored."""
        return 8 * self.n_bytes / self.n_weights

    @property
    def nominal_bits_per_weight(self) -> float:
        """Bits per weight by the formula of this file."""
        value_bits = 8 * self.table_bytes // (self.out_features * 2**self.bits)
        overhead = value_bits * 2**self.bits
        if self.nnz:
            overhead += _ROW_POINTER_BITS
        sparse_bits = (_COLUMN_BITS + value_bits) * self.nnz / self.n_weights
        return self.bits + overhead / self.in_features + sparse_bits

    @property
    def sparse_fraction(self) -> float:
        """Share of the weights that are kept sparse."""
        return self.nnz / self.n_weights


@dataclass(frozen=True)
class ModelFootprint:
    """What a model takes: its quantized layers, and all other tensors by name."""

    layers: tuple[LayerFootprint, ...]
    others: Mapping[str, TensorSize]

    @property
    def n_quantized_weights(self) -> int:
        """Weights of all quantized layers."""
        return sum(layer.n_weights for layer in self.layers)

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight as stored, over all quantized weights; NaN if there are none."""
        quantized_bytes = sum(layer.n_bytes for layer in self.layers)
        return 8 * quantized_bytes / self.n_quantized_weights if self.layers else float("nan")

    @property
    def nominal_bits_per_weight(self) -> float:
        """Bits per weight by the formula of this file, over all quantized weights, or NaN."""
        if not self.layers:
            return float("nan")
        bits = sum(layer.nominal_bits_per_weight * layer.n_weights for layer in self.layers)
        return bits / self.n_quantized_weights

    @property
    def sparse_fraction(self) -> float:
        """Share of the quantized weights that are kept sparse."""
        nnz = sum(layer.nnz for layer in self.layers)
        return nnz / self.n_quantized_weights if self.layers else 0.0

    @property
    def other_bytes(self) -> int:
        """Bytes of embeddings, norms, biases and whatever else is not quantized."""
        return sum(size.n_bytes for size in self.others.values())

    @property
    def n_bytes(self) -> int:
        """Bytes of the whole model."""
        return sum(layer.n_bytes for layer in self.layers) + self.other_bytes


def model_footprint(model: nn.Module) -> ModelFootprint:
    """Count a model in memory. Tied parameters count once."""
    in_features = {
        name: module.in_features
        for name, module in model.named_modules()
        if isinstance(module, SqueezeLLMLinear)
    }
    tensors: Iterable[tuple[str, Any]] = [*model.named_parameters(), *model.named_buffers()]
    return footprint(
        {name: TensorSize(tuple(t.shape), t.numel() * t.element_size()) for name, t in tensors},
        in_features,
    )


def footprint(
    sizes: Mapping[str, TensorSize], in_features: Mapping[str, int] | None = None
) -> ModelFootprint:
    """Count a model by the sizes of its tensors, as a checkpoint's header tells them.

    Args:
        sizes: Sizes of all tensors by name.
        in_features: Input sizes of quantized layers by name. Those not given are taken from the
            words of a row, words * 32 / bits: exact for multiples of 32.

    Raises:
        ValueError: A quantized layer lacks a tensor, or one has an impossible shape.
    """
    others = dict(sizes)
    layers = []
    for name in sizes:
        prefix, _, last = name.rpartition(".")
        if last == "qweight" and f"{prefix}.lookup_table" in sizes:
            layer = _layer(prefix, others, (in_features or {}).get(prefix))
            layers.append(layer)
    return ModelFootprint(tuple(layers), others)


def _layer(name: str, sizes: dict[str, TensorSize], in_features: int | None) -> LayerFootprint:
    """Take the tensors of a layer out of `sizes`."""
    qweight = sizes.pop(f"{name}.qweight")
    table = sizes.pop(f"{name}.lookup_table")
    sparse = {
        part: sizes.pop(f"{name}.{part}")
        for part in ("crow_indices", "col_indices", "values")
        if f"{name}.{part}" in sizes
    }
    if len(sparse) not in (0, 3):
        raise ValueError(f"{name}: of the sparse tensors there is only {', '.join(sparse)}")
    if len(qweight.shape) != 2 or len(table.shape) != 2 or not prod(qweight.shape):
        raise ValueError(
            f"{name}: qweight {list(qweight.shape)} and lookup_table {list(table.shape)} must be "
            "[out, words] and [out, 2^bits]"
        )
    bits = table.shape[1].bit_length() - 1
    if table.shape[1] != 2**bits or not 1 <= bits <= 8 or table.shape[0] != qweight.shape[0]:
        raise ValueError(
            f"{name}.lookup_table has the shape {list(table.shape)}; allowed is "
            f"[{qweight.shape[0]}, 2^bits] with bits 1 to 8"
        )
    empty = TensorSize((0,), 0)
    return LayerFootprint(
        name=name,
        out_features=qweight.shape[0],
        in_features=in_features or qweight.shape[1] * _WORD_BITS // bits,
        bits=bits,
        nnz=prod(sparse.get("values", empty).shape),
        index_bytes=qweight.n_bytes,
        table_bytes=table.n_bytes,
        sparse_bytes=sparse.get("values", empty).n_bytes + sparse.get("col_indices", empty).n_bytes,
        row_pointer_bytes=sparse.get("crow_indices", empty).n_bytes,
    )
