"""The ops in plain PyTorch, on every device: what all kernels are held against.

Accumulates in fp32 and rounds once, to the dtype of the result.
"""

from contextlib import AbstractContextManager, nullcontext
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


def _check(
    qweight: Tensor,
    lookup_table: Tensor,
    crow_indices: Tensor | None,
    col_indices: Tensor | None,
    values: Tensor | None,
    bits: int,
    in_features: int,
) -> None:
    packing.check_bits(bits)
    packing.check_qweight(qweight, bits, in_features)
    out_features = qweight.shape[0]
    if lookup_table.shape != (out_features, 2**bits) or not lookup_table.is_floating_point():
        raise ValueError(
            f"lookup_table must be a floating-point tensor [{out_features}, {2**bits}] "
            f"for bits={bits}, got {lookup_table.dtype} {list(lookup_table.shape)}"
        )
    sparse = (crow_indices, col_indices, values)
    if any(t is None for t in sparse) and not all(t is None for t in sparse):
        raise ValueError("crow_indices, col_indices and values must be given all or not at all")
    if crow_indices is not None and col_indices is not None and values is not None:
        csr.check_csr(
            crow_indices, col_indices, values, out_features=out_features, in_features=in_features
        )


def dequantize_fp32(
    qweight: Tensor,
    lookup_table: Tensor,
    crow_indices: Tensor | None,
    col_indices: Tensor | None,
    values: Tensor | None,
    bits: int,
    in_features: int,
) -> Tensor:
    """W[o, i] = table[o, index[o, i]] + sparse[o, i], fp32 [out_features, in_features]."""
    indices = packing.unpack(qweight, bits, in_features).to(torch.int64)
    weight = lookup_table.float().gather(1, indices)
    if crow_indices is not None and col_indices is not None and values is not None:
        rows = csr.row_indices(crow_indices, values.numel())
        weight[rows, csr.decode_columns(col_indices)] += values.float()
    return weight


def lut_dequantize(
    qweight: Tensor,
    lookup_table: Tensor,
    crow_indices: Tensor | None,
    col_indices: Tensor | None,
    values: Tensor | None,
    bits: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """See :func:`squeezellm_hf.ops.lut_dequantize`."""
    sparse = (crow_indices, col_indices, values)
    _check(qweight, lookup_table, *sparse, bits, in_features)
    return dequantize_fp32(qweight, lookup_table, *sparse, bits, in_features).to(dtype)


def lut_linear(
    x: Tensor,
    qweight: Tensor,
    lookup_table: Tensor,
    crow_indices: Tensor | None,
    col_indices: Tensor | None,
    values: Tensor | None,
    bias: Tensor | None,
    bits: int,
) -> Tensor:
    """See :func:`squeezellm_hf.ops.lut_linear`."""
    sparse = (crow_indices, col_indices, values)
    _check(qweight, lookup_table, *sparse, bits, x.shape[-1])
    weight = dequantize_fp32(qweight, lookup_table, *sparse, bits, x.shape[-1])
    bias = None if bias is None else bias.float()
    with _without_autocast(x.device.type):
        return torch.nn.functional.linear(x.float(), weight, bias).to(x.dtype)


def _without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Autocast would reach into the op, whose dtype is that of x."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def lut_linear_group(
    x: Tensor,
    qweight: list[Tensor],
    lookup_table: list[Tensor],
    crow_indices: list[Tensor | None],
    col_indices: list[Tensor | None],
    values: list[Tensor | None],
    bias: list[Tensor | None],
    bits: int,
    norm_weight: Tensor | None = None,
    norm_eps: float = 0.0,
    silu: int = -1,
    factor: Tensor | None = None,
    residual: Tensor | None = None,
) -> list[Tensor]:
    """One call after the other, by the kernels that there are for one; see ``schema.py``.

    Raises:
        ValueError or RuntimeError: naming the weight by its place in the lists, or the argument.
    """
    lists = (qweight, lookup_table, crow_indices, col_indices, values, bias)
    if len({len(tensors) for tensors in lists}) > 1:
        raise ValueError("the lists must be of one length")
    if norm_weight is not None and factor is not None:
        raise ValueError("norm_weight and factor must not both be given")
    if not -1 <= silu < len(qweight):
        raise ValueError(f"silu must be the place of a weight, or -1, got {silu}")
    if residual is not None and len(qweight) != 1:
        raise ValueError(f"residual is for one weight, got {len(qweight)}")
    if norm_weight is not None:
        _check_like("norm_weight", norm_weight, x, x.shape[-1:])
        x = rms_norm(x, norm_weight, norm_eps)
    elif factor is not None:
        _check_like("factor", factor, x, x.shape)
        x = x * factor
    results = []
    for index, tensors in enumerate(zip(*lists, strict=True)):
        try:
            results.append(torch.ops.squeezellm_hf.lut_linear_no_grad(x, *tensors, bits))
        except (ValueError, RuntimeError) as error:
            raise type(error)(f"weight {index} of the group: {error}") from error
    if silu >= 0:
        results[silu] = torch.nn.functional.silu(results[silu])
    if residual is not None:
        _check_like("residual", residual, x, results[0].shape)
        results[0] += residual
    return results


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) in fp32, rounded to the dtype of x, times ``weight``."""
    x32 = x.float()
    return weight * (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def _check_like(name: str, tensor: Tensor, x: Tensor, shape: torch.Size) -> None:
    if tensor.dtype != x.dtype or tensor.shape != shape:
        raise ValueError(
            f"{name} must have the dtype of x and the shape {list(shape)}, "
            f"got {tensor.dtype} {list(tensor.shape)}"
        )


# Not as decorators: those leave None behind instead of the function.
for _name in (LUT_DEQUANTIZE, LUT_DEQUANTIZE_REFERENCE):
    torch.library.impl(_name, "CompositeExplicitAutograd")(lut_dequantize)
for _name in (LUT_LINEAR, LUT_LINEAR_NO_GRAD, LUT_LINEAR_REFERENCE):
    torch.library.impl(_name, "CompositeExplicitAutograd")(lut_linear)
torch.library.impl(LUT_LINEAR_GROUP, "CompositeExplicitAutograd")(lut_linear_group)
