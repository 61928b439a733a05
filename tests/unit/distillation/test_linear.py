"""The trainable layer: same weight, exact derivatives, and what it leaves behind."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from squeezellm_hf.distillation.linear import TableLinear
from squeezellm_hf.formats import csr, packing
from squeezellm_hf.methods.squeezellm import SqueezeLLMParameters, quantize_weight
from squeezellm_hf.nn import SqueezeLLMLinear
from squeezellm_hf.ops import tables

IN, OUT = 37, 11


def layer(
    bits: int = 3, sparse: float = 0.05, dtype: torch.dtype = torch.float32, seed: int = 0
) -> SqueezeLLMLinear:
    """A quantized layer with a bias."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(OUT, IN, generator=generator).to(dtype)
    parameters = SqueezeLLMParameters(bits=bits, outlier_fraction=sparse, sensitive_fraction=0.0)
    tensors = quantize_weight(weight, None, parameters)
    tensors["bias"] = torch.randn(OUT, generator=generator).to(dtype)
    return SqueezeLLMLinear.from_tensors(tensors, bits=bits, in_features=IN)


def dense_indices(quantized: SqueezeLLMLinear) -> Tensor:
    return packing.unpack(quantized.qweight, quantized.bits, IN).to(torch.int64)


def sparse_cells(quantized: SqueezeLLMLinear) -> Tensor:
    mask = torch.zeros(OUT, IN, dtype=torch.bool)
    if quantized.nnz:
        rows = csr.row_indices(quantized.crow_indices, quantized.nnz)
        mask[rows, csr.decode_columns(quantized.col_indices)] = True
    return mask


@pytest.mark.parametrize("cells", [1, 100, 1 << 20])
@pytest.mark.parametrize("sparse", [0.0, 0.05])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_starts_as_the_quantized_layer(
    bits: int, sparse: float, cells: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "_CPU_CELLS", cells)
    quantized = layer(bits, sparse)
    trained = TableLinear(quantized)
    assert trained.weight(torch.float32).equal(quantized.dequantize(torch.float32))
    x = torch.randn(2, 3, IN)
    torch.testing.assert_close(trained(x), quantized(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("train_values", [False, True])
@pytest.mark.parametrize("sparse", [0.0, 0.05])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_gradients_against_central_differences_in_fp64(
    bits: int, sparse: float, train_values: bool
) -> None:
    """Of a loss that is not linear in the weight; every entry of the table, every sparse cell."""
    quantized = layer(bits, sparse)
    trained = TableLinear(quantized, train_values=train_values)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 5, IN, generator=generator).requires_grad_()
    target = torch.randn(2, 5, OUT, generator=generator)
    (trained(x) - target).square().sum().mul(0.1).backward()

    table, indices = quantized.lookup_table.double(), dense_indices(quantized)
    mask = sparse_cells(quantized)
    weight = quantized.dequantize(torch.float32).double()

    def loss(table: Tensor, cells: Tensor, x: Tensor) -> float:
        dense = table.gather(1, indices)
        dense[mask] = cells
        y = x @ dense.T + quantized.bias.double()
        return 0.1 * float((y - target.double()).square().sum())

    at = [table, weight[mask], x.detach().double()]
    parameters = [trained.table, trained.cells, x]
    for position, parameter in enumerate(parameters):
        if parameter is None or not parameter.requires_grad:
            continue
        exact = torch.zeros_like(at[position])
        for index in range(exact.numel()):
            ends = []
            for step in (1e-5, -1e-5):
                moved = [t.clone() for t in at]
                moved[position].view(-1)[index] += step
                ends.append(loss(*moved))
            exact.view(-1)[index] = (ends[0] - ends[1]) / 2e-5
        scale = (trained.scale, trained.cell_scale, 1.0)[position]
        grad = parameter.grad.double() / scale
        torch.testing.assert_close(grad, exact, rtol=1e-3, atol=1e-3)
    assert (trained.cells is not None and trained.cells.grad is not None) == (
        train_values and sparse > 0
    )


def test_bf16_gradients_are_near_those_in_fp32() -> None:
    quantized = layer()
    x, gradients = torch.randn(64, IN), []
    for mixed in (False, True):
        trained = TableLinear(quantized, train_values=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            y = trained(x)
            assert y.dtype == (torch.bfloat16 if mixed else torch.float32)
        y.float().square().sum().backward()
        assert trained.table.grad.dtype == trained.cells.grad.dtype == torch.float32
        gradients.append(torch.cat([trained.table.grad.flatten(), trained.cells.grad]))
    assert (gradients[1] - gradients[0]).norm() < 0.02 * gradients[0].norm()


def test_the_loss_is_that_of_the_rounded_table() -> None:
    trained = TableLinear(layer())
    with torch.no_grad():
        trained.table += 1e-5 * torch.randn_like(trained.table)
    stored = (
        (trained.table * trained.scale).half().float().gather(1, trained.indices.to(torch.int64))
    )
    weight = trained.weight(torch.float32)
    dense = torch.ones(OUT * IN, dtype=torch.bool)
    dense[trained.positions] = False
    assert weight.view(-1)[dense].equal(stored.view(-1)[dense])


@settings(max_examples=60, deadline=None)
@given(
    bits=st.integers(1, 5),
    sparse=st.sampled_from([0.0, 0.02, 0.3]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    moved=st.sampled_from([0.0, 1e-3, 0.3, 3.0]),
    seed=st.integers(0, 1000),
)
def test_what_is_stored(
    bits: int, sparse: float, dtype: torch.dtype, moved: float, seed: int
) -> None:
    """However far the tables moved: ascending tables, the trained weight, exact sparse cells."""
    quantized = layer(bits, sparse, dtype, seed)
    trained = TableLinear(quantized)
    with torch.no_grad():
        trained.table += moved * torch.randn_like(trained.table)
    weight = trained.weight(torch.float32)
    tensors = {**dict(quantized.named_parameters()), **trained.tensors()}
    stored = SqueezeLLMLinear.from_tensors(tensors, bits=bits, in_features=IN)
    assert (stored.lookup_table.float().diff(dim=1) >= 0).all()
    mask = sparse_cells(quantized)
    assert stored.dequantize(torch.float32)[~mask].equal(weight[~mask])
    # The value of a sparse cell has 11 bits: what is lost is relative to the distance to the
    # nearest table entry.
    actual, exact = (t.dequantize(torch.float32)[mask] for t in (stored, quantized))
    rows = mask.nonzero()[:, 0]
    distance = (stored.lookup_table.float()[rows] - exact[:, None]).abs().amin(1)
    assert ((actual - exact).abs() <= 2.0**-11 * distance + 1e-7).all()


def test_trained_cells_are_stored() -> None:
    quantized = layer()
    trained = TableLinear(quantized, train_values=True)
    with torch.no_grad():
        trained.cells += 1.0 / trained.cell_scale
    tensors = {**dict(quantized.named_parameters()), **trained.tensors()}
    stored = SqueezeLLMLinear.from_tensors(tensors, bits=3, in_features=IN)
    mask = sparse_cells(quantized)
    before, after = (t.dequantize(torch.float32) for t in (quantized, stored))
    torch.testing.assert_close(after[mask], before[mask] + 1.0, rtol=1e-3, atol=1e-3)
    assert after[~mask].equal(before[~mask])


def test_indices_follow_their_weights() -> None:
    quantized = layer()
    trained = TableLinear(quantized, train_indices=True)
    x = torch.randn(6, IN)
    before = trained.indices.clone()
    y = trained(x)
    assert trained.indices.equal(before)  # at first every weight is its entry
    y.square().sum().backward()
    frozen = TableLinear(quantized)
    frozen(x).square().sum().backward()
    torch.testing.assert_close(trained.table.grad, frozen.table.grad)
    exact = torch.nn.functional.linear(x, frozen.weight(torch.float32), quantized.bias)
    grad = 2 * exact.T @ x
    grad[sparse_cells(quantized)] = 0
    shadow_grad = trained.shadow.grad / trained.scale
    torch.testing.assert_close(shadow_grad, grad, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        trained.shadow += 0.3 * torch.randn_like(trained.shadow)
        trained.table += 0.1 * torch.randn_like(trained.table)  # not ascending any more
    trained(x)
    table = trained.entries().float() / trained.scale
    distance = (trained.shadow.detach()[:, :, None] - table[:, None, :]).abs()
    chosen = distance.gather(2, trained.indices.to(torch.int64)[:, :, None])[:, :, 0]
    torch.testing.assert_close(chosen, distance.amin(2))
    assert not trained.indices.equal(before)
    weight = trained.weight(torch.float32)
    tensors = {**dict(quantized.named_parameters()), **trained.tensors()}
    stored = SqueezeLLMLinear.from_tensors(tensors, bits=3, in_features=IN)
    mask = sparse_cells(quantized)
    assert stored.dequantize(torch.float32)[~mask].equal(weight[~mask])
