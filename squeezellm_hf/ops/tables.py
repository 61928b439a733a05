"""Tables and unpacked indices: the weight from them, and the derivative with respect to the tables.

    W[o, i] = table[o, index[o, i]]
    dL/dtable[o, c] = sum of dL/dW[o, i] over the i with index[o, i] = c

For training, where tables change and indices stay: one byte a weight, unpacked once, saves the
unpacking in every step. Deterministic on every device: no atomics.
"""

import functools
import importlib
import warnings
from typing import Any

import torch
from torch import Tensor

# Cells looked at together: on a CPU what fits a cache, elsewhere what fits 256 MB.
_CPU_CELLS = 1 << 20
_DEVICE_BYTES = 1 << 28
_INT64_BYTES = 8


def table_gradient(grad_weight: Tensor, indices: Tensor, entries: int) -> Tensor:
    """Sum a row's cells by their index.

    Args:
        grad_weight: [out_features, in_features], any floating-point dtype.
        indices: uint8 [out_features, in_features], below ``entries``.
        entries: size of a table, 2**bits.

    Returns:
        fp32 [out_features, entries], summed in fp32.
    """
    if grad_weight.device.type == "cuda" and _triton() is not None:
        sums: Tensor = _triton().table_gradient(
            grad_weight.contiguous(), indices.contiguous(), entries
        )
        return sums
    on_cpu = grad_weight.device.type == "cpu"
    add_up = _scattered if on_cpu else _masked
    rows = _rows(indices, entries * (1 + grad_weight.element_size()))
    pieces = zip(grad_weight.split(rows), indices.split(rows), strict=True)
    return torch.cat([add_up(grad, index, entries) for grad, index in pieces])


def look_up(table: Tensor, indices: Tensor) -> Tensor:
    """The weight without its sparse part.

    Args:
        table: [out_features, entries], any floating-point dtype.
        indices: uint8 [out_features, in_features], below ``entries``.

    Returns:
        [out_features, in_features] in the dtype of ``table``.
    """
    if table.device.type == "cuda" and _triton() is not None:
        weight: Tensor = _triton().look_up(table.contiguous(), indices.contiguous())
        return weight
    weight = torch.empty(indices.shape, dtype=table.dtype, device=table.device)
    rows = _rows(indices, _INT64_BYTES)
    for out, entries, index in zip(
        weight.split(rows), table.split(rows), indices.split(rows), strict=True
    ):
        torch.gather(entries, 1, index.to(torch.int64), out=out)
    return weight


def _rows(indices: Tensor, bytes_per_cell: int) -> int:
    """How many rows are worked on together."""
    cells = _CPU_CELLS if indices.device.type == "cpu" else _DEVICE_BYTES // bytes_per_cell
    return max(1, cells // max(1, indices.shape[1]))


@functools.cache
def _triton() -> Any:
    """The same as Triton kernels, one pass over the weight each; None where there is no Triton."""
    try:
        kernels = importlib.import_module("squeezellm_hf.ops.triton_tables")
    except ImportError:
        return None
    try:
        # Triton compiles at the first call, with a C compiler that may not be there.
        _compare(kernels)
    except Exception as error:
        warnings.warn(f"Triton does not work here, training is slower: {error}", stacklevel=2)
        return None
    return kernels


def _compare(kernels: Any) -> None:
    """Raise unless the Triton kernels do on the current GPU what plain PyTorch does."""
    columns, entries = 1500, 8  # more than a block of columns
    indices = torch.arange(3 * columns, device="cuda").view(3, columns).remainder(entries + 3)
    indices = indices.clamp(max=entries - 1).to(torch.uint8)
    table = torch.arange(3 * entries, device="cuda").view(3, entries).to(torch.bfloat16)
    weight = kernels.look_up(table, indices)
    if not weight.equal(table.gather(1, indices.to(torch.int64))):
        raise RuntimeError("its look-up gives another weight")
    sums = kernels.table_gradient(weight, indices, entries)
    if not torch.allclose(sums, _masked(weight, indices, entries)):
        raise RuntimeError("its sums are others")


def _scattered(grad_weight: Tensor, indices: Tensor, entries: int) -> Tensor:
    sums = torch.zeros(len(indices), entries, dtype=torch.float32, device=indices.device)
    return sums.scatter_add_(1, indices.to(torch.int64), grad_weight.float())


def _masked(grad_weight: Tensor, indices: Tensor, entries: int) -> Tensor:
    """Reads every cell once per entry, but in a fixed order, which a scattered sum on a GPU has
    not."""
    entry = torch.arange(entries, dtype=torch.uint8, device=indices.device)[:, None]
    selected = (indices[:, None, :] == entry) * grad_weight[:, None, :]
    return selected.sum(-1, dtype=torch.float32)
