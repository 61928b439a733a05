"""The layer of the public SqueezeLLM code, against files written in plain loops."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from squeezellm_hf.formats import packing
from squeezellm_hf.formats.legacy import LegacyLayer, check_layer
from tests.legacy_writer import Layer, random_layer


def dequantize(layer: LegacyLayer) -> np.ndarray:
    indices = layer.indices(slice(0, layer.out_features)).long()
    weight = layer.lookup_table.double().gather(1, indices)
    cells, sums = layer.sparse_sum()
    weight.view(-1)[cells] += sums
    return weight.numpy()


FLOATS = st.floats(-4, 4, width=16)


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    """Small layers with anything that the format allows: cells twice, full rows over CSR cells."""
    bits = draw(st.sampled_from([3, 4]))
    out_features = draw(st.integers(1, 5))
    in_features = 32 * draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    layer = random_layer(rng, out_features, in_features, bits)
    if draw(st.booleans()):
        entry = st.tuples(st.integers(0, in_features - 1), FLOATS)
        layer.csr = [draw(st.lists(entry, max_size=6)) for _ in range(out_features)]
    if draw(st.booleans()):
        rows = draw(st.lists(st.integers(0, out_features - 1), max_size=3))
        layer.full_rows = [(o, rng.standard_normal(in_features).round(2).tolist()) for o in rows]
    return layer


@settings(max_examples=60, deadline=None)
@given(layers())
def test_the_weight_is_what_the_format_says(layer: Layer) -> None:
    tensors = layer.tensors()
    read = check_layer(tensors)
    assert (read.bits, read.out_features) == (layer.bits, len(layer.indices))
    assert read.in_features == len(layer.indices[0])
    assert read.indices(slice(0, read.out_features)).tolist() == layer.indices
    # fp32 is what the file holds of the full rows, which the writer has in fp64.
    np.testing.assert_allclose(dequantize(read), layer.weight(), rtol=0, atol=1e-6)
    cells, sums = read.sparse_sum()
    assert bool((cells.diff() > 0).all())
    assert bool((sums != 0).all())


@pytest.mark.parametrize("bits", [3, 4])
def test_rows_of_the_packed_format_are_the_columns_of_theirs(bits: int) -> None:
    layer = random_layer(np.random.default_rng(bits), 7, 96, bits)
    theirs = layer.tensors()["qweight"]
    ours = packing.pack(torch.tensor(layer.indices), bits)
    assert ours.equal(theirs.T)


def test_a_slice_of_output_channels() -> None:
    layer = random_layer(np.random.default_rng(0), 9, 64, 3)
    assert check_layer(layer.tensors()).indices(slice(4, 7)).tolist() == layer.indices[4:7]


def tensors(**changes: Any) -> dict[str, Tensor]:
    """Tensors of a sound 6 x 64 layer of 3 bits; a change of None leaves one out."""
    layer = random_layer(np.random.default_rng(3), 6, 64, 3, sparse=True, full_rows=2, bias=True)
    result = layer.tensors() | changes
    return {name: tensor for name, tensor in result.items() if tensor is not None}


def changed(name: str, place: Any, value: float) -> Tensor:
    tensor = tensors()[name].clone()
    tensor[place] = value
    return tensor


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qweight": None}, r"m\.qweight is missing beside m\.lookup_table"),
        ({"lookup_table": None}, r"m\.lookup_table is missing beside m\.qweight"),
        ({"cols": None}, r"m\.cols is missing beside m\.rows"),
        ({"full_rows": None}, r"m\.full_rows is missing beside m\.full_row_indices"),
        ({"qweight": torch.zeros(6, 6)}, r"m\.qweight must be int32 .* got float32 \[6, 6\]"),
        ({"qweight": int32(1, 2)}, r"m\.qweight must be int32 \[any, any\], got int32 \[2\]"),
        (
            {"qweight": torch.zeros(7, 6, dtype=torch.int32)},
            r"m\.qweight .*multiple of 3 rows, got \[7, 6\]",
        ),
        (
            {"qweight": torch.zeros(0, 6, dtype=torch.int32)},
            r"m\.qweight .*positive multiple of 3 rows, got \[0, 6\]",
        ),
        ({"lookup_table": torch.zeros(6, 4)}, r"m\.lookup_table must have 8 or 16 columns"),
        ({"lookup_table": torch.zeros(5, 8)}, r"must be float32 \[6, 8\], got float32 \[5, 8\]"),
        (
            {"lookup_table": torch.zeros(6, 8, dtype=torch.float64)},
            r"m\.lookup_table must be float32 \[any, any\], got float64",
        ),
        ({"lookup_table": changed("lookup_table", (2, 1), torch.nan)}, "table holds values that"),
        ({"bias": torch.zeros(7)}, r"m\.bias must be float32 \[6\], got float32 \[7\]"),
        ({"bias": changed("bias", 0, torch.inf)}, r"m\.bias holds values that are not finite"),
        ({"rows": int32(0, 1)}, r"m\.rows must be int32 \[7\], got int32 \[2\]"),
        ({"rows": changed("rows", 0, 1)}, r"m\.rows must start at 0 and end at nnz=\d+, got 1"),
        ({"rows": changed("rows", -1, 99)}, r"m\.rows must start at 0 .* and 99"),
        ({"rows": changed("rows", 2, 99)}, r"m\.rows must never decrease, but does after row 2"),
        ({"cols": changed("cols", 1, 64)}, r"m\.cols must lie in \[0, in_features=64\), got"),
        ({"cols": changed("cols", 1, -1)}, r"m\.cols must lie in \[0, in_features=64\), got \[-1"),
        ({"vals": torch.zeros(1)}, r"m\.vals must be float32 \[\d+\], got float32 \[1\]"),
        ({"vals": changed("vals", 0, torch.nan)}, r"m\.vals holds values that are not finite"),
        ({"full_rows": torch.zeros(64, 3)}, r"m\.full_rows must be float32 \[64, 2\]"),
        ({"full_rows": changed("full_rows", 0, torch.inf)}, r"m\.full_rows holds values that"),
        ({"full_row_indices": int32(0, 6)}, r"indices must lie in \[0, out_features=6\), got"),
        ({"full_row_indices": int32(-1, 2)}, r"indices must lie in \[0, out_features=6\), got"),
        ({"startrows": torch.zeros(2)}, r"m\.startrows must be int32 \[any\], got float32"),
    ],
)
def test_errors_name_the_tensor(changes: dict[str, Tensor | None], message: str) -> None:
    check_layer(tensors(), prefix="m.")
    with pytest.raises(ValueError, match=message):
        check_layer(tensors(**changes), prefix="m.")


def test_bits_that_are_asked_for() -> None:
    assert check_layer(tensors(), bits=3).bits == 3
    with pytest.raises(ValueError, match=r"must have 16 columns \(4 bits\), got \[6, 8\]"):
        check_layer(tensors(), bits=4)
