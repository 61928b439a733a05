"""A weight that is given as table indices and sparse sums, in the tensors of a checkpoint.

Nothing is clustered: the same weight is written down with sorted tables.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from squeezellm_hf.formats.csr import CSR, encode_columns
from squeezellm_hf.formats.packing import pack
from squeezellm_hf.methods.squeezellm.sparse import exact_residuals

# In the order of what they cost and how fast kernels are with them.
TABLE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Bounds the working set: some 20 bytes a cell.
CELLS_PER_CHUNK = 2**22


class Transcoded(NamedTuple):
    """A weight in the tensors of a checkpoint.

    Attributes:
        tensors: as of :func:`squeezellm_hf.methods.squeezellm.quantize_weight`.
        error: the greatest |new weight - given weight|, both in fp32; 0.0: every weight is exact.
    """

    tensors: dict[str, Tensor]
    error: float


@torch.no_grad()
def transcode(
    indices: Callable[[slice], Tensor],
    lookup_table: Tensor,
    cells: Tensor,
    sums: Tensor,
    *,
    bits: int,
    in_features: int,
    table_dtype: torch.dtype | None = None,
    name: str = "weight",
) -> Transcoded:
    """Write W[o, i] = lookup_table[o, index(o, i)] + sum(o, i) with sorted tables.

    A weight with a sparse sum keeps its index where table and value, summed in fp32, are exactly
    the weight; elsewhere it takes the entry that comes nearest
    (:func:`~squeezellm_hf.methods.squeezellm.sparse.exact_residuals`), so that it is mostly exact
    even if the table had to be rounded.

    Args:
        indices: gives the uint8 [rows, in_features] indices of a slice of output channels.
        lookup_table: fp32 [out_features, 2**bits], finite, in any order.
        cells: int64 [nnz], ``row * in_features + column`` of the sparse sums, ascending.
        sums: fp64 [nnz].
        bits: width of an index.
        in_features: length of a row.
        table_dtype: of tables and values, fp16, bf16 or fp32. None: the first of these with which
            every weight is exact. fp32 holds every table, and misses a weight by a rounding at
            most, where several sparse values were summed.
        name: what an error calls the weight.

    Raises:
        ValueError: if a value is too large for ``table_dtype``.
    """
    best = None
    for dtype in TABLE_DTYPES if table_dtype is None else (table_dtype,):
        if table_dtype is None and not lookup_table.to(dtype).float().equal(lookup_table):
            continue
        result = _transcode(indices, lookup_table, cells, sums, bits, in_features, dtype)
        if best is None or result.error < best.error:
            best = result
        if best.error == 0:
            break
    if best is None or best.error == torch.inf:
        allowed = str(table_dtype or torch.float32).removeprefix("torch.")
        raise ValueError(f"{name} holds a table entry or weight too large for {allowed}")
    return best


def _transcode(
    indices: Callable[[slice], Tensor],
    lookup_table: Tensor,
    cells: Tensor,
    sums: Tensor,
    bits: int,
    in_features: int,
    dtype: torch.dtype,
) -> Transcoded:
    out_features = lookup_table.shape[0]
    step = max(1, CELLS_PER_CHUNK // in_features)
    packed, tables, values, error = [], [], [sums[:0].to(dtype)], 0.0
    for start in range(0, out_features, step):
        rows = slice(start, min(start + step, out_features))
        bounds = torch.tensor([rows.start * in_features, rows.stop * in_features])
        first, last = torch.searchsorted(cells, bounds).tolist()
        index, table, value, worst = _transcode_rows(
            indices(rows),
            lookup_table[rows],
            cells[first:last] - rows.start * in_features,
            sums[first:last],
            dtype,
        )
        packed.append(pack(index, bits))
        tables.append(table)
        values.append(value)
        error = max(error, worst)
    tensors = {"qweight": torch.cat(packed), "lookup_table": torch.cat(tables)}
    if cells.numel():
        counts = torch.bincount(cells // in_features, minlength=out_features)
        crow_indices = torch.zeros(out_features + 1, dtype=torch.int32)
        crow_indices[1:] = counts.cumsum(dim=0)
        columns = encode_columns(cells % in_features, in_features)
        tensors |= CSR(crow_indices, columns, torch.cat(values))._asdict()
    return Transcoded(tensors, error)


def _transcode_rows(
    index: Tensor, lookup_table: Tensor, cells: Tensor, sums: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Indices uint8 [R, n], table [R, k] and values [m] of some rows, and the greatest error."""
    given, order = lookup_table.sort(dim=1, stable=True)
    rank = order.argsort(dim=1).to(torch.uint8)
    index = rank.gather(1, index.long())
    table = given.to(dtype)
    if not bool(table.isfinite().all()):
        return index, table, sums.to(dtype), torch.inf
    rounding = (table.double() - given.double()).abs()
    error = 0.0
    if bool(rounding.any()):
        errors = rounding.gather(1, index.long())
        errors.view(-1)[cells] = 0.0
        error = float(errors.max())

    row, flat = cells // index.shape[1], index.view(-1)
    chosen = flat[cells]
    weights = (given[row, chosen.long()].double() + sums).float()
    if not bool(weights.isfinite().all()):
        return index, table, sums.to(dtype), torch.inf
    values = sums.to(dtype)
    inexact = (_add(table, row, chosen, values) != weights).nonzero()[:, 0]
    chosen[inexact], values[inexact] = exact_residuals(weights[inexact], table[row[inexact]], dtype)
    flat[cells] = chosen
    if cells.numel():
        error = max(error, float((_add(table, row, chosen, values) - weights).abs().max()))
    return index, table, values, error


def _add(table: Tensor, row: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """Dense + sparse in fp32, as the layer adds them."""
    return table[row, index.long()].float() + values.float()
