"""Norms, gates and residuals become part of calls in graphs, and nothing else changes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.decomposition import select_decomp_table
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from squeezellm_hf.nn import SqueezeLLMLinear, grouping
from tests.ops.oracle import make_weight

SIZE, INNER, EPS = 48, 80, 1e-5
NAMES = ("norm_weight", "norm_eps", "silu", "factor", "residual")
Function = Callable[..., Tensor | tuple[Tensor, ...]]


def layer(out_features: int, in_features: int = SIZE, bits: int = 4) -> SqueezeLLMLinear:
    tensors = make_weight(out_features, in_features, bits, density=0.05).tensors
    return SqueezeLLMLinear.from_tensors(tensors, bits=bits, in_features=in_features)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """As Llama's layer computes it."""
    x32 = x.to(torch.float32)
    x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * x32.to(x.dtype)


def traced(function: Function, *args: Tensor) -> GraphModule:
    """The graph, as Inductor's passes meet it."""
    with torch.no_grad():
        module: GraphModule = make_fx(function, decomposition_table=select_decomp_table())(*args)
    return module


def fused(function: Function, *args: Tensor) -> tuple[list[set[str]], GraphModule]:
    """The steps of each quantized call of the graph, whose results are checked; and the graph."""
    module = traced(function, *args)
    with torch.no_grad():
        grouping.GroupLinears(lambda x: True)(module.graph)
        module.graph.lint()
        module.recompile()
        results, expected = module(*args), function(*args)
    for y, other in zip(_tuple(results), _tuple(expected), strict=True):
        assert y.dtype == other.dtype
        torch.testing.assert_close(y, other, rtol=2**-7, atol=1e-5)
    calls = []
    for node in module.graph.nodes:
        if "lut_linear" in str(node.target):
            steps = dict(zip(NAMES, node.args[8:], strict=False))
            calls.append({name for name, value in steps.items() if value not in (None, -1, 0.0)})
    return calls, module


def assert_left(function: Function, *args: Tensor) -> None:
    """No call has a step."""
    assert not any(fused(function, *args)[0])


def _tuple(results: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else results


def targets(module: GraphModule) -> list[str]:
    return [str(node.target) for node in module.graph.nodes if node.op == "call_function"]


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def x(request: pytest.FixtureRequest) -> Tensor:
    return torch.linspace(-1, 1, SIZE).view(1, 1, SIZE).to(request.param)


@pytest.fixture
def weight(x: Tensor) -> Tensor:
    return torch.linspace(0.5, 1.5, SIZE).to(x.dtype)


def test_a_block_of_llama_is_four_calls_and_attention(x: Tensor, weight: Tensor) -> None:
    q, k, v, o = layer(64), layer(16), layer(16), layer(SIZE, 64)
    gate, up, down = layer(INNER), layer(INNER), layer(SIZE, INNER)

    def block(x: Tensor, weight: Tensor) -> Tensor:
        h = rms_norm(x, weight)
        x = x + o(q(h) * k(h).sum() + v(h).sum())
        h = rms_norm(x, weight)
        return x + down(nn.functional.silu(gate(h)) * up(h))

    calls, module = fused(block, x, weight)
    norm = {"norm_weight", "norm_eps"}
    # silu of the first weight is 0, which is told from none by the call that takes its result.
    assert calls == [norm, {"residual"}, norm, {"factor", "residual"}]
    left = [name for name in targets(module) if "getitem" not in name and "lut_" not in name]
    assert sorted(left) == ["aten.add.Tensor", "aten.mul.Tensor", *["aten.sum.default"] * 2]
    group = next(n for n in module.graph.nodes if n.args[8:9] and len(n.args[1]) == 2)
    assert group.args[10] == 0


def test_norms_that_are_left(x: Tensor, weight: Tensor) -> None:
    a, b = layer(9), layer(7)

    def other_user(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        h = rms_norm(x, weight)
        return a(h), b(h), h.sum()

    def computed_weight(x: Tensor, weight: Tensor) -> Tensor:
        return a(rms_norm(x, 1 + weight))

    def other_mean(x: Tensor, weight: Tensor) -> Tensor:
        x32 = x.to(torch.float32)
        return a(weight * (x32 * torch.rsqrt(x32.pow(2).mean(1, keepdim=True) + EPS)).to(x.dtype))

    def other_power(x: Tensor, weight: Tensor) -> Tensor:
        x32 = x.to(torch.float32)
        return a(weight * (x32 * torch.rsqrt(x32.pow(4).mean(-1, keepdim=True) + EPS)).to(x.dtype))

    def another(x: Tensor, weight: Tensor) -> Tensor:
        x32, y32 = x.to(torch.float32), (x * 2).to(torch.float32)
        return a(weight * (y32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype))

    def broadcast_weight(x: Tensor, weight: Tensor) -> Tensor:
        return a(rms_norm(x, weight[:1]))

    for function in (other_user, computed_weight, other_mean, other_power, another):
        assert fused(function, x, weight)[0] == [set()]
    assert fused(broadcast_weight, x, weight)[0] == [set()]


def test_a_norm_in_fp32_of_a_model_in_16_bits_is_left() -> None:
    a = layer(9)
    x = torch.linspace(-1, 1, SIZE, dtype=torch.bfloat16)[None]

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return a((weight * rms_norm(x.float(), weight)).to(x.dtype))

    assert fused(function, x, torch.ones(SIZE))[0] == [set()]


@pytest.mark.parametrize("swapped", [False, True])
def test_the_product_of_a_gated_mlp(x: Tensor, swapped: bool) -> None:
    """Of layers of one input, and of two."""
    gate, up, down = layer(INNER), layer(INNER), layer(SIZE, INNER)

    def product(g: Tensor, u: Tensor) -> Tensor:
        activated = nn.functional.silu(g)
        return u * activated if swapped else activated * u

    calls, module = fused(lambda x: down(product(gate(x), up(x))), x)
    assert calls == [set(), {"factor"}]
    assert "aten.mul.Tensor" not in targets(module)
    calls, _ = fused(lambda x: down(product(gate(x), up(x + 1))), x)
    assert [call for call in calls if call] == [{"factor"}]
    calls, _ = fused(lambda x: down(product(gate(x), torch.cat([x, x[..., :32]], -1))), x)
    assert [call for call in calls if call] == [{"factor"}]


def test_products_that_are_left(x: Tensor) -> None:
    gate, up, down = layer(INNER), layer(INNER), layer(SIZE, INNER)
    silu = nn.functional.silu

    def gate_is_used(x: Tensor) -> tuple[Tensor, ...]:
        g = gate(x)
        return down(silu(g) * up(x)), g

    def activated_is_used(x: Tensor) -> tuple[Tensor, ...]:
        activated = silu(gate(x))
        return down(activated * up(x)), activated

    def product_is_used(x: Tensor) -> tuple[Tensor, ...]:
        product = silu(gate(x)) * up(x)
        return down(product), product

    def gate_of_no_layer(x: Tensor) -> Tensor:
        return down(silu(torch.cat([x, x[..., :32]], -1)) * up(x))

    def other_activation(x: Tensor) -> Tensor:
        return down(nn.functional.gelu(gate(x)) * up(x))

    for function in (
        gate_is_used, activated_is_used, product_is_used, gate_of_no_layer, other_activation,
    ):  # fmt: skip
        assert_left(function, x)


def test_a_group_has_one_weight_with_silu(x: Tensor) -> None:
    a, b, c, d = (layer(INNER) for _ in range(4))
    down = layer(SIZE, INNER)

    def function(x: Tensor) -> tuple[Tensor, ...]:
        one, two = (nn.functional.silu(gate(x)) * up(x) for gate, up in ((a, b), (c, d)))
        return down(one), down(two)

    assert [call for call in fused(function, x)[0] if call] == [{"factor"}]


@pytest.mark.parametrize("swapped", [False, True])
def test_a_residual(x: Tensor, swapped: bool) -> None:
    a = layer(SIZE)
    calls, module = fused(lambda x: a(x * 2) + x if swapped else x + a(x * 2), x)
    assert calls == [{"residual"}]
    assert "aten.add.Tensor" not in targets(module)


def test_sums_that_are_left(x: Tensor) -> None:
    a, b = layer(SIZE), layer(SIZE)

    def result_is_used(x: Tensor) -> tuple[Tensor, ...]:
        y = a(x)
        return x + y, y

    def computed_later(x: Tensor) -> Tensor:
        y = a(x)
        return y + x.sin()

    def twice(x: Tensor) -> Tensor:
        y = a(x)
        return y + y

    for function in (
        result_is_used, computed_later, twice,
        lambda x: torch.add(x, a(x), alpha=2),
        lambda x: a(x) + 1,
        lambda x: a(x) + x[..., :1],
        lambda x: a(x) + x.double(),
        lambda x: torch.stack([a(x) + b(x)])[0],
    ):  # fmt: skip
        assert_left(function, x)


def test_other_widths_are_left(x: Tensor, weight: Tensor) -> None:
    a = layer(SIZE, bits=5)
    assert fused(lambda x, weight: x + a(rms_norm(x, weight)), x, weight)[0] == [set()]


def test_calls_with_an_x_that_does_not_suit_are_left(x: Tensor, weight: Tensor) -> None:
    a = layer(SIZE)
    module = traced(lambda x, weight: x + a(rms_norm(x, weight)), x, weight)
    before = targets(module)
    grouping.GroupLinears(lambda x: False)(module.graph)
    assert targets(module) == before


def test_a_norm_before_the_gated_product_is_no_part_of_the_same_call(x: Tensor) -> None:
    gate, up, down = layer(INNER), layer(INNER), layer(SIZE, INNER)
    weight = torch.linspace(0.5, 1.5, INNER).to(x.dtype)

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return down(rms_norm(nn.functional.silu(gate(x)) * up(x), weight))

    assert fused(function, x, weight)[0] == [set(), {"norm_weight", "norm_eps"}]


def test_nothing_moves_across_what_is_written_in_place(x: Tensor, weight: Tensor) -> None:
    a, gate, up, down = layer(SIZE), layer(INNER), layer(INNER), layer(SIZE, INNER)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        source = x * 2
        h = rms_norm(source, weight)
        source.add_(1)
        return a(h)

    def product(x: Tensor, weight: Tensor) -> Tensor:
        u = up(x)
        h = nn.functional.silu(gate(x)) * u
        u.add_(1)
        return down(h)

    def residual(x: Tensor, weight: Tensor) -> Tensor:
        other = x * 2
        y = a(x)
        other.add_(1)
        return other + y

    for function in (norm, product, residual):
        assert_left(function, x, weight)


def test_what_runs_on_other_streams_is_left(x: Tensor, weight: Tensor) -> None:
    a = layer(SIZE)
    module = traced(lambda x, weight: x + a(rms_norm(x, weight)), x, weight)
    for node in module.graph.nodes:
        if "lut_linear" in str(node.target):
            node.meta["custom"] = {"stream": 1}
    before = targets(module)
    grouping.GroupLinears(lambda x: True)(module.graph)
    assert targets(module) == before


def test_silu_of_what_has_a_residual_is_left(x: Tensor) -> None:
    gate, up, down = layer(INNER), layer(INNER), layer(SIZE, INNER)

    def function(x: Tensor, r: Tensor) -> Tensor:
        return down(nn.functional.silu(r + gate(x)) * up(x + 1))

    r = torch.linspace(-1, 1, INNER).view(1, 1, INNER).to(x.dtype)
    assert [call for call in fused(function, x, r)[0] if call] == [{"residual"}]


def test_products_with_a_part_of_the_activation_are_left(x: Tensor) -> None:
    gate, up, down = layer(INNER), layer(INNER), layer(SIZE, INNER)

    def with_itself(x: Tensor) -> Tensor:
        g = gate(x)
        return down(nn.functional.silu(g) * g)

    def in_a_group(x: Tensor) -> tuple[Tensor, ...]:
        g = gate(x)
        return down(nn.functional.silu(g) * g), up(x)

    def with_a_step(x: Tensor) -> Tensor:
        g = gate(x).float()
        e = torch.exp(-g) + 1
        return down(((g / e) * e).to(x.dtype))

    def twice(x: Tensor) -> Tensor:
        activated = nn.functional.silu(gate(x))
        return down(activated * activated)

    for function in (with_itself, in_a_group, with_a_step, twice):
        assert_left(function, x)


def test_sizes_that_are_not_known_are_not_compared(x: Tensor, weight: Tensor) -> None:
    a = layer(SIZE)

    def function(x: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
        rows = torch.nonzero(mask)[:, 0]
        return x.new_ones(4, SIZE)[rows] + a(rms_norm(x[0], weight))

    torch._dynamo.reset()
    with (
        torch.no_grad(),
        torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True),
        torch._inductor.config.patch(
            post_grad_custom_pre_pass=grouping.GroupLinears(lambda x: True)
        ),
    ):
        mask = torch.tensor([0, 1, 0, 0])
        y = torch.compile(function, fullgraph=True)(x, weight, mask)
        torch.testing.assert_close(y, function(x, weight, mask), rtol=2**-6, atol=1e-2)


def test_groups_that_a_program_makes_itself(x: Tensor, weight: Tensor) -> None:
    """With steps of their own, which stay; what they do not have is added."""
    names = ("qweight", "lookup_table", "crow_indices", "col_indices", "values", "bias")
    a, b = layer(SIZE), layer(SIZE)
    lists = [[getattr(a, name)] for name in names]
    both = [[getattr(a, name), getattr(b, name)] for name in names]
    group = torch.ops.squeezellm_hf.lut_linear_group

    def second_result(x: Tensor, weight: Tensor) -> Tensor:
        return x + group(x, *both, 4)[1]

    def some_steps(x: Tensor, weight: Tensor) -> Tensor:
        return x + group(x, *lists, 4, weight, EPS)[0]

    def residual(x: Tensor, weight: Tensor) -> Tensor:
        return x * 3 + group(x, *lists, 4, None, 0.0, -1, None, x)[0]

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return group(rms_norm(x, weight), *lists, 4, weight, EPS)[0]

    def factor(x: Tensor, weight: Tensor) -> Tensor:
        return group(rms_norm(x, weight), *lists, 4, None, 0.0, -1, x)[0]

    def product(x: Tensor, weight: Tensor) -> Tensor:
        return group(nn.functional.silu(b(x)) * x, *lists, 4, None, 0.0, -1, x)[0]

    norm_steps = {"norm_weight", "norm_eps"}
    for function, expected in (
        (second_result, [set()]), (some_steps, [{*norm_steps, "residual"}]),
        (residual, [{"residual"}]), (norm, [norm_steps]), (factor, [{"factor"}]),
        (product, [set(), {"factor"}]),
    ):  # fmt: skip
        assert fused(function, x, weight)[0] == expected
