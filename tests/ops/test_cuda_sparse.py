"""Sparse parts on CUDA: rows of every kind, and row pointers and columns that lead nowhere."""

import pytest
import torch

from squeezellm_hf import ops
from tests.ops.cuda_calls import (
    DTYPES,
    FUSED_BITS,
    as_multiplied,
    assert_close,
    linear,
    needs_cuda,
    on_gpu,
)
from tests.ops.oracle import make_weight, make_x

pytestmark = needs_cuda


@pytest.mark.parametrize("batch", [1, 2, 3, 8, 16, 50])
@pytest.mark.parametrize("table_dtype", ["fp16", "fp32"])
def test_sparse_rows_of_every_kind(batch: int, table_dtype: str) -> None:
    """Full rows, empty rows, both widths of column; more values than a warp takes alone."""
    for density, empty, wide in [(1.0, False, False), (0.9, True, True), (0.01, True, False)]:
        weight = make_weight(
            26, 1024, 3, density=density, empty_rows=empty, table_dtype=table_dtype,
            wide_columns=wide,
        )  # fmt: skip
        x = make_x(batch, 1024, "fp16")
        # The dense part alone is rounded to the dtype of x.
        expected = as_multiplied(weight, batch, "fp16")
        assert_close(linear(x, weight), x, expected, slack=0 if table_dtype == "fp16" else 5e-4)


@pytest.mark.parametrize("batch", [65, 127, 200, 384, 512])
@pytest.mark.parametrize("bits", FUSED_BITS)
def test_sparse_rows_of_every_kind_beyond_64_activations(bits: int, batch: int) -> None:
    """Pages of no entry, a few and all cells; rows and columns that end within one."""
    for shape in ((200, 1152), (66, 640)):
        for density, empty, wide in [(1.0, False, False), (0.3, True, True), (0.003, True, False)]:
            weight = make_weight(
                *shape, bits, density=density, empty_rows=empty, full_row=density < 0.1,
                table_dtype="fp16", wide_columns=wide,
            )  # fmt: skip
            x = make_x(batch, shape[1], "fp16")
            expected = as_multiplied(weight, batch, "fp16")
            first = linear(x, weight)
            assert_close(first, x, expected)
            for _ in range(3):
                assert torch.equal(linear(x, weight), first)


@pytest.mark.parametrize("batch", [5, 12, 24, 40, 64, 100])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_full_row_among_short_ones(batch: int, dtype: str) -> None:
    """It is shared among more warps than the others; rows and columns that divide unevenly."""
    for shape in ((150, 9024), (9000, 288)):
        weight = make_weight(
            *shape, 4, density=0.004, empty_rows=True, full_row=True, table_dtype=dtype
        )
        x = make_x(batch, shape[1], dtype)
        assert_close(linear(x, weight), x, as_multiplied(weight, batch, dtype))


@pytest.mark.parametrize("batch", [1, 8, 12, 20, 40, 100, 300])
def test_no_row_pointer_or_column_leads_out_of_bounds(batch: int) -> None:
    """Not more than that it runs: compute-sanitizer sees the accesses."""
    weight = on_gpu(make_weight(64, 512, 4, density=0.05))
    generator = torch.Generator(device="cuda").manual_seed(0)
    for name in ("crow_indices", "col_indices"):
        limits = torch.iinfo(weight[name].dtype)
        weight[name].random_(limits.min, limits.max, generator=generator)
    x = make_x(batch, 512, "fp16").cuda()
    assert ops.lut_linear(x, **weight, bits=4).shape == (batch, 64)
    matrix = ops.lut_dequantize(**weight, bits=4, in_features=512)
    torch.cuda.synchronize()
    assert matrix.shape == (64, 512)


@pytest.mark.parametrize("batch", [1, 8, 12, 20, 40, 100, 300])
def test_row_pointers_at_the_ends_of_int32_hold_nothing(batch: int) -> None:
    """A lane's place beyond such a pointer, or a row's length, must not wrap around."""
    weight = make_weight(64, 512, 4, density=0.05)
    tensors = on_gpu(weight)
    limits = torch.iinfo(torch.int32)
    pointers = tensors["crow_indices"]
    pointers[0::2] = limits.max - 3
    pointers[1::2] = limits.min
    x = make_x(batch, 512, "fp16").cuda()
    empty = [row for row in range(64) if row % 2 == 0]  # from beyond the last entry to before it
    y = ops.lut_linear(x, **tensors, bits=4)[:, empty]
    dense = {name: tensors[name] for name in ("qweight", "lookup_table")}
    torch.testing.assert_close(y, ops.lut_linear(x, **dense, bits=4)[:, empty], rtol=1e-2, atol=0.1)
