"""Schemas and fake kernels of the ops. Backends only implement what is declared here.

``lut_linear_no_grad`` is ``lut_linear`` without a derivative. A derivative that is registered from
Python is asked at every call, for 3.4 us, whether or not anything requires a gradient;
:func:`squeezellm_hf.ops.lut_linear` takes the one or the other.

``lut_linear_group`` is several calls of ``lut_linear_no_grad`` with the same x, one weight each. Of
its lists each has an entry a weight, None where that has none. What stands beside them in a
transformer's block may be part of the call, each step rounded to the dtype of x (a norm's scale may
be applied last, without a rounding of its own):

- ``norm_weight`` [in_features], ``norm_eps``: x is norm_weight * x / sqrt(mean(x^2) + norm_eps)
  (RMSNorm, arXiv 1910.07467, equation 4);
- ``silu``: of this weight of the lists, the result is silu of it (-1: of none), and
  ``factor``, shaped like x: x is x * factor (SwiGLU, arXiv 2002.05202, equation 6, by two calls);
- ``residual``, shaped like the result of the only weight: added to it.
"""

import torch
from torch import Tensor

NAMESPACE = "squeezellm_hf"

LUT_LINEAR = f"{NAMESPACE}::lut_linear"
LUT_LINEAR_NO_GRAD = f"{NAMESPACE}::lut_linear_no_grad"
LUT_LINEAR_GROUP = f"{NAMESPACE}::lut_linear_group"
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
torch.library.define(
    LUT_LINEAR_GROUP,
    "(Tensor x, Tensor[] qweight, Tensor[] lookup_table, Tensor?[] crow_indices, "
    "Tensor?[] col_indices, Tensor?[] values, Tensor?[] bias, int bits, "
    "Tensor? norm_weight=None, float norm_eps=0.0, int silu=-1, "
    "Tensor? factor=None, Tensor? residual=None) "
    "-> Tensor[]",
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


@torch.library.register_fake(LUT_LINEAR_GROUP)
def _(
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
    return [x.new_empty(*x.shape[:-1], weight.shape[0]) for weight in qweight]


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
