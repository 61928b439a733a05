"""Typed entry points of the ops."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from squeezellm_hf.ops import autograd as autograd  # declares the ops and their derivatives

# Looked up once: an attribute of torch.ops costs 0.2 us a call.
_LUT_LINEAR = torch.ops.squeezellm_hf.lut_linear.default
_LUT_LINEAR_NO_GRAD = torch.ops.squeezellm_hf.lut_linear_no_grad.default
_LUT_LINEAR_REFERENCE = torch.ops.squeezellm_hf.lut_linear_reference.default


def lut_linear(
    x: Tensor,
    qweight: Tensor,
    lookup_table: Tensor,
    *,
    bits: int,
    crow_indices: Tensor | None = None,
    col_indices: Tensor | None = None,
    values: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """y = x W^T + bias for a dense-and-sparse quantized W (SqueezeLLM, section 4.2).

    W[o, i] = lookup_table[o, index(o, i)] + sparse[o, i]; accumulated in fp32.

    Args:
        x: [..., in_features], fp32, bf16 or fp16.
        qweight: int32 [out_features, ceil(in_features * bits / 32)], packed indices
            (:mod:`squeezellm_hf.formats.packing`).
        lookup_table: fp16, bf16 or fp32 [out_features, 2**bits].
        bits: width of an index, 1 to 8.
        crow_indices: int32 [out_features + 1], row pointers of the sparse part, or None.
        col_indices: int16 holding uint16 (int32 if in_features > 65536) [nnz], or None.
        values: [nnz], dtype of ``lookup_table``, or None.
        bias: [out_features], any floating-point dtype, or None.

    Returns:
        [..., out_features] in the dtype of ``x``.

    Raises:
        ValueError or RuntimeError: if a shape, dtype or device does not fit.
        NotImplementedError: for a derivative in forward mode (jvp).
    """
    if forward_ad._current_level >= 0:
        _refuse_tangents(x, lookup_table, values, bias)
    op = _LUT_LINEAR_NO_GRAD
    if torch.is_grad_enabled() and (
        # Inside torch.func's transforms requires_grad says nothing of the levels outside.
        torch._C._are_functorch_transforms_active()
        or x.requires_grad
        or lookup_table.requires_grad
        or (values is not None and values.requires_grad)
        or (bias is not None and bias.requires_grad)
    ):
        op = _LUT_LINEAR
    return op(x, qweight, lookup_table, crow_indices, col_indices, values, bias, bits)


def lut_dequantize(
    qweight: Tensor,
    lookup_table: Tensor,
    *,
    bits: int,
    in_features: int,
    crow_indices: Tensor | None = None,
    col_indices: Tensor | None = None,
    values: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The weight that the quantized tensors stand for.

    Args: as for :func:`lut_linear`; ``dtype`` defaults to that of ``lookup_table``.

    Returns:
        [out_features, in_features] in ``dtype``; dense and sparse part are added in fp32.

    Raises:
        ValueError or RuntimeError: if a shape, dtype or device does not fit.
        NotImplementedError: for a derivative in forward mode (jvp).
    """
    if forward_ad._current_level >= 0:
        _refuse_tangents(lookup_table, values)
    return torch.ops.squeezellm_hf.lut_dequantize(
        qweight, lookup_table, crow_indices, col_indices, values, bits, in_features,
        lookup_table.dtype if dtype is None else dtype,
    )  # fmt: skip


def lut_linear_reference(
    x: Tensor,
    qweight: Tensor,
    lookup_table: Tensor,
    *,
    bits: int,
    crow_indices: Tensor | None = None,
    col_indices: Tensor | None = None,
    values: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """:func:`lut_linear` in plain PyTorch, whatever kernels there are."""
    if forward_ad._current_level >= 0:
        _refuse_tangents(x, lookup_table, values, bias)
    y: Tensor = _LUT_LINEAR_REFERENCE(
        x, qweight, lookup_table, crow_indices, col_indices, values, bias, bits
    )
    return y


def lut_dequantize_reference(
    qweight: Tensor,
    lookup_table: Tensor,
    *,
    bits: int,
    in_features: int,
    crow_indices: Tensor | None = None,
    col_indices: Tensor | None = None,
    values: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """:func:`lut_dequantize` in plain PyTorch, whatever kernels there are."""
    if forward_ad._current_level >= 0:
        _refuse_tangents(lookup_table, values)
    return torch.ops.squeezellm_hf.lut_dequantize_reference(
        qweight, lookup_table, crow_indices, col_indices, values, bits, in_features,
        lookup_table.dtype if dtype is None else dtype,
    )  # fmt: skip


def _refuse_tangents(*tensors: Tensor | None) -> None:
    """The dispatcher would drop the tangent of an op without a rule for it, and say nothing."""
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError(
            "SqueezeLLM layers have no derivative in forward mode (torch.func.jvp, jacfwd, "
            "forward_ad.dual_level); use reverse mode (backward), or dequantize() the model"
        )
