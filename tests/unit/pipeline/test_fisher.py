"""The Fisher diagonal against a loop over sequences with plain autograd."""

import pytest
import torch

from squeezellm_hf.calibration.fisher import calibrate_fisher
from tests.conftest import tiny_llama


def linears(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }


def expected(model: torch.nn.Module, token_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    sums = dict.fromkeys(linears(model), 0)
    for ids in token_ids:
        model.zero_grad()
        logits = model(ids[None]).logits.double()
        torch.nn.functional.cross_entropy(logits[0, :-1], ids[1:]).backward()
        for name, linear in linears(model).items():
            sums[name] += linear.weight.grad.double() ** 2
    return sums


def test_sum_of_squared_gradients(model: torch.nn.Module, token_ids: torch.Tensor) -> None:
    reference = expected(tiny_llama(), token_ids)
    fisher = calibrate_fisher(model, linears(model), list(token_ids))
    assert fisher.keys() == reference.keys()
    for name, total in fisher.items():
        assert total.dtype == torch.float32
        scale = reference[name].max()
        torch.testing.assert_close(total.double(), reference[name], rtol=1e-3, atol=1e-6 * scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype: torch.dtype, token_ids: torch.Tensor) -> None:
    reference = expected(tiny_llama(), token_ids)
    model = tiny_llama().to(dtype)
    fisher = calibrate_fisher(model, linears(model), list(token_ids))
    for name, total in fisher.items():
        correlation = torch.corrcoef(torch.stack((total.flatten(), reference[name].flatten())))
        assert correlation[0, 1] > 0.98


def test_leaves_the_model_as_it_was(model: torch.nn.Module, token_ids: torch.Tensor) -> None:
    model.train()
    model.model.embed_tokens.weight.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    calibrate_fisher(model, linears(model), list(token_ids[:1]))
    assert model.training
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert all(p.grad is None for p in model.parameters())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_goes_on_from_a_partial_sum(model: torch.nn.Module, token_ids: torch.Tensor) -> None:
    whole = calibrate_fisher(model, linears(model), list(token_ids))
    part = calibrate_fisher(model, linears(model), list(token_ids[:2]))
    counts: list[int] = []
    rest = calibrate_fisher(
        model,
        linears(model),
        list(token_ids),
        fisher=part,
        first=2,
        after_sequence=lambda count, _: counts.append(count),
    )
    assert counts == [3, 4]
    assert all(rest[name].equal(whole[name]) for name in whole)


def test_works_under_no_grad(model: torch.nn.Module, token_ids: torch.Tensor) -> None:
    with torch.no_grad():
        fisher = calibrate_fisher(model, linears(model), list(token_ids[:1]))
    assert all(total.max() > 0 for total in fisher.values())


def test_a_loss_that_is_not_finite_is_an_error(
    model: torch.nn.Module, token_ids: torch.Tensor
) -> None:
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="calibration sequence 0 gives the loss nan"):
        calibrate_fisher(model, linears(model), list(token_ids))
