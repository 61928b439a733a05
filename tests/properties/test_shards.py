"""Parts of a layer against parts of its dequantized weight, for any width, size and cut."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from squeezellm_hf.formats import csr, packing
from squeezellm_hf.nn import SqueezeLLMLinear
from squeezellm_hf.nn.shards import chunk, columns_start_on_words, take_columns, take_rows

widths = st.integers(1, 8)
sizes = st.integers(2, 130)
seeds = st.integers(0, 2**31)


def layer_tensors(
    bits: int, rows: int, columns: int, density: float, seed: int
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(0, 2**bits, (rows, columns), generator=generator)
    table = torch.randn(rows, 2**bits, generator=generator).sort(dim=1).values
    tensors = {
        "qweight": packing.pack(indices, bits),
        "lookup_table": table,
        "bias": torch.randn(rows, generator=generator),
    }
    mask = torch.rand(rows, columns, generator=generator) < density
    if mask.any():
        values = torch.randn(rows, columns, generator=generator)
        tensors |= csr.csr_from_dense(mask, values)._asdict()
    return tensors


def dequantized(tensors: dict[str, torch.Tensor], bits: int, in_features: int) -> torch.Tensor:
    return SqueezeLLMLinear.from_tensors(tensors, bits=bits, in_features=in_features).dequantize()


@given(widths, sizes, sizes, st.sampled_from([0.0, 0.02, 0.5]), seeds, st.data())
def test_rows_and_columns_are_those_of_the_weight(bits, rows, columns, density, seed, data) -> None:
    tensors = layer_tensors(bits, rows, columns, density, seed)
    weight = dequantized(tensors, bits, columns)

    start = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(start + 1, rows))
    taken = take_rows(tensors, start, stop)
    assert dequantized(taken, bits, columns).equal(weight[start:stop])
    assert taken["bias"].equal(tensors["bias"][start:stop])

    start = data.draw(st.integers(0, columns - 1))
    stop = data.draw(st.integers(start + 1, columns))
    taken = take_columns(tensors, start, stop, bits=bits)
    assert dequantized(taken, bits, stop - start).equal(weight[:, start:stop])


@given(widths, sizes, st.integers(1, 8), seeds)
def test_words_are_cut_only_where_that_cuts_the_columns(bits, columns, parts, seed) -> None:
    tensors = layer_tensors(bits, 3, columns, 0.0, seed)
    words = tensors["qweight"].chunk(parts, dim=1)
    lengths = [len(part) for part in torch.arange(columns).chunk(parts)]
    if len(lengths) == parts and columns_start_on_words(columns, bits, parts):
        for index, length in enumerate(lengths):
            start, stop = chunk(columns, parts, index)
            assert stop - start == length
            assert take_columns(tensors, start, stop, bits=bits)["qweight"].equal(words[index])


@given(st.integers(1, 300), st.integers(1, 9))
def test_chunks_are_those_of_torch(size: int, parts: int) -> None:
    expected = torch.arange(size).chunk(parts)
    if len(expected) < parts:
        with pytest.raises(ValueError, match="cannot be cut"):
            chunk(size, parts, parts - 1)
        return
    for index, piece in enumerate(expected):
        start, stop = chunk(size, parts, index)
        assert list(range(start, stop)) == piece.tolist()


def test_halves_of_usual_layers_are_cut_at_words() -> None:
    for bits in (2, 3, 4):
        for in_features in (4096, 14336, 11008, 28672):
            for parts in (2, 4, 8):
                assert columns_start_on_words(in_features, bits, parts) or in_features == 11008


def test_columns_beyond_int16_get_the_dtype_of_the_part() -> None:
    in_features = 2**16 + 64
    tensors = layer_tensors(1, 2, in_features, 0.001, 0)
    assert tensors["col_indices"].dtype == torch.int32
    taken = take_columns(tensors, in_features // 2, in_features, bits=1)
    assert taken["col_indices"].dtype == torch.int16
    weight = dequantized(tensors, 1, in_features)
    assert dequantized(taken, 1, in_features // 2).equal(weight[:, in_features // 2 :])
