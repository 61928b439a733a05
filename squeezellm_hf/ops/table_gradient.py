"""The derivative with respect to the tables, from the one with respect to the weight.

    dL/dtable[o, c] = sum of dL/dW[o, i] over the i with index[o, i] = c

Deterministic on every device: no atomics.
"""

import torch
from torch import Tensor

# Cells looked at together: on a CPU what fits a cache, elsewhere what fits 256 MB.
_CPU_CELLS = 1 << 20
_DEVICE_BYTES = 1 << 28


def table_gradient(grad_weight: Tensor, indices: Tensor, entries: int) -> Tensor:
    """Sum a row's cells by their index.

    Args:
        grad_weight: [out_features, in_features], any floating-point dtype.
        indices: uint8 [out_features, in_features], below ``entries``.
        entries: size of a table, 2**bits.

    Returns:
        fp32 [out_features, entries], summed in fp32.
    """
    out_features, in_features = indices.shape
    cpu = grad_weight.device.type == "cpu"
    cells = _CPU_CELLS if cpu else _DEVICE_BYTES // (entries * (1 + grad_weight.element_size()))
    rows = max(1, cells // max(1, in_features))
    sums = _scattered if cpu else _masked
    if rows >= out_features:
        return sums(grad_weight, indices, entries)
    pieces = zip(grad_weight.split(rows), indices.split(rows), strict=True)
    return torch.cat([sums(grad, index, entries) for grad, index in pieces])


def _scattered(grad_weight: Tensor, indices: Tensor, entries: int) -> Tensor:
    sums = torch.zeros(len(indices), entries, dtype=torch.float32, device=indices.device)
    return sums.scatter_add_(1, indices.to(torch.int64), grad_weight.float())


def _masked(grad_weight: Tensor, indices: Tensor, entries: int) -> Tensor:
    """Reads every cell once per entry, but in a fixed order, which a scattered sum on a GPU has
    not."""
    entry = torch.arange(entries, dtype=torch.uint8, device=indices.device)[:, None]
    selected = (indices[:, None, :] == entry) * grad_weight[:, None, :]
    return selected.sum(-1, dtype=torch.float32)
