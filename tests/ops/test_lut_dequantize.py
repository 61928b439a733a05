"""lut_dequantize gives the exact matrix, rounded once to the dtype asked for."""

import pytest
import torch

from squeezellm_hf import ops
from tests.ops.oracle import TORCH_DTYPES, make_weight

SHAPES = [(1, 1), (1, 77), (33, 1), (7, 33), (40, 127), (31, 1000), (13, 2051)]


@pytest.mark.parametrize("dtype", list(TORCH_DTYPES))
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_shape(instruction_set: str, bits: int, dtype: str) -> None:
    for out_features, in_features in SHAPES:
        for table_dtype in TORCH_DTYPES:
            for density in (0.0, 0.05):
                weight = make_weight(
                    out_features, in_features, bits, density=density, table_dtype=table_dtype
                )
                result = ops.lut_dequantize(
                    **weight.tensors, bits=bits, in_features=in_features, dtype=TORCH_DTYPES[dtype]
                )
                # fp32 sums of two 16-bit values are not always exact; numpy adds in fp64.
                expected = torch.from_numpy(weight.rounded("fp32")).to(TORCH_DTYPES[dtype])
                assert torch.equal(result, expected)


def test_special_values(instruction_set: str) -> None:
    """Infinities, NaN, subnormals, and values that overflow fp16 keep their meaning."""
    specials = torch.tensor(
        [0.0, -0.0, 1e-8, -6e-8, 6.1e-5, 65519.0, 65520.0, -1e6, 3e38, 1e-40,
         float("inf"), float("-inf"), float("nan"), 1.00048828125, 1.0014648, -2049.0]
    )  # fmt: skip
    qweight = torch.tensor([[0x76543210, -0x01234568]], dtype=torch.int32)  # indices 0 to 15
    for table_dtype in TORCH_DTYPES.values():
        table = specials.to(table_dtype)[None]
        for dtype in TORCH_DTYPES.values():
            result = ops.lut_dequantize(qweight, table, bits=4, in_features=16, dtype=dtype)
            expected = table.float().to(dtype)
            same = (result == expected) | (result.isnan() & expected.isnan())
            assert same.all(), (table_dtype, dtype, result, expected)
            assert torch.equal(result.signbit()[0, :2], torch.tensor([False, True]))


def test_default_dtype_is_the_table_s() -> None:
    weight = make_weight(3, 20, 4, table_dtype="bf16")
    result = ops.lut_dequantize(**weight.tensors, bits=4, in_features=20)
    assert result.dtype == torch.bfloat16


def test_no_rows_and_no_columns(instruction_set: str) -> None:
    weight = make_weight(0, 40, 4)
    assert ops.lut_dequantize(**weight.tensors, bits=4, in_features=40).shape == (0, 40)
    empty = torch.empty(3, 0, dtype=torch.int32)
    assert ops.lut_dequantize(empty, torch.ones(3, 4), bits=2, in_features=0).shape == (3, 0)
