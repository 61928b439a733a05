"""SqueezeLLMLinear: forward, backward, conversion, dtype rules, and unsound tensors."""

import copy

import pytest
import torch
from torch import Tensor

from squeezellm_hf.formats import csr, packing
from squeezellm_hf.nn import SqueezeLLMLinear

OUT, IN, BITS = 6, 40, 3


def tensors(bias: bool = True, sparse: bool = True) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of a layer, and the weight they stand for in fp64."""
    torch.manual_seed(0)
    indices = torch.randint(0, 2**BITS, (OUT, IN))
    table = torch.randn(OUT, 2**BITS).sort().values.half()
    weight = table.double().gather(1, indices)
    stored = {"qweight": packing.pack(indices, BITS), "lookup_table": table}
    if sparse:
        mask = torch.rand(OUT, IN) < 0.1
        values = torch.randn(OUT, IN).half()
        weight[mask] += values[mask].double()
        stored |= csr.csr_from_dense(mask, values)._asdict()
    if bias:
        stored["bias"] = torch.randn(OUT)
    return stored, weight


def layer(bias: bool = True, sparse: bool = True) -> SqueezeLLMLinear:
    return SqueezeLLMLinear.from_tensors(tensors(bias, sparse)[0], bits=BITS, in_features=IN)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sparse", [True, False])
def test_forward_and_gradient_match_fp64(bias: bool, sparse: bool) -> None:
    stored, weight = tensors(bias, sparse)
    linear = layer(bias, sparse)
    x = torch.randn(2, 3, IN, requires_grad=True)
    y = linear(x)
    offset = stored["bias"].double() if bias else 0
    torch.testing.assert_close(y.double(), x.double() @ weight.T + offset, rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(y)
    y.backward(grad)
    torch.testing.assert_close(x.grad.double(), grad.double() @ weight, rtol=1e-5, atol=1e-5)


def test_gradients_of_table_values_and_bias_match_autograd_on_the_dense_weight() -> None:
    stored, _ = tensors()
    linear = layer()
    linear.lookup_table = torch.nn.Parameter(linear.lookup_table.float())
    linear.values = torch.nn.Parameter(linear.values.float())
    linear.bias.requires_grad_(True)
    x, grad = torch.randn(7, IN), torch.randn(7, OUT)
    linear(x).backward(grad)

    table = stored["lookup_table"].float().requires_grad_()
    values = stored["values"].float().requires_grad_()
    indices = packing.unpack(stored["qweight"], BITS, IN).long()
    rows = csr.row_indices(stored["crow_indices"], values.numel())
    columns = csr.decode_columns(stored["col_indices"])
    weight = table.gather(1, indices).index_put((rows, columns), values, accumulate=True)
    (x @ weight.T).backward(grad)
    torch.testing.assert_close(linear.lookup_table.grad, table.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(linear.values.grad, values.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(linear.bias.grad, grad.sum(0), rtol=1e-5, atol=1e-5)


def test_dequantize_and_to_linear_give_the_weight() -> None:
    stored, weight = tensors()
    assert layer().dequantize(torch.float32).double().allclose(weight)
    plain = layer().to_linear(torch.float32)
    assert type(plain) is torch.nn.Linear
    assert plain.weight.double().allclose(weight)
    assert plain.bias.equal(stored["bias"])


def test_a_change_of_dtype_reaches_the_bias_alone() -> None:
    linear = layer()
    before = copy.deepcopy(linear)
    linear.to(torch.bfloat16)
    assert linear.bias.dtype == torch.bfloat16
    for name in ("qweight", "lookup_table", "crow_indices", "col_indices", "values"):
        assert getattr(linear, name).dtype == getattr(before, name).dtype
        assert getattr(linear, name).equal(getattr(before, name))


def test_parameters_are_frozen_and_counted() -> None:
    linear = layer()
    assert not any(parameter.requires_grad for parameter in linear.parameters())
    names = {"qweight", "lookup_table", "crow_indices", "col_indices", "values", "bias"}
    assert {name for name, _ in linear.named_parameters()} == names
    expected = OUT * 4 * 4 + OUT * 8 * 2 + (OUT + 1) * 4 + linear.nnz * (2 + 2)
    assert linear.weight_bytes == expected


def test_dense_only_has_no_sparse_tensors() -> None:
    assert set(layer(bias=False, sparse=False).state_dict()) == {"qweight", "lookup_table"}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("qweight", lambda t: t[:, :-1], r"at\.qweight must be int32"),
        ("qweight", lambda t: t.long(), r"at\.qweight must be int32"),
        ("qweight", lambda t: t[:-1], r"at\.qweight must have shape"),
        ("qweight", lambda t: torch.full_like(t, -1), r"at\.qweight holds bits beyond"),
        ("lookup_table", lambda t: t[:, :-1], r"at\.lookup_table must have shape \[6, 8\]"),
        ("lookup_table", lambda t: t.double(), r"at\.lookup_table must be float16, bfloat16"),
        ("lookup_table", lambda t: t * torch.inf, r"at\.lookup_table holds values"),
        ("values", lambda t: t * torch.nan, r"at\.values holds values that are not finite"),
        ("values", lambda t: t[:-1], r"at\.values must be"),
        ("bias", lambda t: t[:-1], r"at\.bias must have shape \[6\]"),
        ("crow_indices", lambda t: t + 1, r"at\.crow_indices must start at 0"),
        ("crow_indices", lambda t: t.flip(0), r"at\.crow_indices must start at 0"),
        ("col_indices", lambda t: t + 100, r"at\.col_indices must lie in"),
    ],
)
def test_unsound_tensors_are_named(name: str, change, message: str) -> None:
    linear = layer()
    setattr(linear, name, torch.nn.Parameter(change(getattr(linear, name).data), False))
    with pytest.raises(ValueError, match=message):
        linear.check("at.")


def test_a_lonely_sparse_tensor_is_named() -> None:
    linear = layer()
    linear.col_indices = None
    with pytest.raises(ValueError, match=r"at\.col_indices is missing"):
        linear.check("at.")


def test_a_missing_tensor_is_named() -> None:
    stored, _ = tensors()
    del stored["qweight"]
    with pytest.raises(ValueError, match="qweight is missing"):
        SqueezeLLMLinear.from_tensors(stored, bits=BITS, in_features=IN)
