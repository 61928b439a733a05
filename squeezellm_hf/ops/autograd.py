"""Derivatives of the ops with respect to the activations, the tables, the sparse values, the bias.

With y = x W^T + b and W[o, i] = table[o, index[o, i]] + sparse[o, i]::

    dL/dx = dL/dy W        dL/dW = dL/dy^T x        dL/db = sum over the batch of dL/dy
    dL/dtable[o, c] = sum of dL/dW[o, i] over the i with index[o, i] = c
    dL/dvalues[k]   = dL/dW[row of k, column of k]
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from squeezellm_hf.formats import csr, packing
from squeezellm_hf.ops.schema import (
    LUT_DEQUANTIZE,
    LUT_DEQUANTIZE_REFERENCE,
    LUT_LINEAR,
    LUT_LINEAR_GROUP,
    LUT_LINEAR_NO_GRAD,
    LUT_LINEAR_REFERENCE,
)

_QWEIGHT, _TABLE, _CROW, _COL, _VALUES = range(5)


def _stored_gradients(
    ctx: Any, grad_weight: Tensor, stored: tuple[Tensor, ...], needs: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """dL/dtable and dL/dvalues from dL/dW, fp32 [out_features, in_features]."""
    grad_table = grad_values = None
    if needs[_TABLE]:
        indices = packing.unpack(stored[_QWEIGHT], ctx.bits, grad_weight.shape[1])
        grad_table = torch.zeros_like(stored[_TABLE], dtype=torch.float32)
        grad_table.scatter_add_(1, indices.to(torch.int64), grad_weight)
        grad_table = grad_table.to(stored[_TABLE].dtype)
    if needs[_VALUES]:
        rows = csr.row_indices(stored[_CROW], stored[_VALUES].numel())
        grad_values = grad_weight[rows, csr.decode_columns(stored[_COL])].to(stored[_VALUES].dtype)
    return grad_table, grad_values


def _setup_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *stored, bias, bits = inputs
    ctx.bits = bits
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, *stored)


def _backward_linear(
    dequantize: Callable[..., Tensor], ctx: Any, grad: Tensor
) -> tuple[Tensor | None, ...]:
    x, *stored = ctx.saved_tensors
    needs = ctx.needs_input_grad
    grad_x = grad_table = grad_values = grad_bias = None
    if needs[0]:
        weight = dequantize(*stored, ctx.bits, x.shape[-1], grad.dtype)
        grad_x = grad @ weight
    if needs[1 + _TABLE] or needs[1 + _VALUES]:
        flat_x, flat_grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        grad_weight = flat_grad.float().T @ flat_x.float()
        grad_table, grad_values = _stored_gradients(ctx, grad_weight, stored, needs[1:6])
    if needs[6]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).float().sum(0).to(ctx.bias_dtype)
    return grad_x, None, grad_table, None, None, grad_values, grad_bias, None


def _setup_dequantize(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *stored, bits, _, _ = inputs
    ctx.bits = bits
    ctx.save_for_backward(*stored)


def _backward_dequantize(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_table, grad_values = _stored_gradients(
        ctx, grad.float(), ctx.saved_tensors, ctx.needs_input_grad
    )
    return None, grad_table, None, None, grad_values, None, None, None


for _linear, _dequantize in (
    (LUT_LINEAR, torch.ops.squeezellm_hf.lut_dequantize),
    (LUT_LINEAR_REFERENCE, torch.ops.squeezellm_hf.lut_dequantize_reference),
):
    torch.library.register_autograd(
        _linear, functools.partial(_backward_linear, _dequantize), setup_context=_setup_linear
    )
for _name in (LUT_DEQUANTIZE, LUT_DEQUANTIZE_REFERENCE):
    torch.library.register_autograd(_name, _backward_dequantize, setup_context=_setup_dequantize)
# The dispatcher passes autograd by and goes straight to the kernel.
for _name in (LUT_LINEAR_NO_GRAD, LUT_LINEAR_GROUP):
    torch.library.impl(_name, "Autograd")(torch.library.fallthrough_kernel)
