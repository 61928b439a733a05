"""Checkpoints of the public SqueezeLLM code, written to the letter of that format in plain loops.

Independent of squeezellm_hf: Python integers for the bits, fp64 lists for the weights.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass
class Layer:
    """A layer to write.

    Attributes:
        indices: [out][in], in is a multiple of 32.
        table: [out][2**bits], in any order.
        csr: for each output channel its (column, value) pairs; None: no CSR tensors.
        full_rows: (output channel, its in values) pairs; None: no such tensors.
        bias: [out], or None.
    """

    bits: int
    indices: list[list[int]]
    table: list[list[float]]
    csr: list[list[tuple[int, float]]] | None = None
    full_rows: list[tuple[int, list[float]]] | None = None
    bias: list[float] | None = None
    startrows: list[int] | None = None

    def weight(self) -> NDArray[np.float64]:
        """[out, in], as the format says what the tensors mean."""
        weight = np.zeros((len(self.indices), len(self.indices[0])))
        for o, row in enumerate(self.indices):
            for i, index in enumerate(row):
                weight[o, i] = self.table[o][index]
            for column, value in self.csr[o] if self.csr is not None else []:
                weight[o, column] += value
        for o, values in self.full_rows or []:
            for i, value in enumerate(values):
                weight[o, i] += value
        return weight

    def tensors(self) -> dict[str, Any]:
        """The tensors by name."""
        columns = [_words(row, self.bits) for row in self.indices]
        words = [[column[w] for column in columns] for w in range(len(columns[0]))]
        tensors = {
            "qweight": torch.tensor(words, dtype=torch.int32),
            "lookup_table": torch.tensor(self.table, dtype=torch.float32),
        }
        if self.bias is not None:
            tensors["bias"] = torch.tensor(self.bias, dtype=torch.float32)
        if self.csr is not None:
            rows, cols, vals = [0], [], []
            for entries in self.csr:
                for column, value in entries:
                    cols.append(column)
                    vals.append(value)
                rows.append(len(cols))
            tensors["rows"] = torch.tensor(rows, dtype=torch.int32)
            tensors["cols"] = torch.tensor(cols, dtype=torch.int32)
            tensors["vals"] = torch.tensor(vals, dtype=torch.float32)
        if self.full_rows is not None:
            inputs = len(self.indices[0])
            by_input = [[values[i] for _, values in self.full_rows] for i in range(inputs)]
            tensors["full_rows"] = torch.tensor(by_input, dtype=torch.float32).view(inputs, -1)
            tensors["full_row_indices"] = torch.tensor(
                [o for o, _ in self.full_rows], dtype=torch.int32
            )
        if self.startrows is not None:
            tensors["startrows"] = torch.tensor(self.startrows, dtype=torch.int32)
        return tensors


def _words(row: list[int], bits: int) -> list[int]:
    """32 indices at a time, lowest bit first, into ``bits`` int32 words."""
    words = []
    for start in range(0, len(row), 32):
        stream = []
        for index in row[start : start + 32]:
            for bit in range(bits):
                stream.append(index >> bit & 1)
        for w in range(bits):
            word = 0
            for place in range(32):
                word += stream[32 * w + place] << place
            words.append(word - 2**32 if word >= 2**31 else word)
    return words


@dataclass
class Checkpoint:
    """A state dict to write.

    Attributes:
        layers: by module name.
        others: all other tensors by name.
    """

    layers: dict[str, Layer] = field(default_factory=dict)
    others: dict[str, Tensor] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        """What ``torch.save`` gets."""
        state: dict[str, Any] = dict(self.others)
        for module, layer in self.layers.items():
            for name, tensor in layer.tensors().items():
                state[f"{module}.{name}"] = tensor
            if layer.csr is not None:
                state[f"sparse_threshold.{module}"] = sum(len(entries) for entries in layer.csr)
        return state

    def save(self, path: Path) -> Path:
        """Write the file."""
        torch.save(self.state_dict(), path)
        return path


def random_layer(
    rng: np.random.Generator,
    out_features: int,
    in_features: int,
    bits: int,
    *,
    sparse: bool = False,
    full_rows: int = 0,
    bias: bool = False,
    half: bool = True,
    scale: float = 0.1,
) -> Layer:
    """A layer of random content; ``half``: all values are fp16 numbers, as of most models.

    Cells of the sparse part and of full rows have a table entry of 0, as the public code leaves
    them: the sum then is the sparse value.
    """

    def values(*shape: int) -> Any:
        drawn = rng.standard_normal(shape) * scale
        return drawn.astype(np.float16 if half else np.float32).astype(np.float64).tolist()

    table = values(out_features, 2**bits)
    zero = rng.integers(0, 2**bits, out_features).tolist()
    for o, row in enumerate(table):
        row[zero[o]] = 0.0
    indices = rng.integers(0, 2**bits, (out_features, in_features)).tolist()
    layer = Layer(bits, indices, table)
    full = rng.choice(out_features, full_rows, replace=False).tolist()
    if full_rows:
        layer.full_rows = [(o, values(in_features)) for o in full]
        layer.startrows = [0, out_features // 2]
        for o in full:
            layer.indices[o] = [zero[o]] * in_features
    if sparse:
        layer.csr = []
        for o in range(out_features):
            columns = (
                [] if o in full or o % 3 == 0 else sorted(set(rng.integers(0, in_features, 3)))
            )
            entries = [(int(c), v) for c, v in zip(columns, values(len(columns)), strict=True)]
            for column, _ in entries:
                layer.indices[o][column] = zero[o]
            layer.csr.append(entries)
    if bias:
        layer.bias = values(out_features)
    return layer
