"""Calls of one input become one call in compiled graphs, and nothing else changes."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import config
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from squeezellm_hf.nn import SqueezeLLMLinear, grouping
from squeezellm_hf.ops import lut_linear, native
from tests.ops.oracle import make_weight

IN = 48


def layer(out_features: int, in_features: int = IN, bits: int = 4) -> SqueezeLLMLinear:
    tensors = make_weight(out_features, in_features, bits, density=0.05).tensors
    return SqueezeLLMLinear.from_tensors(tensors, bits=bits, in_features=in_features)


def sparse_part(layer: SqueezeLLMLinear) -> dict[str, Tensor]:
    return {name: getattr(layer, name) for name in ("crow_indices", "col_indices", "values")}


class Block(nn.Module):
    """Seven layers, of which three share an input and two another, as in a transformer's."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = layer(64), layer(16), layer(16)
        self.o = layer(IN, 64)
        self.gate, self.up, self.down = layer(80), layer(80), layer(IN, 80)

    def forward(self, x: Tensor) -> Tensor:
        h = x * 0.1
        y = x + self.o(torch.tanh(self.q(h) + (self.k(h) * self.v(h)).sum(-1, keepdim=True)))
        return y + self.down(torch.sigmoid(self.gate(y)) * self.up(y))


def always(x: Tensor) -> bool:
    return True


def called(graph: torch.fx.Graph) -> list[str]:
    """The quantized calls of a graph: the names of the ops."""
    return [
        node.target._schema.name.removeprefix("squeezellm_hf::")
        for node in graph.nodes
        if "squeezellm_hf" in str(node.target)
    ]


class Recorded(grouping.GroupLinears):
    """Remembers what became of each graph."""

    def __init__(self) -> None:
        super().__init__(always)
        self.graphs: list[list[str]] = []

    def __call__(self, graph: torch.fx.Graph) -> None:
        super().__call__(graph)
        self.graphs.append(called(graph))


def traced(function, *args: Tensor) -> GraphModule:
    """A graph of ops, as passes see it."""
    with torch.no_grad():
        return make_fx(function)(*args)


def check(function, x: Tensor, expected: list[str]) -> None:
    """The quantized calls of ``function``, once grouped, are ``expected``; its results the same."""
    module = traced(function, x.clone())
    with torch.no_grad():
        before = function(x.clone())
        grouping.GroupLinears(always)(module.graph)
        module.graph.lint()
        module.recompile()
        assert called(module.graph) == expected
        after = module(x.clone())
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a, b)


@pytest.fixture
def x() -> Tensor:
    return torch.linspace(-1, 1, IN)[None]


@pytest.fixture
def uninstalled() -> Iterator[None]:
    with config.patch(post_grad_custom_pre_pass=None):
        yield


GROUP, ONE = "lut_linear_group", "lut_linear_no_grad"


def test_a_block_has_four_calls() -> None:
    block, recorded = Block(), Recorded()
    x = torch.linspace(-1, 1, IN).view(1, 1, IN)
    torch._dynamo.reset()
    with torch.no_grad(), config.patch(post_grad_custom_pre_pass=recorded):
        expected = block(x)
        compiled = torch.compile(block, fullgraph=True, mode="reduce-overhead")
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-4)
    # Those of one weight have the residual with them.
    assert recorded.graphs == [[GROUP] * 4]


def test_calls_keep_their_results_and_their_order(x: Tensor) -> None:
    a, b, c = layer(9), layer(5), layer(7, 9)
    check(lambda x: (a(x), c(a(x)), b(x)), x, [GROUP, ONE])
    check(lambda x: (b(x + 1), a(x)), x, [ONE, ONE])


def test_a_weight_may_be_in_several_groups(x: Tensor) -> None:
    a, b = layer(9), layer(5)

    def function(x: Tensor) -> tuple[Tensor, ...]:
        y = x + 1
        return a(x), a(y), b(x), b(y), a(x), b(x * 2)

    check(function, x, [GROUP, GROUP, ONE])


def test_other_widths_are_groups_of_their_own(x: Tensor) -> None:
    a, b, c, d = layer(9), layer(5, bits=3), layer(7), layer(6, bits=3)
    check(lambda x: (a(x), b(x), c(x), d(x)), x, [GROUP, GROUP])


def test_a_group_has_no_more_weights_than_a_launch(x: Tensor) -> None:
    layers = [layer(3 + i) for i in range(2 * grouping.MOST + 1)]
    check(lambda x: tuple(a(x) for a in layers), x, [GROUP, GROUP, ONE])


def test_a_weight_that_is_computed_later_is_no_part_of_the_group(x: Tensor) -> None:
    a, b, c = layer(9), layer(5), layer(4)

    def function(x: Tensor) -> tuple[Tensor, ...]:
        first = a(x)
        table = (b.lookup_table * first[0, 0]).half()
        later = lut_linear(x, b.qweight, table, **sparse_part(b), bits=4)
        return first, later, c(x)

    check(function, x, [ONE, GROUP])


def test_a_call_that_takes_the_result_of_another_is_no_part_of_its_group(x: Tensor) -> None:
    a, b, c = layer(9), layer(9), layer(4)

    def function(x: Tensor) -> tuple[Tensor, ...]:
        first = a(x)
        tensors = (b.qweight, b.lookup_table)
        return first, lut_linear(x, *tensors, **sparse_part(b), bits=4, bias=first), c(x)

    check(lambda x: function(x[0]), x, [ONE, GROUP])


def test_groups_are_of_weights_that_one_launch_can_take(x: Tensor) -> None:
    a, b, c, d = layer(9), layer(5), layer(4), layer(6)

    def dense(b: SqueezeLLMLinear, x: Tensor) -> Tensor:
        return lut_linear(x, b.qweight, b.lookup_table, bits=4)

    check(lambda x: (a(x), dense(b, x), c(x), dense(d, x)), x, [GROUP, GROUP])


def test_calls_on_other_streams_are_groups_of_their_own(x: Tensor) -> None:
    a, b, c = layer(9), layer(5), layer(4)
    module = traced(lambda x: (a(x), b(x), c(x)), x)
    calls = [node for node in module.graph.nodes if ONE in str(node.target)]
    calls[1].meta["custom"] = {"stream": 1}
    grouping.GroupLinears(always)(module.graph)
    module.graph.lint()
    assert called(module.graph) == [GROUP, ONE]


def test_what_is_written_in_place_ends_a_group(x: Tensor) -> None:
    a, b, c = layer(9), layer(5), layer(4)

    def function(x: Tensor) -> tuple[Tensor, ...]:
        first = a(x)
        torch.ops.aten.mul_(x, 2.0)
        return first, b(x), c(x)

    check(function, x, [ONE, GROUP])


def test_only_a_row_on_a_device_with_the_kernel_suits(monkeypatch: pytest.MonkeyPatch) -> None:
    capability = (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    mode = FakeTensorMode()

    def fake(*shape: int, dtype: torch.dtype = torch.bfloat16, device: str = "cuda:0") -> Tensor:
        with mode:
            tensor = torch.empty(shape, dtype=dtype, device="meta")
        return FakeTensor(mode, tensor, torch.device(device))

    assert grouping.is_one_launch(fake(1, 1, 8))
    assert grouping.is_one_launch(fake(8, dtype=torch.float16))
    assert not grouping.is_one_launch(fake(1, 1, 8, device="cpu"))
    assert not grouping.is_one_launch(fake(1, 1, 8, dtype=torch.float32))
    assert not grouping.is_one_launch(fake(1, 2, 8))
    capability = (8, 0)
    assert not grouping.is_one_launch(fake(1, 1, 8))


def test_graphs_that_do_not_suit_are_left_alone(x: Tensor) -> None:
    a, b = layer(9), layer(5)
    module = traced(lambda x: (a(x), b(x)), x)
    code = module.code
    grouping.GroupLinears()(module.graph)
    module.recompile()
    assert module.code == code


@pytest.mark.usefixtures("uninstalled")
def test_it_is_installed_where_there_are_cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def cuda_loaded(loaded: bool) -> None:
        status = native.NativeStatus(True, None, None, "scalar", (), cuda_loaded=loaded)
        monkeypatch.setattr(native, "status", lambda: status)

    cuda_loaded(False)
    grouping.install()
    assert config.post_grad_custom_pre_pass is None
    cuda_loaded(True)
    monkeypatch.setenv("SQUEEZELLM_HF_GROUP_LINEARS", "0")
    grouping.install()
    assert config.post_grad_custom_pre_pass is None
    monkeypatch.delenv("SQUEEZELLM_HF_GROUP_LINEARS")
    grouping.install()
    assert isinstance(config.post_grad_custom_pre_pass, grouping.GroupLinears)
    assert config.post_grad_custom_pre_pass.uuid() is not None
    grouping.disable()
    assert config.post_grad_custom_pre_pass is None
    grouping.install()
    assert config.post_grad_custom_pre_pass is None
    grouping.enable()
    assert isinstance(config.post_grad_custom_pre_pass, grouping.GroupLinears)
    monkeypatch.setenv("SQUEEZELLM_HF_GROUP_LINEARS", "0")
    grouping.install()  # as in another thread than that of disable()
    assert config.post_grad_custom_pre_pass is None
    monkeypatch.delenv("SQUEEZELLM_HF_GROUP_LINEARS")
    grouping.install()

    other = Recorded()
    with config.patch(post_grad_custom_pre_pass=other):
        grouping.install()
        assert config.post_grad_custom_pre_pass is other
        grouping.disable()
        assert config.post_grad_custom_pre_pass is other
        grouping.enable()
