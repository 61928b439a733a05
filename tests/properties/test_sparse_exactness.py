"""Dense + sparse gives a removed weight back."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from squeezellm_hf.formats.csr import decode_columns, row_indices
from squeezellm_hf.formats.packing import unpack
from squeezellm_hf.methods.squeezellm import SqueezeLLMParameters, quantize_weight


def sparse_cells(
    tensors: dict[str, Tensor], weight: Tensor, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """fp32 sum of both parts, the original, and the table, of every sparse cell."""
    values = tensors["values"].float()
    rows = row_indices(tensors["crow_indices"], values.numel())
    columns = decode_columns(tensors["col_indices"])
    tables = tensors["lookup_table"].float()[rows]
    index = unpack(tensors["qweight"], bits, weight.shape[1]).long()[rows, columns]
    entries = tables.gather(1, index[:, None])[:, 0]
    return entries + values, weight[rows, columns], tables


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(1, 5),
    st.integers(-8, 3),
)
def test_sparse_cells_come_back(seed: int, dtype: torch.dtype, bits: int, exponent: int) -> None:
    """Bit for bit if an entry is near enough; within the value's rounding everywhere."""
    generator = torch.Generator().manual_seed(seed)
    scale = 10.0**exponent
    weight = (
        scale
        * torch.randn(16, 50, generator=generator)
        * torch.randn(16, 50, generator=generator).exp()
    ).to(dtype)
    assume(bool(weight.isfinite().all()))  # fp16 does not hold all of them; infinity is refused
    fisher = torch.randn(16, 50, generator=generator).exp()
    tensors = quantize_weight(weight, fisher, SqueezeLLMParameters(bits, 0.05, 0.05))
    restored, original, tables = sparse_cells(tensors, weight, bits)

    info = torch.finfo(tensors["values"].dtype)
    exact = original.float().double()
    distance = (exact[:, None] - tables.double()).abs().amin(dim=1)
    bound = distance * info.eps / 2 + info.smallest_normal * info.eps / 2
    assert ((restored.double() - exact).abs() <= bound * 1.001 + 1e-7 * exact.abs()).all()

    if dtype == torch.float16 and tensors["values"].dtype == torch.bfloat16:
        return  # the weights have more bits than the values
    if dtype != torch.float32:
        more_bits = tensors["values"].dtype != dtype
        near = distance <= (4 if more_bits else 0.5) * exact.abs()
        near &= exact.abs() >= info.smallest_normal
        assert torch.equal(restored[near].to(dtype), original[near])


@pytest.mark.parametrize(("dtype", "least"), [(torch.bfloat16, 0.99), (torch.float16, 0.95)])
def test_nearly_all_of_a_layer_comes_back_bit_for_bit(dtype: torch.dtype, least: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = (0.05 * torch.randn(64, 576, generator=generator)).to(dtype)
    fisher = torch.randn(64, 576, generator=generator).mul(2).exp()
    tensors = quantize_weight(weight, fisher, SqueezeLLMParameters(4, 0.01, 0.01))
    restored, original, _ = sparse_cells(tensors, weight, 4)
    equal = restored.to(dtype) == original
    outlier = original.abs() > 0.1
    assert outlier.sum() > 300
    assert equal[outlier].all()
    assert equal.float().mean() >= least
