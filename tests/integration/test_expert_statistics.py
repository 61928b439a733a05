"""Calibration statistics of expanded layers against those of the original, fused parameters."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from squeezellm_hf.calibration.accumulate import accumulate
from squeezellm_hf.calibration.fisher import FisherDiagonal
from squeezellm_hf.calibration.hessian import Hessians
from squeezellm_hf.calibration.tokens import TokenCounts
from squeezellm_hf.integration.expand import expand
from squeezellm_hf.nn import Experts
from tests.mixtures import EXPANDED, EXPERTS, tiny


def gradients(family: str, token_ids: Tensor) -> dict[str, Tensor]:
    """Sums of squared gradients of all parameters of the original model, in fp64."""
    model = tiny(family).double()
    model.config._experts_implementation = "eager"  # the others have no fp64
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for row in token_ids:
        model.zero_grad()
        model(input_ids=row[None], labels=row[None], use_cache=False).loss.backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                sums[name] += parameter.grad**2
    return sums


def expanded(family: str) -> tuple[Any, dict[str, nn.Linear], set[str]]:
    """The expanded model, its linear layers that were none before, those that were Conv1D."""
    model = tiny(family).double()
    was = {name for name, module in model.named_modules() if isinstance(module, Conv1D)}
    known = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    expand(model)
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name not in known
    }
    return model, linears, was


@pytest.mark.parametrize("family", EXPANDED)
def test_fisher_sums_are_those_of_the_fused_parameters(family: str, token_ids: Tensor) -> None:
    original = gradients(family, token_ids)
    model, linears, was_conv1d = expanded(family)
    statistic = FisherDiagonal(linears)
    accumulate(model, list(token_ids), [statistic])
    for name, total in statistic.sums.items():
        if name in was_conv1d:
            expected = original[f"{name}.weight"].t()
        else:
            block, index, layer = name.rsplit(".", 2)
            expected = original[f"{block}.{layer}"][int(index)]
            if family in ("gpt_oss", "llama4"):
                expected = expected.t()
        torch.testing.assert_close(total.double(), expected, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_hessians_and_counts_are_those_of_the_tokens_that_chose_the_expert(
    family: str, token_ids: Tensor
) -> None:
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
    model, linears, _ = expanded(family)
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            seen[name] = []
            module.register_forward_pre_hook(
                lambda _, inputs, kept=seen[name]: kept.append((inputs[0], inputs[1]))
            )
    first = {name: layer for name, layer in linears.items() if name.endswith("gate_up_proj")}
    hessians = Hessians(first, dict.fromkeys(first, 0))
    counts = TokenCounts(linears)
    accumulate(model, list(token_ids), [hessians, counts])
    for block, calls in seen.items():
        for index in range(EXPERTS):
            rows = [states[(chosen == index).any(dim=1)] for states, chosen in calls]
            inputs = torch.cat(rows).double()
            name = f"{block}.{index}.gate_up_proj"
            torch.testing.assert_close(
                hessians.of(name)[0].double(), inputs.t() @ inputs, rtol=1e-4, atol=1e-4
            )
            assert int(counts.sums[name]) == len(inputs)
            assert int(counts.sums[f"{block}.{index}.down_proj"]) == len(inputs)
