"""Look-ups and sums by index, against NumPy."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from squeezellm_hf.ops import tables as module
from squeezellm_hf.ops.tables import look_up, table_gradient

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


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 200),
    bits=st.integers(1, 8),
    cells=st.sampled_from([1, 300, 1 << 20]),
    seed=st.integers(0, 2**31),
)
def test_look_up_against_numpy(rows: int, columns: int, bits: int, cells: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=generator)
    table = torch.randn(rows, 2**bits, generator=generator)
    expected = np.take_along_axis(table.numpy(), indices.numpy().astype(np.int64), axis=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CPU_CELLS", cells)
        np.testing.assert_array_equal(look_up(table, indices).numpy(), expected)


# In a process of its own: Triton reads the variable when a kernel is defined.
TRITON = """
import torch
from squeezellm_hf.ops import tables, triton_tables
torch.manual_seed(0)
for bits, rows, columns in ((1, 3, 5), (2, 4, 1030), (3, 5, 576), (4, 2, 2049), (8, 2, 300)):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        indices = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8)
        grad = torch.randn(rows, columns).to(dtype)
        expected = tables.table_gradient(grad, indices, 2**bits)
        actual = triton_tables.table_gradient(grad, indices, 2**bits)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)
        table = torch.randn(rows, 2**bits).to(dtype)
        assert triton_tables.look_up(table, indices).equal(tables.look_up(table, indices))
"""


def test_triton_kernels_in_its_interpreter() -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", TRITON], check=True, env=environment)


class Broken:
    @staticmethod
    def look_up(table: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        return look_up(table, indices) + 1

    table_gradient = staticmethod(table_gradient)


def test_kernels_that_are_wrong_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    arange = torch.arange
    monkeypatch.setattr(torch, "arange", lambda n, **_: arange(n))  # here, not on a GPU
    module._compare(module)
    with pytest.raises(RuntimeError, match="its look-up gives another weight"):
        module._compare(Broken)
    monkeypatch.setattr(Broken, "look_up", staticmethod(look_up))
    monkeypatch.setattr(Broken, "table_gradient", staticmethod(lambda *a: -table_gradient(*a)))
    with pytest.raises(RuntimeError, match="its sums are others"):
        module._compare(Broken)
