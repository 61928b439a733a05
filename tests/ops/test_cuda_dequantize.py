"""lut_dequantize on CUDA, and the derivatives that need it."""

import numpy as np
import pytest
import torch

from squeezellm_hf import ops
from squeezellm_hf.formats import csr, packing
from tests.ops.cuda_calls import DTYPES, FUSED_BITS, SHAPES, needs_cuda, on_gpu, poison
from tests.ops.oracle import ROUNDING, TORCH_DTYPES, make_weight, make_x

pytestmark = needs_cuda


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_dequantize(bits: int, dtype: str) -> None:
    for shape in [*SHAPES, (3, 20000)]:
        weight = make_weight(*shape, bits, density=0.05, table_dtype="fp16")
        poison(shape[0] * shape[1], TORCH_DTYPES[dtype])
        matrix = ops.lut_dequantize(
            **on_gpu(weight), bits=bits, in_features=shape[1], dtype=TORCH_DTYPES[dtype]
        )
        expected = torch.from_numpy(weight.matrix.astype(np.float32)).to(TORCH_DTYPES[dtype])
        assert torch.equal(matrix.cpu(), expected)


@pytest.mark.parametrize("table_dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("bits", FUSED_BITS)
def test_dequantize_rows_of_all_kinds(bits: int, table_dtype: str) -> None:
    """Rows of one segment and of several, with no, few and many sparse values each."""
    for shape in [(9, 2056), (40, 4096), (5, 8), (6, 28672)]:
        for density in (0.0, 0.0045, 0.05):
            weight = make_weight(
                *shape, bits, density=density, empty_rows=True, full_row=True,
                table_dtype=table_dtype, wide_columns=density == 0.05,
            )  # fmt: skip
            for dtype in DTYPES:
                poison(shape[0] * shape[1], TORCH_DTYPES[dtype])
                matrix = ops.lut_dequantize(
                    **on_gpu(weight), bits=bits, in_features=shape[1], dtype=TORCH_DTYPES[dtype]
                )
                expected = weight.matrix.astype(np.float32)
                assert torch.equal(matrix.cpu(), torch.from_numpy(expected).to(TORCH_DTYPES[dtype]))


@pytest.mark.parametrize("batch", [1, 7, 64])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_gradients(batch: int, dtype: str) -> None:
    """Of x, tables, sparse values and bias, against fp64."""
    weight = make_weight(48, 256, 4, density=0.05)
    tensors = on_gpu(weight)
    x, grad = make_x(batch, 256, dtype), make_x(batch, 48, dtype, seed=2)
    leaves = {
        "x": x.cuda(),
        "lookup_table": tensors["lookup_table"].float(),
        "values": tensors["values"].float(),
        "bias": torch.zeros(48, device="cuda"),
    }
    for leaf in leaves.values():
        leaf.requires_grad_()
    ops.lut_linear(**{**tensors, **leaves}, bits=4).backward(grad.cuda())

    grad_weight = grad.double().T @ x.double()
    matrix = torch.from_numpy(weight.matrix)
    indices = packing.unpack(weight.tensors["qweight"], 4, 256).long()
    rows = csr.row_indices(weight.tensors["crow_indices"], weight.tensors["values"].numel())
    columns = csr.decode_columns(weight.tensors["col_indices"])
    expected = {
        "x": grad.double() @ matrix,
        "lookup_table": torch.zeros(48, 16).double().scatter_add_(1, indices, grad_weight),
        "values": grad_weight[rows, columns],
        "bias": grad.double().sum(0),
    }
    relative = 4 * ROUNDING[x.dtype][0] + 1e-3  # torch may be allowed TF32
    for name, leaf in leaves.items():
        error = (leaf.grad.double().cpu() - expected[name]).norm() / expected[name].norm()
        assert error < (relative if name == "x" else 1e-3), name
