"""Compressed sparse rows: the few weights kept at 16 bits beside the dense part.

Columns are stored as the bits of a uint16 in an int16 tensor (safetensors, accelerate and
NCCL all move int16; few of them uint16), or as int32 where a row is longer than 65536.
"""

from typing import NamedTuple

import torch
from torch import Tensor

INT16_COLUMNS = 2**16
VALUE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class CSR(NamedTuple):
    """A sparse [out_features, in_features] matrix with ``nnz`` entries.

    Attributes:
        crow_indices: int32 [out_features + 1]; row ``r`` owns entries
            ``crow_indices[r]:crow_indices[r + 1]``.
        col_indices: [nnz], ascending within a row; int16 holding uint16, or int32 if
            in_features > 65536.
        values: [nnz], fp16, bf16 or fp32.
    """

    crow_indices: Tensor
    col_indices: Tensor
    values: Tensor


def column_dtype(in_features: int) -> torch.dtype:
    """The dtype in which columns of rows of ``in_features`` are stored."""
    return torch.int16 if in_features <= INT16_COLUMNS else torch.int32


def encode_columns(columns: Tensor, in_features: int) -> Tensor:
    """Store int64 columns in [0, in_features) as :func:`column_dtype`."""
    if column_dtype(in_features) == torch.int32:
        return columns.to(torch.int32)
    return torch.where(columns >= 2**15, columns - 2**16, columns).to(torch.int16)


def decode_columns(col_indices: Tensor) -> Tensor:
    """Stored columns as int64 [nnz]."""
    columns = col_indices.to(torch.int64)
    return columns & 0xFFFF if col_indices.dtype == torch.int16 else columns


def csr_from_dense(mask: Tensor, dense: Tensor) -> CSR:
    """Collect the entries of ``dense`` where ``mask`` is True.

    Args:
        mask: bool [out_features, in_features].
        dense: [out_features, in_features] in the dtype in which values are to be stored.

    Returns:
        The entries in row-major order, on the device of ``mask``. An entry of value zero is kept.
    """
    if mask.dtype != torch.bool or mask.shape != dense.shape or mask.dim() != 2:
        raise ValueError(
            f"mask must be bool with the shape {list(dense.shape)} of dense, "
            f"got {mask.dtype} {list(mask.shape)}"
        )
    out_features, in_features = mask.shape
    crow_indices = torch.zeros(out_features + 1, dtype=torch.int32, device=mask.device)
    crow_indices[1:] = mask.sum(dim=1).cumsum(dim=0)
    columns = mask.nonzero()[:, 1]
    return CSR(crow_indices, encode_columns(columns, in_features), dense[mask])


def row_indices(crow_indices: Tensor, nnz: int) -> Tensor:
    """The row of each of ``nnz`` entries, int64 [nnz]."""
    counts = crow_indices.diff().to(torch.int64)
    rows = torch.arange(counts.numel(), device=crow_indices.device)
    return torch.repeat_interleave(rows, counts, output_size=nnz)


def take_rows(matrix: CSR, start: int, stop: int) -> CSR:
    """Rows ``start`` to ``stop`` (exclusive) of a valid matrix, in memory of their own."""
    crow_indices, col_indices, values = matrix
    first, last = int(crow_indices[start]), int(crow_indices[stop])
    return CSR(
        crow_indices[start : stop + 1] - first,
        col_indices[first:last].clone(),
        values[first:last].clone(),
    )


def take_columns(matrix: CSR, start: int, stop: int) -> CSR:
    """Columns ``start`` to ``stop`` (exclusive) of a valid matrix, counted from ``start``.

    Columns come in the dtype of a matrix with ``stop - start`` columns.
    """
    columns = decode_columns(matrix.col_indices)
    inside = (columns >= start) & (columns < stop)
    rows = row_indices(matrix.crow_indices, columns.numel())[inside]
    crow_indices = torch.zeros_like(matrix.crow_indices)
    crow_indices[1:] = rows.bincount(minlength=crow_indices.numel() - 1).cumsum(dim=0)
    kept = encode_columns(columns[inside] - start, stop - start)
    return CSR(crow_indices, kept, matrix.values[inside])


def check_csr(
    crow_indices: Tensor,
    col_indices: Tensor,
    values: Tensor,
    *,
    out_features: int,
    in_features: int,
    prefix: str = "",
) -> None:
    """Raise ValueError, naming the tensor, unless the three tensors form a valid CSR matrix.

    Checks dtypes, shapes, row pointers (start at 0, never decrease, end at nnz) and columns
    (within the row, strictly ascending). ``prefix`` is put before the tensor's name, as in
    ``"model.layers.0.mlp.up_proj."``.
    """
    if crow_indices.dtype != torch.int32 or crow_indices.shape != (out_features + 1,):
        raise ValueError(
            f"{prefix}crow_indices must be int32 [{out_features + 1}], "
            f"got {crow_indices.dtype} {list(crow_indices.shape)}"
        )
    expected = column_dtype(in_features)
    if col_indices.dtype != expected or col_indices.dim() != 1:
        raise ValueError(
            f"{prefix}col_indices must be {expected} [nnz] for in_features={in_features}, "
            f"got {col_indices.dtype} {list(col_indices.shape)}"
        )
    if values.dtype not in VALUE_DTYPES or values.shape != col_indices.shape:
        raise ValueError(
            f"{prefix}values must be a floating-point tensor {list(col_indices.shape)} like "
            f"col_indices, got {values.dtype} {list(values.shape)}"
        )
    nnz = col_indices.numel()
    first, last = int(crow_indices[0]), int(crow_indices[-1])
    if first != 0 or last != nnz:
        raise ValueError(
            f"{prefix}crow_indices must start at 0 and end at nnz={nnz}, got {first} and {last}"
        )
    if bool((crow_indices.diff() < 0).any()):
        row = int(torch.nonzero(crow_indices.diff() < 0)[0])
        raise ValueError(f"{prefix}crow_indices must never decrease, but does after row {row}")
    columns = decode_columns(col_indices)
    if nnz and not 0 <= int(columns.min()) <= int(columns.max()) < in_features:
        raise ValueError(
            f"{prefix}col_indices must lie in [0, in_features={in_features}), "
            f"got [{int(columns.min())}, {int(columns.max())}]"
        )
    rows = row_indices(crow_indices, nnz)
    ascending = (columns.diff() > 0) | (rows.diff() > 0)
    if not bool(ascending.all()):
        entry = int(torch.nonzero(~ascending)[0])
        raise ValueError(
            f"{prefix}col_indices must ascend within a row, "
            f"but entries {entry} and {entry + 1} of row {int(rows[entry])} do not"
        )
