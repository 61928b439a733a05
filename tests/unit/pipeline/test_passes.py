"""How a plan is cut by the memory that its Hessians need."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from squeezellm_hf.methods.squeezellm import SqueezeLLMParameters
from squeezellm_hf.pipeline import make_plan, passes, quantize_modules
from squeezellm_hf.pipeline.passes import hessian_budgets, hessian_bytes, make_passes
from tests.conftest import tiny_llama

CPU = torch.device("cpu")
GUIDED = SqueezeLLMParameters(codebook="guided", guided_groups=3)
LNQ = SqueezeLLMParameters(codebook="lnq")
WIDTH = 32
MATRIX = 4 * WIDTH**2


def layers(count: int = 6) -> dict[str, nn.Linear]:
    return {f"layer{i}": nn.Linear(WIDTH, 16) for i in range(count)}


def cut(parameters: SqueezeLLMParameters, budget: int, shared: dict | None = None):
    linears = layers()
    return make_passes(dict.fromkeys(linears, parameters), linears, shared or {}, {CPU: budget})


def test_bytes_of_hessians() -> None:
    assert hessian_bytes(nn.Linear(WIDTH, 16), 0) == MATRIX
    assert hessian_bytes(nn.Linear(WIDTH, 16), 4) == 4 * MATRIX
    assert hessian_bytes(nn.Linear(WIDTH, 3), 4) == 3 * MATRIX


@pytest.mark.parametrize(
    ("budget", "sizes"),
    [(18 * MATRIX, [6]), (18 * MATRIX - 1, [5, 1]), (7 * MATRIX, [2, 2, 2]), (1, [1] * 6)],
)
def test_as_few_passes_as_fit(budget: int, sizes: list[int]) -> None:
    found = cut(GUIDED, budget)
    assert [len(each.names) for each in found] == sizes
    assert [name for each in found for name in each.names] == list(layers())
    assert all(each.groups == dict.fromkeys(each.names, 3) for each in found)


def test_shared_inputs_count_once() -> None:
    shared = {"layer0": "layer0", "layer1": "layer0", "layer2": "layer0", "layer3": "layer3"}
    assert [len(each.names) for each in cut(LNQ, 2 * MATRIX, shared)] == [4, 2]
    assert [len(each.names) for each in cut(LNQ, 2 * MATRIX)] == [2, 2, 2]
    assert [len(each.names) for each in cut(GUIDED, 6 * MATRIX, shared)] == [2, 2, 2]


def test_k_means_needs_no_room() -> None:
    (only,) = cut(SqueezeLLMParameters(), 1)
    assert only.groups == {}
    assert only.parts == [[name] for name in layers()]


def test_mixed_plans() -> None:
    linears = layers()
    plan = dict.fromkeys(linears, GUIDED)
    plan["layer1"] = plan["layer5"] = SqueezeLLMParameters()
    plan["layer3"] = LNQ
    found = make_passes(plan, linears, {}, {CPU: 6 * MATRIX})
    assert [each.groups for each in found] == [
        {"layer0": 3, "layer2": 3},
        {"layer3": 0, "layer4": 3},
    ]
    assert found[1].names == ["layer3", "layer4", "layer5"]


def test_parts_hold_layers_of_one_shape_and_one_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    linears = {**layers(4), "wide": nn.Linear(WIDTH, 17), "last": nn.Linear(WIDTH, 16)}
    plan = dict.fromkeys(linears, GUIDED)
    plan["layer2"] = replace(GUIDED, bits=3)
    (only,) = make_passes(plan, linears, {}, {CPU: 1 << 30})
    assert only.parts == [["layer0", "layer1", "layer3", "last"], ["layer2"], ["wide"]]
    monkeypatch.setattr(passes, "_CPU_CELLS", 3 * WIDTH * 16)
    (only,) = make_passes(plan, linears, {}, {CPU: 1 << 30})
    assert only.parts == [["layer0", "layer1", "layer3"], ["layer2"], ["wide"], ["last"]]


def test_budgets_leave_room_for_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    monkeypatch.setattr(passes, "_LEAST_BYTES", 0)
    taken = sum(p.nbytes for p in model.parameters())
    taken += 4 * sum(linear.weight.numel() for linear in linears.values())
    monkeypatch.setattr(passes, "_memory", lambda device: taken + 1000)
    assert hessian_budgets(linears, model) == {CPU: 500}


def test_without_data_there_are_no_hessians() -> None:
    model = tiny_llama()
    plan = make_plan(model, GUIDED, skip=["lm_head"])
    with pytest.raises(ValueError, match=r"codebook='guided' of model.layers.0.* needs calibrat"):
        quantize_modules(model, plan, None, progress=False)
