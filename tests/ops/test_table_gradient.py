"""Sums of a row's cells by index, against NumPy in fp64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from squeezellm_hf.ops import table_gradient as module
from squeezellm_hf.ops.table_gradient import table_gradient

SUMS = {"scattered": module._scattered, "masked": module._masked}


def expected(grad: torch.Tensor, indices: torch.Tensor, entries: int) -> np.ndarray:
    values = grad.double().numpy()
    return np.stack(
        [
            np.bincount(row, weights=value, minlength=entries)
            for row, value in zip(indices.numpy(), values, strict=True)
        ]
    )


@pytest.mark.parametrize("sums", SUMS)
@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 200),
    bits=st.integers(1, 8),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**31),
)
def test_both_ways_against_numpy(
    sums: str, rows: int, columns: int, bits: int, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=generator)
    grad = torch.randn(rows, columns, generator=generator).to(dtype)
    result = SUMS[sums](grad, indices, 2**bits)
    assert result.dtype == torch.float32
    np.testing.assert_allclose(result.numpy(), expected(grad, indices, 2**bits), atol=1e-4)


@pytest.mark.parametrize("cells", [1, 100, 1000, 1 << 20])
def test_pieces_give_the_same_bits(monkeypatch: pytest.MonkeyPatch, cells: int) -> None:
    indices = torch.randint(0, 8, (13, 77), dtype=torch.uint8)
    grad = torch.randn(13, 77)
    whole = table_gradient(grad, indices, 8)
    monkeypatch.setattr(module, "_CPU_CELLS", cells)
    assert table_gradient(grad, indices, 8).equal(whole)
