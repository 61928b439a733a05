"""The quantized layer while its tables are trained.

    W[o, i] = round(T[o, index[o, i]])   in the dense part,     round: to the tables' 16-bit dtype
    W[o, i] = C[o, i]                    in the sparse part

A sparse value is stored as the difference to a table entry. What is held here is the sum C: a cell
of the sparse part keeps its weight while the entry under it moves, and the value is made anew at
the end. The rounding passes gradients through, so the loss is always that of the stored tables.

All of them are held relative to the root mean square of the layer's table, so that one learning
rate means the same in every layer and every model.

With trained indices a continuous weight S stands behind each cell of the dense part, at first its
table entry. It follows the gradient with respect to W, and index[o, i] is the entry nearest to
S[o, i] (the straight-through estimator of Y. Bengio et al., arXiv 1308.3432).
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from squeezellm_hf.formats import csr, packing
from squeezellm_hf.methods.squeezellm.codebook import nearest_entry
from squeezellm_hf.methods.squeezellm.sparse import exact_residuals
from squeezellm_hf.nn import SqueezeLLMLinear
from squeezellm_hf.ops.tables import look_up, table_gradient

# Cells whose indices are chosen or renamed together: bounds the memory of 64-bit indices.
_CELLS = 1 << 24
_CPU_CELLS = 1 << 20


class TableLinear(nn.Module):
    """y = x W^T + bias with trainable tables.

    The weight is made for a product and dropped, in the forward and again in the backward pass:
    beside the activations, a layer holds one byte a weight.

    Args:
        layer: whose tensors are copied; on its device.
        train_values: whether the cells of the sparse part are trained.
        train_indices: whether the indices are trained; takes another 16 bytes a weight.

    Parameters and buffers (the first two divided by ``scale``, the third by ``cell_scale``):
        table: fp32 [out_features, 2**bits].
        shadow: fp32 [out_features, in_features], the weights that the indices follow, or None.
        cells: fp32 [nnz], the weights of the sparse part, or None.
        indices: uint8 [out_features, in_features].
        positions: int64 [nnz], of the cells in the flattened weight, or None.
        bias: of the layer, or None.
    """

    def __init__(
        self, layer: SqueezeLLMLinear, *, train_values: bool = False, train_indices: bool = False
    ) -> None:
        super().__init__()
        self.in_features = layer.in_features
        self.out_features = layer.out_features
        self.bits = layer.bits
        self.table_dtype = layer.lookup_table.dtype
        table = layer.lookup_table.detach().float()
        self.scale = float(table.square().mean().sqrt()) or 1.0
        # A power of two for the cells, which must come back to the last bit.
        self.cell_scale = 2.0 ** round(math.log2(self.scale))
        self.table = nn.Parameter(table / self.scale)
        self.cells: nn.Parameter | None = None
        self.indices: Tensor
        self.register_buffer(
            "indices", packing.unpack(layer.qweight, layer.bits, layer.in_features)
        )
        self.positions: Tensor | None
        self.register_buffer("positions", None)
        if layer.crow_indices is not None and layer.values is not None:
            rows = csr.row_indices(layer.crow_indices, layer.nnz)
            columns = csr.decode_columns(layer.col_indices)  # type: ignore[arg-type]
            self.positions = rows * layer.in_features + columns
            entries = table[rows, self.indices[rows, columns].to(torch.int64)]
            cells = (entries + layer.values.float()) / self.cell_scale
            self.cells = nn.Parameter(cells, requires_grad=train_values)
        self.bias = layer.bias
        self.shadow: nn.Parameter | None = None
        if train_indices:
            self.shadow = nn.Parameter(self.table.detach().gather(1, self.indices.to(torch.int64)))

    @torch.no_grad()
    def entries(self) -> Tensor:
        """The tables as they would be stored, but for the order of their entries."""
        return (self.table * self.scale).to(self.table_dtype)

    @torch.no_grad()
    def assign(self) -> None:
        """Set the indices to the entries nearest to the weights behind them."""
        if self.shadow is None:
            return
        table, order = (self.entries().float() / self.scale).sort(dim=1, stable=True)
        rows = max(1, self._piece // self.in_features)
        order = order.to(torch.uint8)
        for out, shadow, entries, names in zip(
            self.indices.split(rows),
            self.shadow.split(rows),
            table.split(rows),
            order.split(rows),
            strict=True,
        ):
            out.copy_(names.gather(1, nearest_entry(shadow, entries).to(torch.int64)))

    def _cells(self) -> Tensor:
        assert self.cells is not None
        return self.cells.detach() * self.cell_scale

    @property
    def _piece(self) -> int:
        """Cells that are worked on together."""
        return _CPU_CELLS if self.table.device.type == "cpu" else _CELLS

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The weight as it would be stored, [out_features, in_features], without gradient."""
        weight = look_up(self.entries().to(dtype), self.indices)
        if self.cells is not None and self.positions is not None:
            # Not index_copy_: where determinism is asked for, it sorts the positions every time.
            weight.put_(self.positions, self._cells().to(dtype))
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features] -> [..., out_features], in autocast's dtype or that of x."""
        self.assign()
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        y: Tensor = _TableProduct.apply(x, self.table, self.cells, self.shadow, self)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @torch.no_grad()
    def tensors(self) -> dict[str, Tensor]:
        """The layer's tensors as a checkpoint holds them: tables ascending, sparse cells exact.

        Returns:
            ``qweight``, ``lookup_table`` and, with a sparse part, ``values``. The other tensors
            of the layer stay as they are.
        """
        self.assign()
        table, order = self.entries().sort(dim=1, stable=True)
        rank = torch.empty_like(order).scatter_(
            1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
        )
        indices = torch.empty_like(self.indices)
        rows = max(1, self._piece // self.in_features)
        for out, ranks, old in zip(
            indices.split(rows), rank.split(rows), self.indices.split(rows), strict=True
        ):
            out.copy_(ranks.gather(1, old.to(torch.int64)))
        tensors = {"lookup_table": table}
        if self.cells is not None and self.positions is not None:
            row = self.positions // self.in_features
            index, values = exact_residuals(self._cells(), table[row], self.table_dtype)
            indices.view(-1)[self.positions] = index
            tensors["values"] = values
        return {"qweight": packing.pack(indices, self.bits), **tensors}


class _TableProduct(torch.autograd.Function):
    """x W^T. The weight is made again in the backward pass rather than kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        table: Tensor,
        cells: Tensor | None,
        shadow: Tensor | None,
        layer: TableLinear,
    ) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x)
        return torch.nn.functional.linear(x, layer.weight(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        layer: TableLinear = ctx.layer
        needs_x, needs_table, needs_cells, needs_shadow, _ = ctx.needs_input_grad
        grad_x = grad @ layer.weight(grad.dtype) if needs_x else None
        grad_table = grad_cells = grad_shadow = None
        if needs_table or needs_cells or needs_shadow:
            flat_grad, flat_x = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
            grad_weight = flat_grad.T @ flat_x
            if layer.positions is not None:
                flat = grad_weight.view(-1)
                if needs_cells:
                    grad_cells = flat.index_select(0, layer.positions).float() * layer.cell_scale
                # These cells do not depend on the table.
                flat.index_fill_(0, layer.positions, 0)
            if needs_table:
                sums = table_gradient(grad_weight, layer.indices, 2**layer.bits)
                grad_table = sums * layer.scale
            if needs_shadow:
                grad_shadow = grad_weight.float() * layer.scale
        return grad_x, grad_table, grad_cells, grad_shadow, None
