"""The same weights with sorted 16-bit tables, against fp64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from squeezellm_hf.formats.legacy import check_layer
from squeezellm_hf.methods.squeezellm import transcode as module
from squeezellm_hf.methods.squeezellm.transcode import Transcoded, transcode
from squeezellm_hf.nn import SqueezeLLMLinear
from squeezellm_hf.ops import lut_dequantize
from tests.legacy_writer import Layer, random_layer


def transcoded(layer: Layer, table_dtype: torch.dtype | None = None) -> Transcoded:
    read = check_layer(layer.tensors())
    cells, sums = read.sparse_sum()
    return transcode(
        read.indices,
        read.lookup_table,
        cells,
        sums,
        bits=read.bits,
        in_features=read.in_features,
        table_dtype=table_dtype,
        name="m.weight",
    )


def dequantized(tensors: dict[str, Tensor], layer: Layer) -> NDArray[np.float32]:
    return lut_dequantize(
        **tensors, bits=layer.bits, in_features=len(layer.indices[0]), dtype=torch.float32
    ).numpy()


def exact(layer: Layer) -> NDArray[np.float32]:
    return layer.weight().astype(np.float32)


FP16 = st.floats(-4, 4, width=16)


@st.composite
def half_layers(draw: st.DrawFn) -> Layer:
    """Layers of fp16 numbers in which each cell has at most one sparse value."""
    seed = draw(st.integers(0, 2**32))
    out_features, in_features = draw(st.integers(1, 6)), 32 * draw(st.integers(1, 4))
    return random_layer(
        np.random.default_rng(seed),
        out_features,
        in_features,
        draw(st.sampled_from([3, 4])),
        sparse=draw(st.booleans()),
        full_rows=draw(st.integers(0, out_features)),
        scale=draw(st.sampled_from([1e-3, 0.1, 10.0])),
    )


@settings(max_examples=60, deadline=None)
@given(half_layers())
def test_fp16_layers_stay_the_same_weights(layer: Layer) -> None:
    result = transcoded(layer)
    assert result.error == 0
    assert {t.dtype for n, t in result.tensors.items() if n in ("lookup_table", "values")} == {
        torch.float16
    }
    assert bool((result.tensors["lookup_table"].float().diff(dim=1) >= 0).all())
    np.testing.assert_array_equal(dequantized(result.tensors, layer), exact(layer))


@settings(max_examples=40, deadline=None)
@given(half_layers(), st.data())
def test_cells_with_several_values_become_one(layer: Layer, data: st.DataObject) -> None:
    """The tensors are a sound layer; a sum that fp16 cannot hold takes fp32."""
    inputs = len(layer.indices[0])
    entry = st.tuples(st.integers(0, inputs - 1), FP16)
    layer.csr = [data.draw(st.lists(entry, max_size=8)) for _ in layer.indices]
    result = transcoded(layer)
    linear = SqueezeLLMLinear.from_tensors(result.tensors, bits=layer.bits, in_features=inputs)
    assert linear.nnz <= sum(map(len, layer.csr)) + len(layer.full_rows or []) * inputs
    error = np.abs(linear.dequantize(torch.float32).numpy() - exact(layer)).max()
    assert error == result.error
    assert error <= 2.0**-24 * np.abs(layer.weight()).max()


@pytest.mark.parametrize(
    ("scale", "dtype", "expected"),
    [
        (1.0, torch.float16, torch.float16),
        (2.0**100, torch.bfloat16, torch.bfloat16),
        (1.0, torch.float32, torch.float32),
    ],
)
def test_the_first_dtype_that_is_exact(
    scale: float, dtype: torch.dtype, expected: torch.dtype
) -> None:
    layer = random_layer(np.random.default_rng(0), 5, 64, 4, sparse=True)
    table = torch.tensor(layer.table).to(dtype).double() * scale
    if dtype == torch.float32:
        table += 2.0**-20
    layer.table = table.tolist()
    # Powers of two, which each of the dtypes holds.
    layer.csr = [[(c, 0.125 * scale) for c, _ in row] for row in layer.csr or []]
    result = transcoded(layer)
    assert result.error == 0
    assert result.tensors["lookup_table"].dtype == expected
    np.testing.assert_array_equal(dequantized(result.tensors, layer), exact(layer))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([torch.float16, torch.bfloat16]))
def test_a_dtype_that_rounds_tells_its_error(seed: int, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(seed)
    layer = random_layer(rng, 5, 64, 3, sparse=True, full_rows=1, half=False)
    result = transcoded(layer, dtype)
    difference = np.abs(dequantized(result.tensors, layer).astype(np.float64) - layer.weight())
    assert result.error > 0
    assert difference.max() == pytest.approx(result.error, rel=1e-6)
    unit = 2.0**-11 if dtype == torch.float16 else 2.0**-8
    assert result.error <= unit * max(abs(v) for row in layer.table for v in row) + 2.0**-25


def test_sparse_cells_are_exact_beside_a_rounded_table() -> None:
    layer = random_layer(np.random.default_rng(1), 8, 64, 4, sparse=True, half=False)
    layer.csr = [[(c, float(np.float16(v))) for c, v in row] for row in layer.csr or []]
    result = transcoded(layer, torch.float16)
    got = dequantized(result.tensors, layer)
    cells = [(o, c) for o, row in enumerate(layer.csr) for c, _ in row]
    assert cells
    for o, c in cells:
        assert got[o, c] == np.float32(layer.weight()[o, c])


def test_rows_in_chunks_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = random_layer(np.random.default_rng(2), 11, 64, 3, sparse=True, full_rows=2)
    whole = transcoded(layer).tensors
    monkeypatch.setattr(module, "CELLS_PER_CHUNK", 3 * 64)
    parts = transcoded(layer).tensors
    assert whole.keys() == parts.keys()
    assert all(whole[name].equal(parts[name]) for name in whole)


@pytest.mark.parametrize("place", ["table", "sum"])
def test_values_out_of_range(place: str) -> None:
    layer = random_layer(np.random.default_rng(0), 4, 32, 3)
    if place == "table":
        layer.table[1][2] = 70000.0
    else:
        layer.csr = [[(0, 140000.0)], [], [], []]
    assert transcoded(layer).error == 0
    with pytest.raises(ValueError, match=r"m\.weight holds .* too large for float16"):
        transcoded(layer, torch.float16)


def test_a_sum_beyond_fp32() -> None:
    layer = random_layer(np.random.default_rng(0), 4, 32, 3)
    layer.csr = [[(0, 3e38), (0, 3e38)], [], [], []]
    with pytest.raises(ValueError, match=r"m\.weight holds .* too large for float32"):
        transcoded(layer)
