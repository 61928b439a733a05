"""Second moments of inputs against loops over tokens with plain autograd, in fp64."""

import copy

import pytest
import torch
from torch import Tensor, nn

from squeezellm_hf.calibration import hessian as hessian_module
from squeezellm_hf.calibration.accumulate import accumulate
from squeezellm_hf.calibration.fisher import FisherDiagonal, calibrate_fisher
from squeezellm_hf.calibration.hessian import Hessians, channel_groups, shared_inputs, sum_names
from tests.conftest import tiny_llama

Q, K, V = (f"model.layers.0.self_attn.{x}_proj" for x in "qkv")
UP, GATE = "model.layers.1.mlp.up_proj", "model.layers.1.mlp.gate_proj"
DOWN = "model.layers.1.mlp.down_proj"


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }


def inputs_and_gradients(
    model: nn.Module, token_ids: Tensor
) -> dict[str, tuple[list[Tensor], list[Tensor]]]:
    """By layer and sequence: inputs [t, n], and gradients of the mean loss by outputs [t, m]."""
    model = copy.deepcopy(model).double()
    found: dict[str, tuple[list[Tensor], list[Tensor]]] = {n: ([], []) for n in linears(model)}
    for ids in token_ids:
        outputs = {}

        def keep(name: str, outputs: dict = outputs):
            def hook(_, inputs, output) -> None:
                found[name][0].append(inputs[0][0].detach())
                outputs[name] = output

            return hook

        handles = [m.register_forward_hook(keep(name)) for name, m in linears(model).items()]
        logits = model(ids[None]).logits[0]
        loss = nn.functional.cross_entropy(logits[:-1], ids[1:])
        gradients = torch.autograd.grad(loss, list(outputs.values()))
        for name, gradient in zip(outputs, gradients, strict=True):
            found[name][1].append(gradient[0])
        for handle in handles:
            handle.remove()
    return found


def guided(inputs: list[Tensor], gradients: list[Tensor], groups: list[slice]) -> Tensor:
    total = torch.zeros(len(groups), inputs[0].shape[1], inputs[0].shape[1]).double()
    for x, g in zip(inputs, gradients, strict=True):
        for t in range(len(x)):
            for index, channels in enumerate(groups):
                saliency = (g[t, channels] ** 2).sum() / len(g[t, channels])
                total[index] += saliency * torch.outer(x[t], x[t])
    return total


def assert_close(actual: Tensor, expected: Tensor, rtol: float = 1e-3) -> None:
    scale = float(expected.abs().max())
    torch.testing.assert_close(actual.double(), expected, rtol=rtol, atol=1e-5 * scale)


@pytest.fixture(params=[384, 24], ids=["one block", "blocks"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hessian_module, "_BLOCK", request.param)


@pytest.mark.usefixtures("block")
def test_plain(model: nn.Module, token_ids: Tensor) -> None:
    layers = linears(model)
    statistic = Hessians(layers, dict.fromkeys(layers, 0))
    accumulate(model, list(token_ids), [statistic])
    for name, (inputs, _) in inputs_and_gradients(tiny_llama(), token_ids).items():
        expected = sum(x.T @ x for x in inputs)
        assert statistic.of(name).shape == (1, *expected.shape)
        assert_close(statistic.of(name)[0], expected)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("groups", [1, 3, 4])
def test_guided(groups: int, model: nn.Module, token_ids: Tensor) -> None:
    layers = linears(model)
    statistic = Hessians(layers, dict.fromkeys(layers, groups))
    accumulate(model, list(token_ids[:2]), [statistic])
    reference = inputs_and_gradients(tiny_llama(), token_ids[:2])
    for name in (Q, K, UP, DOWN):
        channels = channel_groups(layers[name].out_features, groups)
        assert_close(statistic.of(name), guided(*reference[name], channels))


def test_guided_of_one_channel_a_group_has_the_fisher_diagonal(
    model: nn.Module, token_ids: Tensor
) -> None:
    """With one token the gradient of a weight is g[o] x[i]: its square is that of H's diagonal."""
    layers = {UP: linears(model)[UP]}
    sequences = list(token_ids[:, :2])  # of two tokens, only the first has a loss
    statistic = Hessians(layers, {UP: 10_000})
    accumulate(model, sequences, [statistic])
    fisher = calibrate_fisher(model, layers, sequences)[UP]
    assert fisher.max() > 0
    assert_close(statistic.of(UP).diagonal(dim1=1, dim2=2), fisher.double())


@pytest.mark.parametrize(
    ("out_features", "groups", "sizes"),
    [(8, 4, [2, 2, 2, 2]), (7, 3, [2, 3, 2]), (2, 4, [1, 1]), (5, 1, [5])],
)
def test_channel_groups(out_features: int, groups: int, sizes: list[int]) -> None:
    slices = channel_groups(out_features, groups)
    assert [s.stop - s.start for s in slices] == sizes
    assert [s.start for s in slices] == [0, *(s.stop for s in slices[:-1])]
    assert slices[-1].stop == out_features


def test_layers_with_the_same_input_are_found(model: nn.Module, token_ids: Tensor) -> None:
    shared = shared_inputs(model, linears(model), token_ids[0])
    assert shared.keys() == linears(model).keys()
    assert (shared[Q], shared[K], shared[V]) == (Q, Q, Q)
    assert shared[UP] == shared[GATE] == GATE
    assert shared[DOWN] == DOWN
    assert len(set(shared.values())) == 8


def test_plain_hessians_of_the_same_input_are_summed_once(
    model: nn.Module, token_ids: Tensor
) -> None:
    layers = {name: linears(model)[name] for name in (K, Q, V, DOWN)}
    shared = shared_inputs(model, layers, token_ids[0])
    groups = {Q: 0, K: 0, V: 2, DOWN: 0}
    assert sum_names(layers, groups, shared) == {K: K, Q: K, V: V, DOWN: DOWN}
    statistic = Hessians(layers, groups, shared)
    alone = Hessians(layers, groups)
    accumulate(model, list(token_ids), [statistic, alone])
    assert statistic.sums.keys() == {K, V, DOWN}
    assert alone.sums.keys() == {K, Q, V, DOWN}
    assert all(statistic.of(name).equal(alone.of(name)) for name in layers)


def test_sums_are_kept_as_long_as_a_layer_needs_them(model: nn.Module, token_ids: Tensor) -> None:
    layers = {name: linears(model)[name] for name in (Q, K, V, DOWN)}
    shared = shared_inputs(model, layers, token_ids[0])
    hessians = Hessians(layers, dict.fromkeys(layers, 0), shared)
    assert hessians.sums.keys() == {Q, DOWN}
    hessians.keep([V])
    assert hessians.sums.keys() == {Q}
    hessians.keep([])
    assert not hessians.sums


def test_together_or_alone_the_sums_are_the_same(model: nn.Module, token_ids: Tensor) -> None:
    layers = linears(model)
    groups = {name: 2 if name.endswith(("q_proj", "down_proj")) else 0 for name in layers}
    both = Hessians(layers, groups), FisherDiagonal(layers)
    accumulate(model, list(token_ids), both)
    fisher = calibrate_fisher(model, layers, list(token_ids))
    for name in layers:
        alone = Hessians({name: layers[name]}, groups)
        accumulate(model, list(token_ids), [alone])
        assert alone.of(name).equal(both[0].of(name))
        assert fisher[name].equal(both[1].sums[name])


def test_statistics_that_stopped_at_different_places_go_on_together(
    model: nn.Module, token_ids: Tensor
) -> None:
    layers = linears(model)
    groups = dict.fromkeys(layers, 2)
    whole = Hessians(layers, groups), FisherDiagonal(layers)
    accumulate(model, list(token_ids), whole)
    hessians, fisher = Hessians(layers, groups), FisherDiagonal(layers)
    accumulate(model, list(token_ids[:3]), [hessians])
    accumulate(model, list(token_ids[:1]), [fisher])
    assert (hessians.sequences, fisher.sequences) == (3, 1)
    hessians = Hessians(layers, groups, sums=hessians.sums, sequences=3)
    counts: list[int] = []
    accumulate(model, list(token_ids), [hessians, fisher], after_sequence=counts.append)
    assert counts == [2, 3, 4]
    assert all(hessians.of(name).equal(whole[0].of(name)) for name in layers)
    assert all(fisher.sums[name].equal(whole[1].sums[name]) for name in layers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype: torch.dtype, token_ids: Tensor) -> None:
    model = tiny_llama().to(dtype)
    layers = linears(model)
    statistic = Hessians(layers, dict.fromkeys(layers, 2))
    accumulate(model, list(token_ids[:2]), [statistic])
    reference = inputs_and_gradients(tiny_llama(), token_ids[:2])
    for name in (Q, DOWN):
        expected = guided(*reference[name], channel_groups(layers[name].out_features, 2))
        actual = statistic.of(name).double()
        assert torch.corrcoef(torch.stack((actual.flatten(), expected.flatten())))[0, 1] > 0.98
        assert 0.8 < actual.norm() / expected.norm() < 1.25


def test_hessians_are_symmetric_and_positive_semidefinite(
    model: nn.Module, token_ids: Tensor
) -> None:
    layers = linears(model)
    statistic = Hessians(layers, {n: 3 if n.endswith("v_proj") else 0 for n in layers})
    accumulate(model, list(token_ids), [statistic])
    for name in layers:
        hessian = statistic.of(name)
        assert hessian.equal(hessian.transpose(1, 2))
        values = torch.linalg.eigvalsh(hessian.double())
        assert (values.amin(dim=1) >= -1e-5 * values.amax(dim=1)).all()


def test_leaves_the_model_as_it_was(model: nn.Module, token_ids: Tensor) -> None:
    model.train()
    model.model.embed_tokens.weight.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    layers = linears(model)
    shared_inputs(model, layers, token_ids[0])
    accumulate(model, list(token_ids[:1]), [Hessians(layers, dict.fromkeys(layers, 1))])
    assert model.training
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in layers.values())


def test_sums_that_are_not_finite_are_an_error(model: nn.Module, token_ids: Tensor) -> None:
    layers = {DOWN: linears(model)[DOWN]}

    class Huge(Hessians):
        def check(self) -> None:
            self.sums[DOWN][0, 5, 5] = torch.inf
            super().check()

    with pytest.raises(ValueError, match=f"second moments of the inputs of {DOWN} are not finite"):
        accumulate(model, list(token_ids[:1]), [Huge(layers, {DOWN: 0})])
