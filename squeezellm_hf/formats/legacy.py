"""A linear layer as the public SqueezeLLM code (arXiv 2306.07629) saves it in a ``.pt`` file.

    W[o, i] = lookup_table[o, index(o, i)] + CSR[o, i] + sum over j of full_rows[i, j]
                                                         where full_row_indices[j] = o

================== ========================= ======= =============================================
tensor             shape                     dtype
================== ========================= ======= =============================================
qweight            [in / 32 * bits, out]     int32   a column is one output channel's bit stream
lookup_table       [out, 2**bits]            fp32    in any order
bias               [out]                     fp32    optional
rows, cols, vals   [out + 1], [nnz], [nnz]   int32,  CSR; optional, all three or none
                                             int32,
                                             fp32
full_rows          [in, n]                   fp32    optional; whole output channels
full_row_indices   [n]                       int32   with full_rows
startrows          [threads]                 int32   how a kernel splits the CSR; no part of W
================== ========================= ======= =============================================

A column of ``qweight`` is the stream that :mod:`squeezellm_hf.formats.packing` describes: least
significant bit first, 32 indices in ``bits`` words. in_features is a multiple of 32.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from squeezellm_hf.formats import csr, packing

BITS = (3, 4)
REQUIRED = ("qweight", "lookup_table")
CSR_TENSORS = ("rows", "cols", "vals")
FULL_ROW_TENSORS = ("full_rows", "full_row_indices")
NAMES = (*REQUIRED, "bias", *CSR_TENSORS, *FULL_ROW_TENSORS, "startrows")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class SparseSum(NamedTuple):
    """What is added to the dense part, one entry a cell.

    Attributes:
        cells: int64 [nnz], ``row * in_features + column``, ascending.
        sums: fp64 [nnz], not zero.
    """

    cells: Tensor
    sums: Tensor


@dataclass(frozen=True)
class LegacyLayer:
    """The checked tensors of a layer; shapes and dtypes as in the module's table."""

    tensors: Mapping[str, Tensor]
    bits: int
    in_features: int
    out_features: int

    @property
    def lookup_table(self) -> Tensor:
        """fp32 [out_features, 2**bits], in the file's order."""
        return self.tensors["lookup_table"].float()

    @property
    def bias(self) -> Tensor | None:
        """[out_features], or None."""
        return self.tensors.get("bias")

    def indices(self, rows: slice) -> Tensor:
        """The table indices of some output channels, uint8 [rows, in_features]."""
        columns = self.tensors["qweight"][:, rows]
        return packing.unpack(columns.T.contiguous(), self.bits, self.in_features)

    def sparse_sum(self) -> SparseSum:
        """The CSR part and the full rows as one; values of the same cell are added in fp64."""
        cells, values = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.float64)]
        if "vals" in self.tensors:
            rows, cols, vals = (self.tensors[name] for name in CSR_TENSORS)
            cells.append(csr.row_indices(rows, vals.numel()) * self.in_features + cols.long())
            values.append(vals.double())
        if "full_rows" in self.tensors:
            rows = self.tensors["full_row_indices"].long()
            columns = torch.arange(self.in_features)
            cells.append((rows[:, None] * self.in_features + columns).flatten())
            values.append(self.tensors["full_rows"].T.double().flatten())
        unique, place = torch.cat(cells).unique(return_inverse=True)
        sums = torch.zeros(unique.numel(), dtype=torch.float64)
        sums.index_add_(0, place, torch.cat(values))
        kept = sums != 0
        return SparseSum(unique[kept], sums[kept])


def check_layer(
    tensors: Mapping[str, Tensor], *, prefix: str = "", bits: int | None = None
) -> LegacyLayer:
    """Check the tensors of a layer, after which no index in them leads out of bounds.

    Args:
        tensors: by the names of the module's table.
        prefix: put before a tensor's name in errors, as in ``"model.layers.0.mlp.up_proj."``.
        bits: width of an index, 3 or 4; None: as many as the size of ``lookup_table`` tells.

    Raises:
        ValueError: naming the tensor, what it is and what is allowed.
    """
    for group in (REQUIRED, CSR_TENSORS, FULL_ROW_TENSORS):
        present = [name for name in group if name in tensors]
        missing = [name for name in group if name not in tensors]
        if missing and (present or group is REQUIRED):
            beside = f" beside {prefix}{present[0]}" if present else ""
            raise ValueError(f"{prefix}{missing[0]} is missing{beside}")
    for name in REQUIRED:
        _check(tensors, prefix, name, (None, None))
    words, out_features = tensors["qweight"].shape
    bits = _bits(tensors["lookup_table"], bits, f"{prefix}lookup_table")
    _check(tensors, prefix, "lookup_table", (out_features, 2**bits))
    if not words or words % bits or not out_features:
        raise ValueError(
            f"{prefix}qweight must be int32 [in_features / 32 * {bits}, out_features] for "
            f"bits={bits}, so a positive multiple of {bits} rows, got {[words, out_features]}"
        )
    in_features = words // bits * packing.WORD_BITS
    _check(tensors, prefix, "bias", (out_features,))
    _check(tensors, prefix, "startrows", (None,))
    _check_csr(tensors, prefix, out_features, in_features)
    _check_full_rows(tensors, prefix, out_features, in_features)
    return LegacyLayer(dict(tensors), bits, in_features, out_features)


def _bits(table: Tensor, bits: int | None, name: str) -> int:
    sizes = {2**width: width for width in BITS}
    found = sizes.get(table.shape[1])
    if found is None or (bits is not None and found != bits):
        allowed = [2**bits] if bits is not None else list(sizes)
        raise ValueError(
            f"{name} must have {' or '.join(map(str, allowed))} columns "
            f"({' or '.join(map(str, BITS)) if bits is None else bits} bits), "
            f"got {list(table.shape)}"
        )
    return found


def _check(
    tensors: Mapping[str, Tensor], prefix: str, name: str, shape: tuple[int | None, ...]
) -> None:
    """Check dtype, shape (None: any size), and that floating-point values are finite."""
    tensor = tensors.get(name)
    if tensor is None:
        return
    floating = name in ("lookup_table", "bias", "vals", "full_rows")
    dtypes = FLOATS if floating else (torch.int32,)
    fits = tensor.dim() == len(shape) and all(
        wanted in (None, size) for wanted, size in zip(shape, tensor.shape, strict=True)
    )
    if tensor.dtype not in dtypes or not fits:
        sizes = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(
            f"{prefix}{name} must be {'float32' if floating else 'int32'} [{sizes}], "
            f"got {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        )
    if floating and not bool(tensor.isfinite().all()):
        raise ValueError(f"{prefix}{name} holds values that are not finite")


def _check_csr(
    tensors: Mapping[str, Tensor], prefix: str, out_features: int, in_features: int
) -> None:
    if "rows" not in tensors:
        return
    _check(tensors, prefix, "cols", (None,))
    nnz = tensors["cols"].numel()
    _check(tensors, prefix, "rows", (out_features + 1,))
    _check(tensors, prefix, "vals", (nnz,))
    rows = tensors["rows"].long()
    if int(rows[0]) != 0 or int(rows[-1]) != nnz:
        raise ValueError(
            f"{prefix}rows must start at 0 and end at nnz={nnz}, "
            f"got {int(rows[0])} and {int(rows[-1])}"
        )
    if bool((rows.diff() < 0).any()):
        row = int((rows.diff() < 0).nonzero()[0])
        raise ValueError(f"{prefix}rows must never decrease, but does after row {row}")
    _check_range(tensors["cols"], f"{prefix}cols", "in_features", in_features)


def _check_full_rows(
    tensors: Mapping[str, Tensor], prefix: str, out_features: int, in_features: int
) -> None:
    if "full_rows" not in tensors:
        return
    _check(tensors, prefix, "full_row_indices", (None,))
    indices = tensors["full_row_indices"]
    _check(tensors, prefix, "full_rows", (in_features, indices.numel()))
    _check_range(indices, f"{prefix}full_row_indices", "out_features", out_features)


def _check_range(indices: Tensor, name: str, bound: str, size: int) -> None:
    if not indices.numel():
        return
    low, high = (int(limit) for limit in indices.aminmax())
    if not 0 <= low <= high < size:
        raise ValueError(f"{name} must lie in [0, {bound}={size}), got [{low}, {high}]")
