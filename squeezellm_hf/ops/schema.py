"""Schemas and fake kernels of the ops. Backends only implement what is declared here.

``lut_linear_no_grad`` is ``lut_linear`` without a derivative. A derivative that is registered from
Python is asked at every call, for 3.4 us, whether or not anything requires a gradient;
:func:`squeezellm_hf.ops.lut_linear` takes the one or the other.
"""

import torch
from torch import Tensor

NAMESPACE = "squeezellm_hf"

LUT_LINEAR = f"{NAMESPACE}::lut_linear"
LUT_LINEAR_NO_GRAD = f"{NAMESPACE}::lut_linear_no_grad"
LUT_DEQUANTIZE = f"{NAMESPACE}::lut_dequantize"
# The same for models that are to run on plain PyTorch: no library has kernels for these.
LUT_LINEAR_REFERENCE = f"{NAMESPACE}::lut_linear_reference"
LUT_DEQUANTIZE_REFERENCE = f"{NAMESPACE}::lut_dequantize_reference"

for _name in (LUT_LINEAR, LUT_LINEAR_NO_GRAD, LUT_LINEAR_REFERENCE):
    torch.library.define(
        _name,
        "(Tensor x, Tensor qweight, Tensor lookup_table, Tensor? crow_indices, "
        "Tensor? col_indices, Tensor? values, Tensor? bias, int bits) -> Tensor",
    )
for _name in (LUT_DEQUANTIZE, LUT_DEQUANTIZE_REFERENCE):
    torch.library.define(
        _name,
        "(Tensor qweight, Tensor lookup_table, Tensor? crow_indices, Tensor? col_indices, "
        "Tensor? values, int bits, int in_features, ScalarType dtype) -> Tensor",
    )


@torch.library.register_fake(LUT_LINEAR)
@torch.library.register_fake(LUT_LINEAR_NO_GRAD)
@torch.library.register_fake(LUT_LINEAR_REFERENCE)
def _(
    x: Tensor,
    qweight: Tensor,
    lookup_table: Tensor,
    crow_indices: Tensor | None,
    col_indices: Tensor | None,
    values: Tensor | None,
    bias: Tensor | None,
    bits: int,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], qweight.shape[0])


@torch.library.register_fake(LUT_DEQUANTIZE)
@torch.library.register_fake(LUT_DEQUANTIZE_REFERENCE)
def _(
    qweight: Tensor,
    lookup_table: Tensor,
    crow_indices: Tensor | None,
    col_indices: Tensor | None,
    values: Tensor | None,
    bits: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    return lookup_table.new_empty(qweight.shape[0], in_features, dtype=dtype)
