"""lut_linear on CUDA against fp64 numpy: every width, dtype, odd shapes, batches of every path."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from squeezellm_hf import ops
from tests.ops.cuda_calls import (
    BATCHES,
    DTYPES,
    FUSED_BITS,
    MANY_ROWS,
    SHAPES,
    as_multiplied,
    assert_close,
    linear,
    needs_cuda,
    on_gpu,
    torch_slack,
)
from tests.ops.oracle import TORCH_DTYPES, Weight, make_weight, make_x

pytestmark = needs_cuda


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", range(1, 9))
def test_all_shapes_and_batches(bits: int, dtype: str) -> None:
    for shape in SHAPES:
        for density in (0.0, 0.05):
            weight = make_weight(*shape, bits, density=density, table_dtype=dtype)
            x = make_x(max(BATCHES), shape[1], dtype)
            for batch in BATCHES if bits in FUSED_BITS else (1, 9):
                y = linear(x[:batch], weight)
                expected = as_multiplied(weight, batch, dtype)
                assert_close(y, x[:batch], expected, slack=torch_slack(batch, weight))


@pytest.mark.parametrize("density", [0.0, 0.01])
@pytest.mark.parametrize("bits", FUSED_BITS)
def test_few_activations_of_many_rows(bits: int, density: float) -> None:
    weight = make_weight(*MANY_ROWS, bits, density=density, table_dtype="bf16")
    for batch in (9, 20, 32):
        x = make_x(batch, MANY_ROWS[1], "bf16")
        assert_close(linear(x, weight), x, as_multiplied(weight, batch, "bf16"))


@pytest.mark.parametrize("density", [0.0, 0.005])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", FUSED_BITS)
def test_few_activations_of_long_rows(bits: int, dtype: str, density: float) -> None:
    """Rings that are gone through many times, columns that divide unevenly among blocks."""
    for shape in ((260, 11008), (140, 28672 + 640)):
        weight = make_weight(*shape, bits, density=density, table_dtype=dtype)
        x = make_x(64, shape[1], dtype)
        for batch in (4, 5, 8, 9, 16, 17, 32, 33, 64):
            assert_close(linear(x[:batch], weight), x[:batch], weight)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("bits", FUSED_BITS)
def test_small_batches_of_many_rows(bits: int, sparse: bool) -> None:
    """On an H200: two small blocks a multiprocessor, and one large one with three tiles."""
    for rows in (2200, 4300):
        weight = make_weight(
            rows, 256, bits, density=0.02 * sparse, empty_rows=sparse, full_row=sparse,
            table_dtype="bf16", seed=rows,
        )  # fmt: skip
        x = make_x(8, 256, "bf16")
        for batch in (1, 2, 3, 4, 5, 8):
            assert_close(linear(x[:batch], weight), x[:batch], weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", FUSED_BITS)
def test_tiles_that_blocks_share(bits: int, dtype: str) -> None:
    """On an H200, three tiles for some two blocks, and two for others; the last one cut short."""
    weight = make_weight(
        2200, 8200, bits, density=0.004, empty_rows=True, full_row=True, table_dtype=dtype
    )
    x = make_x(8, 8200, dtype)
    bias = torch.linspace(-1, 1, 2200)
    for batch in (1, 2, 3, 8):
        y = linear(x[:batch], weight, bias)
        assert_close(y, x[:batch], weight, bias.double().numpy())
        again = [linear(x[:batch], weight, bias) for _ in range(20)]
        assert all(torch.equal(y, other) for other in again)


@pytest.mark.parametrize(("rows", "dtype"), [(11000, "bf16"), (10997, "fp16")])
@pytest.mark.parametrize("bits", FUSED_BITS)
def test_larger_batches_of_many_rows(bits: int, rows: int, dtype: str) -> None:
    """On an H200: one tile a block and several, tiles that blocks share, one cut short."""
    weight = make_weight(rows, 2048, bits, table_dtype=dtype)
    x = make_x(700, 2048, dtype)
    bias = torch.linspace(-1, 1, rows)
    for batch in (65, 100, 256, 300, 500, 700):
        y = linear(x[:batch], weight, bias)
        assert_close(y, x[:batch], as_multiplied(weight, batch, dtype), bias.double().numpy())


@pytest.mark.parametrize("density", [0.0, 0.005])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_activation_of_many_2_bit_weights(dtype: str, density: float) -> None:
    """From 24 M weights on, compute capability 9.0 counts bits of weights and of x."""
    for shape in ((8200, 3128), (6150, 4096), (880, 28672)):
        weight = make_weight(*shape, 2, density=density, empty_rows=True, table_dtype=dtype)
        x = make_x(1, shape[1], dtype)
        outlier = x.clone()
        outlier[0, 77] = -3000
        tensors = on_gpu(weight)
        for values in (x, outlier, torch.zeros_like(x), x * 2.0**-10):
            y = linear(values, weight)
            assert_close(y, values, weight)
            again = [ops.lut_linear(values.cuda(), **tensors, bits=2).cpu() for _ in range(20)]
            assert all(torch.equal(y, other) for other in again)
        outlier[0, 77] = float("nan")
        assert linear(outlier, weight).isnan().all()


@settings(max_examples=120, deadline=None)
@given(
    out_features=st.integers(1, 400),
    # Half of them of a length that is read 16 bytes at a time at every width.
    in_features=st.one_of(st.integers(1, 1500), st.integers(1, 12).map(lambda n: n * 128)),
    bits=st.sampled_from([2, 3, 4, 4, 5]),
    batch=st.one_of(st.integers(1, 8), st.integers(9, 300)),
    density=st.sampled_from([0.0, 0.001, 0.0045, 0.05]),
    empty_rows=st.booleans(),
    full_row=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_weight(
    out_features: int, in_features: int, bits: int, batch: int, density: float, empty_rows: bool,
    full_row: bool, dtype: str, seed: int,
) -> None:  # fmt: skip
    """Rows with none, some and very many sparse values; outputs poisoned."""
    weight = make_weight(
        out_features, in_features, bits, density=density, empty_rows=empty_rows,
        full_row=full_row, table_dtype=dtype, seed=seed,
    )  # fmt: skip
    x = make_x(batch, in_features, dtype, seed)
    expected = as_multiplied(weight, batch, dtype)
    assert_close(linear(x, weight), x, expected, slack=torch_slack(batch, weight))


@pytest.mark.parametrize("bits", FUSED_BITS)
@pytest.mark.parametrize("batch", [1, 8, 40])
def test_tables_are_rounded_to_the_dtype_of_x(bits: int, batch: int) -> None:
    weight = make_weight(64, 512, bits, table_dtype="fp16")
    rounded = Weight(bits, weight.tensors, weight.rounded("bf16"))
    x = make_x(batch, 512, "bf16")
    assert_close(linear(x, weight), x, rounded)


@pytest.mark.parametrize("batch", [1, 4, 20])
def test_bf16_tables_may_leave_the_range_of_an_fp16_x(batch: int) -> None:
    weight = make_weight(16, 128, 4, table_dtype="bf16")
    weight.tensors["lookup_table"].mul_(2.0**20)
    large = Weight(4, weight.tensors, weight.matrix * 2.0**20)
    x = (make_x(batch, 128, "fp16") * 2.0**-10).to(torch.float16)
    y = linear(x, large)
    assert torch.isfinite(y).all()
    assert_close(y, x, large, slack=1e-2)


@pytest.mark.parametrize("batch", [1, 16, 300])
@pytest.mark.parametrize("bias_dtype", ["fp32", "bf16", "fp16"])
def test_bias(batch: int, bias_dtype: str) -> None:
    weight = make_weight(40, 256, 4)
    bias = torch.linspace(-3, 3, 40).to(TORCH_DTYPES[bias_dtype])
    x = make_x(batch, 256, "fp16")
    slack = 1e-2 if batch == 300 else 0
    assert_close(linear(x, weight, bias), x, weight, bias.double().numpy(), slack)


def test_fp32_activations() -> None:
    weight = make_weight(40, 256, 4, density=0.05)
    for batch in (1, 30):
        x = make_x(batch, 256, "fp32")
        assert_close(linear(x, weight), x, weight, slack=2e-3)  # torch may be allowed TF32
