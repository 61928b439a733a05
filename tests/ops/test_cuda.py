"""The CUDA kernels against fp64 numpy: every width, dtype, odd shapes, batches of every path."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from squeezellm_hf import ops
from squeezellm_hf.formats import csr, packing
from squeezellm_hf.ops import native
from tests.ops.oracle import ROUNDING, TORCH_DTYPES, Weight, make_weight, make_x

pytestmark = pytest.mark.skipif(
    not (native.status().cuda_loaded and torch.cuda.is_available()),
    reason=f"no CUDA device, or no CUDA kernels: {native.status().cuda_reason}",
)

# The last three can be read 16 bytes at a time; the others take the kernels' other ways.
SHAPES = [(1, 1), (1, 77), (33, 1), (49, 2051), (18, 576), (130, 1536), (200, 512), (31, 8192)]
MANY_ROWS = (4109, 256)  # of which few activations take another way than of few
# Small batches; tensor cores with 16 to 256 columns; dequantization and torch's product.
BATCHES = [1, 2, 3, 4, 7, 8, 9, 16, 17, 33, 65, 129, 256, 300, 600, 1100, 2100]
FUSED_BITS = (2, 3, 4)  # other widths are dequantized and left to torch
SMALL_BATCH = 8  # up to here, sparse values are multiplied as they are
DTYPES = ["fp16", "bf16"]


def on_gpu(weight: Weight) -> dict[str, Tensor]:
    return {name: tensor.cuda() for name, tensor in weight.tensors.items()}


def poison(elements: int, dtype: torch.dtype) -> None:
    """Leave NaN in the memory that the next output of this size will get."""
    blocks = [torch.full((elements,), float("nan"), dtype=dtype, device="cuda") for _ in range(2)]
    del blocks


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    poison(x.shape[0] * weight.matrix.shape[0], x.dtype)
    tensors = on_gpu(weight)
    bias = None if bias is None else bias.cuda()
    return ops.lut_linear(x.cuda(), **tensors, bits=weight.bits, bias=bias).cpu()


def assert_close(y: Tensor, x: Tensor, weight: Weight, bias: float = 0.0, slack: float = 0) -> None:
    """y is x W^T within 4e-5 (more by ``slack``) of the sum of absolute products, and rounding."""
    x64 = x.double().numpy()
    expected = x64 @ weight.matrix.T + bias
    scale = np.abs(x64) @ np.abs(weight.matrix).T
    relative, absolute = ROUNDING[x.dtype]
    limit = (4e-5 + slack) * scale + 1e-6 + 1.01 * relative * np.abs(expected) + absolute
    error = np.abs(y.double().numpy() - expected) / limit
    assert y.dtype == x.dtype
    assert (error <= 1).all(), f"worst error is {np.nanmax(error):.2f} of the limit"


def is_aligned(weight: Weight) -> bool:
    return weight.matrix.shape[1] % 8 == 0 and weight.tensors["qweight"].shape[1] % 4 == 0


def has_warpgroups() -> bool:
    return torch.cuda.get_device_capability()[0] == 9


def most_fused(weight: Weight) -> int:
    """The largest batch for which the weight is not dequantized first."""
    if not has_warpgroups():
        return 128
    return 512 if "values" in weight.tensors else 2048


def torch_slack(batch: int, weight: Weight) -> float:
    """torch's own product may add partial sums in 16 bits; where it serves, more is allowed."""
    fused = batch <= SMALL_BATCH or (is_aligned(weight) and batch <= most_fused(weight))
    return 0.0 if fused and weight.bits in FUSED_BITS else 1e-2


def as_multiplied(weight: Weight, batch: int, dtype: str) -> Weight:
    """The weight that a call of ``batch`` rows multiplies, its matrix rounded where that is done.

    On compute capability 9.0 and beyond 64 rows, sparse values are added to the dense part before
    the product; that sum is rounded to the dtype of x, as :func:`ops.lut_dequantize` rounds it
    (each of the two before, which changes nothing if they are of that dtype).
    """
    rounds = has_warpgroups() and batch > 64 and weight.bits in FUSED_BITS and is_aligned(weight)
    return Weight(weight.bits, weight.tensors, weight.rounded(dtype)) if rounds else weight


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


@pytest.mark.parametrize("density", [0.0, 0.01])
@pytest.mark.parametrize("batch", [1, 8, 16, 24, 64, 256])
def test_results_are_bit_identical(batch: int, density: float) -> None:
    weight = on_gpu(make_weight(300, 2048, 4, density=density))
    x = make_x(batch, 2048, "fp16").cuda()
    first = ops.lut_linear(x, **weight, bits=4)
    for _ in range(100):
        assert torch.equal(ops.lut_linear(x, **weight, bits=4), first)


@pytest.mark.parametrize("density", [0.0, 0.005])
@pytest.mark.parametrize("batch", [1, 4, 8, 12, 24, 40])
@pytest.mark.parametrize("bits", FUSED_BITS)
def test_thousands_of_calls_one_behind_the_other(bits: int, batch: int, density: float) -> None:
    """Blocks that go through many short tiles, at whatever pace: as calls follow in a graph."""
    # Of 2 bits enough for one activation to be multiplied by counting bits.
    columns = 2048 if bits == 2 and batch == 1 else 1024
    made = make_weight(14336, columns, bits, density=density)
    weight, x = on_gpu(made), make_x(batch, columns, "fp16")
    on_device = x.cuda()
    expected = ops.lut_linear(on_device, **weight, bits=bits)
    assert_close(expected.cpu(), x, as_multiplied(made, batch, "fp16"))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [ops.lut_linear(on_device, **weight, bits=bits) for _ in range(100)]
    for _ in range(40):
        for y in outputs:
            y.fill_(float("nan"))
        graph.replay()
        assert all(torch.equal(y, expected) for y in outputs)


@pytest.mark.parametrize(
    ("shape", "density", "batch"),
    [((4096, 1024), density, batch) for density in (0.0, 0.005) for batch in (12, 24, 40)]
    + [((11000, 2048), 0.0, batch) for batch in (100, 500)],
)
def test_calls_one_behind_the_other_have_memory_of_their_own(
    shape: tuple[int, int], density: float, batch: int
) -> None:
    """Calls in a graph take the same memory in turn: for copies of x, and sums for other blocks."""
    weight = on_gpu(make_weight(*shape, 4, density=density))
    xs = [make_x(batch, shape[1], "bf16", seed).cuda() for seed in range(3)]
    expected = [ops.lut_linear(x, **weight, bits=4) for x in xs]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [ops.lut_linear(xs[i % 3], **weight, bits=4) for i in range(60)]
    for _ in range(40):
        for y in outputs:
            y.fill_(float("nan"))
        graph.replay()
        assert all(torch.equal(y, expected[i % 3]) for i, y in enumerate(outputs))


@pytest.mark.parametrize("batch", [1, 8, 40, 300])
def test_graphs_and_streams(batch: int) -> None:
    weight = on_gpu(make_weight(130, 512, 4, density=0.01))
    x = make_x(batch, 512, "fp16").cuda()
    expected = ops.lut_linear(x, **weight, bits=4)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        beside = ops.lut_linear(x, **weight, bits=4)
    stream.synchronize()
    assert torch.equal(beside, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = ops.lut_linear(x, **weight, bits=4)
    for _ in range(3):
        replayed.fill_(float("nan"))
        graph.replay()
        assert torch.equal(replayed, expected)


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


def test_views_and_empty_batches() -> None:
    weight = make_weight(33, 128, 4)
    wide = make_x(5, 256, "fp16")
    x = wide[:, 3:131]
    assert_close(ops.lut_linear(x.cuda(), **on_gpu(weight), bits=4).cpu(), x, weight)
    assert ops.lut_linear(x[:0].cuda(), **on_gpu(weight), bits=4).shape == (0, 33)
    assert ops.lut_linear(x[None].cuda(), **on_gpu(weight), bits=4).shape == (1, 5, 33)


def test_opcheck() -> None:
    weight = on_gpu(make_weight(20, 128, 3, density=0.05))
    sparse = (weight["crow_indices"], weight["col_indices"], weight["values"])
    x = make_x(3, 128, "fp16").cuda()
    for op in (torch.ops.squeezellm_hf.lut_linear, torch.ops.squeezellm_hf.lut_linear_no_grad):
        torch.library.opcheck(
            op.default, (x, weight["qweight"], weight["lookup_table"], *sparse, None, 3)
        )
    torch.library.opcheck(
        torch.ops.squeezellm_hf.lut_dequantize,
        (weight["qweight"], weight["lookup_table"], *sparse, 3, 128, torch.float16),
    )


def test_tensors_on_several_devices_are_refused() -> None:
    weight = on_gpu(make_weight(20, 128, 3))
    weight["lookup_table"] = weight["lookup_table"].cpu()
    with pytest.raises((ValueError, RuntimeError), match="lookup_table must be on the CUDA device"):
        ops.lut_linear(make_x(3, 128, "fp16").cuda(), **weight, bits=3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_second_device() -> None:
    weight = make_weight(70, 256, 4, density=0.01)
    x = make_x(20, 256, "fp16")
    tensors = {name: tensor.to("cuda:1") for name, tensor in weight.tensors.items()}
    for batch in (1, 20):
        y = ops.lut_linear(x[:batch].to("cuda:1"), **tensors, bits=4)
        assert y.device == torch.device("cuda:1")
        assert_close(y.cpu(), x[:batch], weight)
