"""Tensors from a stranger's file: a clear error, or a wrong number, but never a crash.

Run under AddressSanitizer too (tests/ops/asan.sh), which sees reads out of bounds that happen to
hit mapped memory.
"""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from squeezellm_hf import ops
from squeezellm_hf.ops import native
from tests.ops.oracle import assert_linear, make_weight, make_x

OUT, IN, BITS = 12, 100, 3
Tensors = dict[str, Tensor]


def weight_tensors() -> Tensors:
    return make_weight(OUT, IN, BITS, density=0.1).tensors


def changed(name: str, change: Callable[[Tensor], Tensor | None]) -> Tensors:
    tensors = weight_tensors()
    return {**tensors, name: change(tensors[name])}


BAD = {
    "qweight one word short": ("qweight", lambda t: t[:, :-1].contiguous()),
    "qweight one word long": ("qweight", lambda t: torch.nn.functional.pad(t, (0, 1))),
    "qweight int64": ("qweight", lambda t: t.long()),
    "qweight float": ("qweight", lambda t: t.float()),
    "qweight 1-d": ("qweight", lambda t: t.reshape(-1)),
    "table one row short": ("lookup_table", lambda t: t[:-1]),
    "table one entry short": ("lookup_table", lambda t: t[:, :-1].contiguous()),
    "table int": ("lookup_table", lambda t: t.to(torch.int16)),
    "crow one short": ("crow_indices", lambda t: t[:-1]),
    "crow int64": ("crow_indices", lambda t: t.long()),
    "columns one short": ("values", lambda t: t[:-1]),
    "columns int8": ("col_indices", lambda t: t.to(torch.int8)),
    "values 2-d": ("values", lambda t: t[None]),
    "values int": ("values", lambda t: t.to(torch.int16)),
    "no values": ("values", lambda t: None),
    "no columns": ("col_indices", lambda t: None),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_tensors_are_named(case: str) -> None:
    name, change = BAD[case]
    tensors = changed(name, change)
    with pytest.raises(ValueError, match=name):
        ops.lut_linear(torch.ones(1, IN), **tensors, bits=BITS)
    with pytest.raises(ValueError, match=name):
        ops.lut_dequantize(**tensors, bits=BITS, in_features=IN)


@pytest.mark.skipif(not native.status().loaded, reason="the kernels need contiguous tensors")
@pytest.mark.parametrize("name", ["qweight", "lookup_table", "crow_indices", "col_indices"])
def test_strided_weights_are_named(name: str) -> None:
    tensors = changed(name, lambda t: t.repeat_interleave(2, dim=-1)[..., ::2])
    with pytest.raises(ValueError, match=f"{name} must be contiguous"):
        ops.lut_linear(torch.ones(1, IN), **tensors, bits=BITS)


@pytest.mark.parametrize("bits", [-1, 0, 9, 32, 2**40])
def test_bits_out_of_range(bits: int) -> None:
    with pytest.raises(ValueError, match="bits"):
        ops.lut_linear(torch.ones(1, IN), **weight_tensors(), bits=bits)


def test_other_bad_arguments() -> None:
    tensors = weight_tensors()
    with pytest.raises((ValueError, RuntimeError)):
        ops.lut_linear(torch.ones(1, IN + 20), **tensors, bits=BITS)
    with pytest.raises((ValueError, RuntimeError)):
        ops.lut_linear(torch.ones(1, IN), **tensors, bits=BITS, bias=torch.ones(OUT + 1))
    with pytest.raises((ValueError, RuntimeError)):
        ops.lut_dequantize(**tensors, bits=BITS, in_features=-1)
    with pytest.raises((ValueError, RuntimeError)):
        ops.lut_dequantize(**tensors, bits=BITS, in_features=2**62)


@pytest.mark.skipif(not native.status().loaded, reason="dtypes that only the kernels refuse")
def test_dtypes_of_x_and_result() -> None:
    with pytest.raises(ValueError, match="x must be float32, bfloat16 or float16"):
        ops.lut_linear(torch.ones(1, IN, dtype=torch.float64), **weight_tensors(), bits=BITS)
    with pytest.raises(ValueError, match="dtype must be float32"):
        ops.lut_dequantize(**weight_tensors(), bits=BITS, in_features=IN, dtype=torch.int32)
    with pytest.raises(ValueError, match="at least one dimension"):
        ops.lut_linear(torch.tensor(1.0), **weight_tensors(), bits=BITS)


def run_all(tensors: Tensors, in_features: int = IN) -> None:
    for batch in (1, 2, 4, 9):
        for dtype in ("fp32", "bf16"):
            ops.lut_linear(make_x(batch, in_features, dtype), **tensors, bits=BITS)
    for result in (torch.float32, torch.bfloat16, torch.float16):
        ops.lut_dequantize(**tensors, bits=BITS, in_features=in_features, dtype=result)


LIES = {
    "pointers beyond nnz": ("crow_indices", lambda t: t * 1000),
    "negative pointers": ("crow_indices", lambda t: -t),
    "least pointers": ("crow_indices", lambda t: torch.full_like(t, -(2**31))),
    "greatest pointers": ("crow_indices", lambda t: torch.full_like(t, 2**31 - 1)),
    "decreasing pointers": ("crow_indices", lambda t: t.flip(0)),
    "overlapping rows": (
        "crow_indices",
        lambda t: torch.where(torch.arange(13) % 2 == 0, 0, t[-1]),
    ),
    "columns beyond the row": ("col_indices", lambda t: torch.full_like(t, -1)),
    "one column beyond": ("col_indices", lambda t: torch.full_like(t, IN)),
    "wide negative columns": ("col_indices", lambda t: torch.full(t.shape, -1, dtype=torch.int32)),
    "wide huge columns": ("col_indices", lambda t: torch.full(t.shape, 2**31 - 1).int()),
}


@pytest.mark.parametrize("lie", list(LIES))
def test_lying_csr_reads_nothing_out_of_bounds(instruction_set: str, lie: str) -> None:
    name, change = LIES[lie]
    tensors = changed(name, lambda t: change(t).to(t.dtype if "wide" not in lie else torch.int32))
    run_all(tensors)


def test_columns_outside_the_matrix_are_left_out(instruction_set: str) -> None:
    tensors = changed("col_indices", lambda t: torch.full_like(t, IN))
    x = make_x(3, IN, "fp32")
    dense = make_weight(OUT, IN, BITS)
    assert_linear(ops.lut_linear(x, **tensors, bits=BITS), x, dense.matrix)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_csr(data: st.DataObject) -> None:
    if not native.status().loaded:
        pytest.skip("the reference refuses lying row pointers")
    int32 = st.integers(-(2**31), 2**31 - 1)
    nnz = data.draw(st.integers(0, 40))
    small = st.integers(-2, nnz + 2)
    crow = data.draw(st.lists(int32 | small, min_size=OUT + 1, max_size=OUT + 1))
    wide = data.draw(st.booleans())
    column = int32 | st.integers(0, IN) if wide else st.integers(-(2**15), 2**15 - 1)
    columns = data.draw(st.lists(column, min_size=nnz, max_size=nnz))
    dense = make_weight(OUT, IN, BITS).tensors
    tensors = {
        **dense,
        "crow_indices": torch.tensor(crow, dtype=torch.int32),
        "col_indices": torch.tensor(columns, dtype=torch.int32 if wide else torch.int16),
        "values": torch.ones(nnz, dtype=torch.float16),
    }
    try:
        for name in native.status().available:
            native.set_instruction_set(name)
            run_all(tensors)
    finally:
        native.set_instruction_set(None)
