"""Packing against Python's own integers, for any width and size."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from squeezellm_hf.formats import packing

widths = st.integers(1, 8)
sizes = st.integers(1, 130)


def random_indices(bits: int, rows: int, in_features: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (rows, in_features), generator=generator)


@given(widths, st.integers(1, 4), sizes, st.integers(0, 2**31))
def test_unpack_inverts_pack(bits: int, rows: int, in_features: int, seed: int) -> None:
    indices = random_indices(bits, rows, in_features, seed)
    words = packing.pack(indices, bits)
    assert words.shape == (rows, packing.packed_words(in_features, bits))
    assert packing.unpack(words, bits, in_features).equal(indices.to(torch.uint8))
    packing.check_padding(words, bits, in_features)


@given(widths, sizes, st.integers(0, 2**31))
def test_a_row_is_one_little_endian_stream(bits: int, in_features: int, seed: int) -> None:
    indices = random_indices(bits, 1, in_features, seed)
    stream = sum(int(index) << (bits * i) for i, index in enumerate(indices[0]))
    words = packing.pack(indices, bits)[0].tolist()
    assert words == [
        word - (word >> 31 << 32)
        for word in ((stream >> 32 * j) & 0xFFFFFFFF for j in range(len(words)))
    ]


@given(widths, sizes)
def test_bits_beyond_the_row_are_found(bits: int, in_features: int) -> None:
    words = packing.pack(torch.zeros(2, in_features, dtype=torch.uint8), bits)
    used = in_features * bits % 32
    if used:
        words[1, -1] |= 1 << used if used < 31 else -(2**31)
        with pytest.raises(ValueError, match=r"mine holds bits beyond .* in row 1"):
            packing.check_padding(words, bits, in_features, "mine")


@pytest.mark.parametrize("bits", [0, 9, 2.0, True, "4"])
def test_bits_out_of_range(bits: object) -> None:
    with pytest.raises(ValueError, match="bits must be an integer from 1 to 8"):
        packing.pack(torch.zeros(1, 1, dtype=torch.uint8), bits)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (torch.tensor([[4]]), r"indices must lie in \[0, 4\)"),
        (torch.tensor([[-1]]), r"indices must lie in \[0, 4\)"),
        (torch.tensor([[1.0]]), "indices must be an integer tensor"),
        (torch.tensor([1]), "indices must be an integer tensor"),
    ],
)
def test_indices_must_fit(indices: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        packing.pack(indices, 2)


@pytest.mark.parametrize(
    "qweight",
    [torch.zeros(2, 3, dtype=torch.int32), torch.zeros(2, 4), torch.zeros(4, dtype=torch.int32)],
)
def test_words_must_fit(qweight: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"qweight must be int32 \[out_features, 4\]"):
        packing.unpack(qweight, 3, 40)
