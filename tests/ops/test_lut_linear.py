"""lut_linear against fp64 numpy: every instruction set, width, dtype, odd shapes and batches."""

from functools import cache, lru_cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from squeezellm_hf import ops
from squeezellm_hf.ops import native, reference
from tests.ops.oracle import TORCH_DTYPES, Product, Weight, assert_linear, make_weight, make_x

SHAPES = [(1, 1), (1, 77), (33, 1), (7, 33), (25, 127), (31, 1000), (49, 2051)]
BATCHES = [1, 2, 3, 7, 8, 9, 16, 33, 64, 65]
DTYPES = ["fp32", "bf16", "fp16"]
# Where AVX-512's bf16 instructions serve: above the batches, and beyond the widths, of the
# kernels that keep decoded weights in fp32 registers.
REGISTER_BATCH, REGISTER_BITS = 4, 4
# Up to this batch they multiply the sparse part on its own, unrounded.
SPARSE_BATCH = 16

cached_weight = lru_cache(maxsize=None)(make_weight)


MATRICES = {
    "exact": lambda weight: weight.matrix,
    "dense rounded": lambda weight: weight.dense_rounded("bf16"),
    "rounded": lambda weight: weight.rounded("bf16"),
}


@cache
def cached_case(
    out_features: int, in_features: int, bits: int, density: float, dtype: str
) -> tuple[Weight, torch.Tensor, dict[str, Product]]:
    """A weight, x, and their product with the exact weight and with its roundings to bf16."""
    weight = make_weight(out_features, in_features, bits, density=density)
    x = make_x(max(BATCHES), in_features, dtype)
    return weight, x, {name: Product(x, matrix(weight)) for name, matrix in MATRICES.items()}


def multiplied(weight: Weight, isa: str | None, dtype: str, batch: int) -> str:
    """Which of MATRICES the kernel multiplies with."""
    in_registers = batch <= REGISTER_BATCH and weight.bits <= REGISTER_BITS
    if isa != "avx512_bf16" or dtype != "bf16" or in_registers:
        return "exact"
    return "dense rounded" if batch <= SPARSE_BATCH else "rounded"


def check_batches(
    isa: str, shape: tuple[int, int], bits: int, density: float, dtype: str, batches: list[int]
) -> None:
    weight, x, products = cached_case(*shape, bits, density, dtype)
    for batch in batches:
        y = ops.lut_linear(x[:batch], **weight.tensors, bits=bits)
        assert y.shape[0] == batch
        products[multiplied(weight, isa, dtype, batch)].check(y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", range(1, 9))
def test_all_shapes_and_batches(instruction_set: str, bits: int, dtype: str) -> None:
    for shape in SHAPES:
        for density in (0.0, 0.05):
            check_batches(instruction_set, shape, bits, density, dtype, BATCHES)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("shape", [(576, 1536), (192, 576)])
def test_shapes_of_a_small_model(instruction_set: str, bits: int, shape: tuple[int, int]) -> None:
    for dtype in DTYPES:
        check_batches(instruction_set, shape, bits, 0.0045, dtype, [1, 4, 8, 65])


@pytest.mark.parametrize("batch", [1, 3, 9])
def test_sparse_rows_of_every_kind(instruction_set: str, batch: int) -> None:
    """Full rows, empty rows, both widths of column, every dtype of table and value."""
    for table_dtype in DTYPES:
        for density, empty, wide in [(1.0, False, False), (0.9, True, True), (0.01, True, False)]:
            weight = cached_weight(
                26, 300, 3, density=density, empty_rows=empty, table_dtype=table_dtype,
                wide_columns=wide,
            )  # fmt: skip
            x = make_x(batch, 300, "fp32")
            y = ops.lut_linear(x, **weight.tensors, bits=3)
            assert_linear(y, x, weight.matrix)


@pytest.mark.parametrize("batch", [1, 2, 12])
@pytest.mark.parametrize("bias_dtype", DTYPES)
def test_bias(instruction_set: str, bias_dtype: str, batch: int) -> None:
    weight = cached_weight(29, 70, 4, density=0.1)
    bias = torch.linspace(-3, 3, 58, dtype=TORCH_DTYPES[bias_dtype])[::2]
    x = make_x(batch, 70, "fp32")
    y = ops.lut_linear(x, **weight.tensors, bits=4, bias=bias)
    assert_linear(y, x, weight.matrix, bias.double().numpy())


@pytest.mark.parametrize("batch", [1, 5])
def test_infinite_table_entries_count_only_where_used(instruction_set: str, batch: int) -> None:
    """Padding of a row's last word must not look anything up."""
    for bits, in_features in [(1, 70), (2, 37), (3, 75), (4, 131), (5, 33)]:
        weight = make_weight(5, in_features, bits)
        for entry in range(2**bits):
            table = weight.tensors["lookup_table"].clone()
            table[0, entry] = float("inf")
            x = torch.ones(batch, in_features)
            y = ops.lut_linear(x, weight.tensors["qweight"], table, bits=bits)
            used = reference.dequantize_fp32(
                weight.tensors["qweight"], table, None, None, None, bits, in_features
            )[0].isinf()
            assert y[:, 0].isinf().all() == used.any()
            assert not y[:, 0].isnan().any()
            assert y[:, 1:].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_of_x(instruction_set: str, dtype: str) -> None:
    weight = cached_weight(17, 64, 4, density=0.05)
    for flat in (3, 24):
        base = make_x(flat * 2, 128, dtype)
        views = {
            "transposed": base[:flat, :64].t().contiguous().t(),
            "strided rows": base[::2, :64],
            "strided columns": base[:flat, ::2],
            "expanded": base[:1, :64].expand(flat, 64),
            "offset by one": base.view(-1)[1 : flat * 64 + 1].view(flat, 64),
        }
        for x in views.values():
            y = ops.lut_linear(x, **weight.tensors, bits=4)
            assert torch.equal(y, ops.lut_linear(x.clone(), **weight.tensors, bits=4))
        cube = base[:flat, :64].reshape(flat, 1, 64)
        expected = ops.lut_linear(base[:flat, :64], **weight.tensors, bits=4)
        assert torch.equal(ops.lut_linear(cube, **weight.tensors, bits=4)[:, 0], expected)
        single = ops.lut_linear(base[0, :64], **weight.tensors, bits=4)
        assert single.shape == (17,)


def test_empty_tensors(instruction_set: str) -> None:
    weight = cached_weight(5, 40, 4)
    for shape in [(0, 40), (2, 0, 40)]:
        y = ops.lut_linear(torch.empty(shape), **weight.tensors, bits=4)
        assert y.shape == (*shape[:-1], 5)
    no_rows = make_weight(0, 40, 4)
    assert ops.lut_linear(torch.ones(3, 40), **no_rows.tensors, bits=4).shape == (3, 0)
    table = torch.ones(5, 16)
    for batch in (1, 9):
        y = ops.lut_linear(
            torch.empty(batch, 0), torch.empty(5, 0, dtype=torch.int32), table, bits=4,
            bias=torch.arange(5.0),
        )  # fmt: skip
        assert torch.equal(y, torch.arange(5.0).expand(batch, 5))


def test_does_not_depend_on_threads(instruction_set: str) -> None:
    weight = cached_weight(601, 1000, 3, density=0.01)
    threads = torch.get_num_threads()
    try:
        for batch in (1, 2, 6, 40):
            x = make_x(batch, 1000, "fp32")
            results = []
            for n in (1, 2, 3, 7):
                torch.set_num_threads(n)
                results.append(ops.lut_linear(x, **weight.tensors, bits=3))
            assert all(torch.equal(results[0], other) for other in results[1:])
    finally:
        torch.set_num_threads(threads)


@settings(max_examples=150, deadline=None)
@given(
    out_features=st.integers(1, 50),
    in_features=st.integers(1, 600),
    bits=st.integers(1, 8),
    batch=st.integers(1, 20),
    density=st.sampled_from([0.0, 0.01, 0.5]),
    dtype=st.sampled_from(DTYPES),
    table_dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_weight(
    out_features: int, in_features: int, bits: int, batch: int, density: float, dtype: str,
    table_dtype: str, seed: int,
) -> None:  # fmt: skip
    """Every instruction set, and the PyTorch reference."""
    weight = make_weight(
        out_features, in_features, bits, density=density, table_dtype=table_dtype, seed=seed
    )
    x = make_x(batch, in_features, dtype, seed)
    absent = dict.fromkeys(("crow_indices", "col_indices", "values", "bias"))
    y = reference.lut_linear(x, **{**absent, **weight.tensors}, bits=bits)
    assert_linear(y, x, weight.matrix)
    try:
        for name in native.status().available:
            native.set_instruction_set(name)
            y = ops.lut_linear(x, **weight.tensors, bits=bits)
            matrix = MATRICES[multiplied(weight, name, dtype, batch)]
            assert_linear(y, x, matrix(weight))
    finally:
        if native.status().loaded:
            native.set_instruction_set(None)
