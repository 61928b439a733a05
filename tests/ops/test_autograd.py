"""With and without a derivative: which op runs, and that torch's machinery sees no difference."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from squeezellm_hf.nn import SqueezeLLMLinear
from squeezellm_hf.ops import (
    lut_dequantize,
    lut_dequantize_reference,
    lut_linear,
    lut_linear_reference,
)
from tests.ops.oracle import make_weight

BITS, IN, OUT = 4, 40, 9
WEIGHT = make_weight(OUT, IN, BITS, density=0.1)
MATRIX = torch.from_numpy(WEIGHT.matrix)
FLOATS = ["x", "lookup_table", "values", "bias"]
WITH, WITHOUT = "squeezellm_hf::lut_linear", "squeezellm_hf::lut_linear_no_grad"


class Recorder(TorchDispatchMode):
    """Names of our ops in the order of their calls."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "squeezellm_hf":
            self.names.append(func.name())
        return func(*args, **kwargs or {})


def arguments() -> dict[str, Tensor]:
    x, bias = torch.randn(3, IN), torch.randn(OUT)
    return {"x": x, **{n: t.clone() for n, t in WEIGHT.tensors.items()}, "bias": bias}


def layer() -> SqueezeLLMLinear:
    return SqueezeLLMLinear.from_tensors(WEIGHT.tensors, bits=BITS, in_features=IN)


def recorded(call: Callable[[], Tensor]) -> tuple[Tensor, list[str]]:
    with Recorder() as recorder:
        result = call()
    return result, recorder.names


@pytest.mark.parametrize("name", FLOATS)
def test_whatever_requires_a_gradient_gets_one(name: str) -> None:
    tensors = arguments()
    tensors[name].requires_grad_()
    y, names = recorded(lambda: lut_linear(**tensors, bits=BITS))
    assert names == [WITH]
    y.sum().backward()
    assert tensors[name].grad is not None
    assert tensors[name].grad.abs().sum() > 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_derivative_where_none_is_asked_for(mode: Callable[[], object]) -> None:
    tensors = arguments()
    expected, names = recorded(lambda: lut_linear(**tensors, bits=BITS))
    assert names == [WITHOUT]
    for name in FLOATS:
        tensors[name].requires_grad_()
    with mode():
        y, names = recorded(lambda: lut_linear(**tensors, bits=BITS))
    assert names == [WITHOUT]
    assert not y.requires_grad
    # The reference's product may be another with a gradient: the last bit.
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(y, lut_linear(**tensors, bits=BITS).detach())


def test_opcheck_without_derivative() -> None:
    for with_sparse in (True, False):
        tensors = arguments()
        args = [tensors[name] for name in ("x", "qweight", "lookup_table")]
        args += [
            tensors[name] if with_sparse else None
            for name in ("crow_indices", "col_indices", "values", "bias")
        ]
        torch.library.opcheck(torch.ops.squeezellm_hf.lut_linear_no_grad.default, (*args, BITS))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_fake_tensors(requires_grad: bool) -> None:
    tensors = arguments()
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(tensor) for name, tensor in tensors.items()}
        fake["x"] = fake["x"].bfloat16().requires_grad_(requires_grad)
        y = lut_linear(**fake, bits=BITS)
    assert y.shape == (3, OUT)
    assert y.dtype == torch.bfloat16
    assert y.requires_grad == requires_grad


def test_compiled_with_gradients() -> None:
    linear = layer()
    linear.lookup_table = torch.nn.Parameter(linear.lookup_table.float())
    x = torch.randn(3, IN, requires_grad=True)
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    gradients = []
    for run in (linear, compiled):
        x.grad = linear.lookup_table.grad = None
        run(x).square().sum().backward()
        gradients.append((x.grad, linear.lookup_table.grad))
    for eager, other in zip(*gradients, strict=True):
        torch.testing.assert_close(other, eager)


def test_compiled_without_gradients_has_no_derivative_either() -> None:
    graphs = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    linear, x = layer(), torch.randn(3, IN)
    compiled = torch.compile(linear, fullgraph=True, backend=keep)
    with torch.no_grad():
        assert compiled(x).equal(linear(x))
    called = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert any("lut_linear_no_grad" in name for name in called)
    # The same function again, now for training: not the graph from before.
    y = compiled(x.clone().requires_grad_())
    assert y.requires_grad


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant: bool) -> None:
    """Forward without, recomputation with gradients."""
    linear = layer()
    x = torch.randn(3, IN, requires_grad=True)
    checkpoint(linear, x, use_reentrant=use_reentrant).square().sum().backward()
    expected = 2 * (x.detach().double() @ MATRIX.T) @ MATRIX
    torch.testing.assert_close(x.grad.double(), expected, rtol=1e-5, atol=1e-4)


def test_autocast_is_not_followed() -> None:
    """y has the dtype of x, as in bitsandbytes and GPTQ; the tables are in 16 bits anyway."""
    linear, x = layer(), torch.randn(3, IN)
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(x)
        assert linear(x.bfloat16()).dtype == torch.bfloat16
    assert y.dtype == torch.float32
    assert y.equal(linear(x))
    tensors = arguments()
    with torch.autocast("cpu", torch.bfloat16):
        y = lut_linear_reference(**tensors, bits=BITS)
    assert y.equal(lut_linear_reference(**tensors, bits=BITS))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_and_functional_call(grad: bool) -> None:
    linear, x = layer(), torch.randn(5, 3, IN)
    doubled = {"lookup_table": linear.lookup_table * 2, "values": linear.values * 2}
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(torch.vmap(linear)(x), linear(x))
        y = torch.func.functional_call(linear, doubled, (x,))
    torch.testing.assert_close(y, 2 * linear(x))


def test_vmap_under_autograd_has_a_derivative() -> None:
    """Of weights that require none: inside vmap nothing says that x requires one."""
    linear = SqueezeLLMLinear.from_tensors(WEIGHT.tensors, bits=BITS, in_features=IN)
    grads = []
    for function in (linear, torch.vmap(linear)):
        x = torch.linspace(-1, 1, 3 * IN).view(3, IN).requires_grad_()
        (function(x).square().sum() + x.sum()).backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("mapped", [False, True])
def test_functional_gradients_are_refused(mapped: bool, compiled: bool) -> None:
    linear = SqueezeLLMLinear.from_tensors(WEIGHT.tensors, bits=BITS, in_features=IN)
    function = torch.vmap(linear) if mapped else linear
    gradient = torch.func.grad(lambda x: function(x).sum())
    if compiled:
        torch._dynamo.reset()
        gradient = torch.compile(gradient, backend="aot_eager")
    with pytest.raises((RuntimeError, NotImplementedError)):
        gradient(torch.ones(3, IN))


def test_a_replica_has_plain_attributes() -> None:
    """As torch.nn.DataParallel leaves them."""
    linear, x = layer(), torch.randn(3, IN)
    replica = linear._replicate_for_data_parallel()
    for name, parameter in linear._parameters.items():
        setattr(replica, name, None if parameter is None else parameter.data)
    assert not dict(replica.named_parameters())
    assert replica(x).equal(linear(x))


@pytest.mark.parametrize("name", ["x", "lookup_table", "values", "bias"])
def test_forward_mode_is_refused(name: str) -> None:
    tensors = arguments()
    tangent = torch.ones_like(tensors[name])
    for function in (lut_linear, lut_linear_reference):
        with pytest.raises(NotImplementedError, match="no derivative in forward mode"):
            torch.func.jvp(
                lambda tensor, function=function: function(**{**tensors, name: tensor}, bits=BITS),
                (tensors[name],),
                (tangent,),
            )
    with forward_ad.dual_level():
        lut_linear(**tensors, bits=BITS)  # nothing that it gets has a tangent
        dual = {**tensors, name: forward_ad.make_dual(tensors[name], tangent)}
        with pytest.raises(NotImplementedError, match="no derivative in forward mode"):
            lut_linear(**dual, bits=BITS)


def test_forward_mode_of_the_weight_is_refused() -> None:
    stored = dict(WEIGHT.tensors)
    table = stored.pop("lookup_table")
    for function in (lut_dequantize, lut_dequantize_reference):
        with pytest.raises(NotImplementedError, match="no derivative in forward mode"):
            torch.func.jvp(
                lambda t, function=function: function(
                    **stored, lookup_table=t, bits=BITS, in_features=IN
                ),
                (table,),
                (torch.ones_like(table),),
            )
