"""Experts against a loop over all tokens in fp64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import silu

from squeezellm_hf.nn import Experts

HIDDEN, WIDTH, EXPERTS = 6, 5, 4


def gate(states: Tensor) -> Tensor:
    first, second = states.chunk(2, dim=-1)
    return silu(first) * second


def make(norm: nn.Module | None = None) -> Experts:
    torch.manual_seed(0)
    experts = [
        nn.ModuleDict({"up": nn.Linear(HIDDEN, 2 * WIDTH), "down": nn.Linear(WIDTH, HIDDEN)})
        for _ in range(EXPERTS)
    ]
    return Experts(experts, "up", "down", gate, norm).double()


def oracle(experts: Experts, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    for token in range(x.shape[0]):
        for slot in range(index.shape[1]):
            chosen = int(index[token, slot])
            if chosen < EXPERTS:
                out = experts[chosen]["down"](gate(experts[chosen]["up"](x[token])))
                y[token] += weight[token, slot] * out
    return y


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 7), st.integers(1, 3), st.integers(0, 2**31))
def test_is_the_sum_over_chosen_experts(tokens: int, k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    experts = make()
    x = torch.randn(tokens, HIDDEN, generator=generator, dtype=torch.float64)
    # EXPERTS stands for no expert; the same one may be chosen twice.
    index = torch.randint(0, EXPERTS + 1, (tokens, k), generator=generator)
    weight = torch.rand(tokens, k, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(experts(x, index, weight), oracle(experts, x, index, weight))


def test_gradients_reach_inputs_weights_and_router() -> None:
    experts = make()
    x = torch.randn(3, HIDDEN, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([[0, 1], [1, 3], [3, 0]])
    assert torch.autograd.gradcheck(lambda x, w: experts(x, index, w), (x, weight))
    experts(x, index, weight).sum().backward()
    reached = [expert["up"].weight.grad is not None for expert in experts]
    assert reached == [True, True, False, True]


def test_no_tokens() -> None:
    experts = make()
    nothing = experts(
        torch.empty(0, HIDDEN, dtype=torch.float64),
        torch.empty(0, 2, dtype=torch.int64),
        torch.empty(0, 2, dtype=torch.float64),
    )
    assert nothing.shape == (0, HIDDEN)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_a_wider_dtype(dtype: torch.dtype) -> None:
    experts = make().to(dtype)
    index = torch.tensor([[0, 1]])
    y = experts(torch.randn(1, HIDDEN, dtype=dtype), index, torch.tensor([[0.25, 0.75]]))
    assert y.dtype == dtype


def test_norm_comes_before_the_weight() -> None:
    norm = nn.LayerNorm(HIDDEN)
    experts = make(norm.double())
    x = torch.randn(1, HIDDEN, dtype=torch.float64)
    index, weight = torch.tensor([[2]]), torch.tensor([[0.5]], dtype=torch.float64)
    expected = 0.5 * norm(oracle(make(), x, index, torch.ones_like(weight)))
    torch.testing.assert_close(experts(x, index, weight), expected)


def test_tokens_that_are_weighed_already() -> None:
    torch.manual_seed(0)
    experts = [
        nn.ModuleDict(
            {
                "up": nn.Linear(HIDDEN, 2 * WIDTH, bias=False),
                "down": nn.Linear(WIDTH, HIDDEN, bias=False),
            }
        )
        for _ in range(EXPERTS)
    ]
    module = Experts(experts, "up", "down", gate).double()
    x = torch.randn(3, HIDDEN, dtype=torch.float64)
    scores = torch.tensor([[0.5, 0.0, 0.0, 0.2], [0.0, 0.0, 0.0, 0.9], [0.3, 0.0, 0.1, 0.0]])
    weighed = (scores.t().unsqueeze(-1) * x).flatten(0, 1).double()
    calls: list[int] = []
    for expert in module:
        expert["up"].register_forward_hook(lambda _, inputs, __: calls.append(len(inputs[0])))
    found = module(weighed)
    assert calls == [2, 1, 2]
    for index, expert in enumerate(module):
        rows = weighed[3 * index : 3 * index + 3]
        expected = expert["down"](gate(expert["up"](rows)))
        torch.testing.assert_close(found[3 * index : 3 * index + 3], expected)
