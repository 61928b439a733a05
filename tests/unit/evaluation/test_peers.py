"""Peers against brute force, and their bits against the formulas of their papers."""

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from squeezellm_hf.evaluation.compare import layer_names
from squeezellm_hf.evaluation.peers.gptq import GPTQ
from squeezellm_hf.evaluation.peers.half_quadratic import HQQ
from squeezellm_hf.evaluation.peers.nf4 import NF4
from squeezellm_hf.evaluation.peers.peer import Stored
from squeezellm_hf.evaluation.peers.uniform import Grid, RoundToNearest, round_to_nearest

from .conftest import tiny_llama


def inputs(n: int, tokens: int = 400, seed: int = 0) -> Tensor:
    """Inputs that are correlated, and of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, n, generator=generator, dtype=torch.float64)
    sizes = torch.logspace(-1, 1, n, dtype=torch.float64)[torch.randperm(n, generator=generator)]
    return torch.randn(tokens, n, generator=generator, dtype=torch.float64) @ mix * sizes


def weight(rows: int, n: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, n, generator=torch.Generator().manual_seed(seed))


def output_error(stored: Stored, w: Tensor, x: Tensor) -> float:
    return (x @ (stored.weight - w).double().T).square().sum().item()


@given(st.integers(0, 2**32 - 1), st.integers(1, 4))
def test_a_grid_holds_zero_and_rounds_to_its_nearest_point(seed: int, bits: int) -> None:
    row = weight(1, 9, seed) * 3
    grid = Grid.of(row, bits)
    points = grid.scale * (torch.arange(2**bits) - grid.zero)
    assert (points == 0).any()
    nearest = (row[0, :, None] - points).abs().argmin(dim=1)
    assert torch.allclose((grid.round(row)[0] - row[0]).abs(), (points[0, nearest] - row[0]).abs())


def test_rounding_takes_every_group_by_itself() -> None:
    w = weight(3, 10)
    stored = round_to_nearest(w, 3, 4)
    for part in (slice(0, 4), slice(4, 8), slice(8, 10)):
        assert stored.weight[:, part].equal(round_to_nearest(w[:, part], 3, 4).weight)
    assert stored.n_bits == 30 * 3 + 3 * 3 * (16 + 3)


def sequential_rounding(w: Tensor, hessian: Tensor, bits: int) -> Tensor:
    """GPTQ by its definition: after each column, the best real values for those left."""
    n = w.shape[1]
    grid = Grid.of(w, bits)
    left, done = w.double(), torch.empty_like(w.double())
    for i in range(n):
        done[:, i] = grid.round(left[:, i : i + 1].float())[:, 0].double()
        # minimise d H d over d[i+1:], with d[:i+1] what was rounded minus the original weight
        known = (done[:, : i + 1] - w[:, : i + 1].double()) @ hessian[: i + 1, i + 1 :]
        rest = -torch.linalg.solve(hessian[i + 1 :, i + 1 :], known.T).T if i + 1 < n else known
        left[:, i + 1 :] = w[:, i + 1 :].double() + rest
    return done


def test_gptq_makes_up_for_errors_as_least_squares_would() -> None:
    x, w = inputs(12), weight(5, 12)
    hessian = x.T @ x
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    found = GPTQ(3, 128, act_order=False).quantize_weights([w], hessian.float())[0]
    assert torch.allclose(found.weight.double(), sequential_rounding(w, damped, 3), atol=1e-5)
    order = hessian.diagonal().argsort(descending=True)
    found = GPTQ(3, 128, act_order=True).quantize_weights([w], hessian.float())[0]
    expected = sequential_rounding(w[:, order], damped[order][:, order], 3)
    assert torch.allclose(found.weight[:, order].double(), expected, atol=1e-5)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("static", [False, True])
def test_gptq_in_blocks_and_groups(act_order: bool, static: bool) -> None:
    x, w = inputs(300, 2000), weight(7, 300)
    hessian = (x.T @ x).float()
    gptq = GPTQ(3, 64, act_order=act_order, static_groups=static)
    found = gptq.quantize_weights([w], hessian)[0]
    nearest = output_error(round_to_nearest(w, 3, 64), w, x)
    assert output_error(found, w, x) < 0.8 * nearest
    indices = 32 * 300 if act_order and not static else 0
    assert found.n_bits == 7 * 300 * 3 + 7 * 5 * (16 + 3) + indices


def test_gptq_is_the_best_of_all_roundings_where_columns_do_not_meet() -> None:
    w = weight(1, 4)
    hessian = torch.diag(torch.tensor([3.0, 1.0, 2.0, 5.0]))
    found = GPTQ(2, 128).quantize_weights([w], hessian)[0].weight
    grid = Grid.of(w, 2)
    points = (grid.scale * (torch.arange(4) - grid.zero))[0].tolist()
    errors = {
        choice: ((torch.tensor(choice) - w[0]).square() * hessian.diagonal()).sum().item()
        for choice in itertools.product(points, repeat=4)
    }
    assert found[0].tolist() == pytest.approx(min(errors, key=lambda choice: errors[choice]))


def test_gptq_with_inputs_that_are_always_zero() -> None:
    x, w = inputs(16), weight(3, 16)
    x[:, [2, 7]] = 0
    found = GPTQ(4, 16).quantize_weights([w], (x.T @ x).float())[0].weight
    assert found.isfinite().all()
    assert (found - w).abs().max() < 1


def test_gptq_sees_what_the_quantized_blocks_before_give() -> None:
    """Against whole forward passes of the model, one a block."""
    model, reference = tiny_llama(0), tiny_llama(0)
    ids = torch.randint(0, 97, (6, 24), generator=torch.Generator().manual_seed(5))
    names = layer_names(model)
    gptq = GPTQ(3, 16)
    n_bits = gptq.quantize(model, names, ids)
    expected_bits = 0
    for block in range(2):
        layers = {n: reference.get_submodule(n) for n in names if f"layers.{block}." in n}
        for name, x in inputs_of(reference, layers, ids).items():
            stored = gptq.quantize_weights([layers[name].weight.detach()], x.T @ x)[0]
            expected_bits += stored.n_bits
            layers[name].weight.data.copy_(stored.weight)
    assert n_bits == expected_bits
    changed = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        # A rounding may fall the other way after another order of summation: almost all agree.
        assert (parameter - changed[name]).abs().gt(1e-5).float().mean() < 0.02, name


@torch.no_grad()
def inputs_of(model: nn.Module, layers: dict[str, nn.Module], ids: Tensor) -> dict[str, Tensor]:
    """All inputs of some layers, a token a row."""
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, inputs: seen[name].append(inputs[0][0])

    hooks = [layer.register_forward_pre_hook(note(name)) for name, layer in layers.items()]
    for sequence in ids:
        model(sequence[None])
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def test_gptq_refuses_what_it_cannot_walk_through() -> None:
    model = tiny_llama(0)
    ids = torch.zeros(2, 8, dtype=torch.int64)
    names = layer_names(model)
    with pytest.raises(ValueError, match="no list of blocks"):
        GPTQ(4, 16).quantize(model, [*names, "lm_head"], ids)
    # What stands between two blocks is no part of either.
    model.model.layers[1] = nn.Sequential()
    model.model.layers[1].forward = lambda hidden_states, **_: hidden_states
    model.model.layers[1].register_forward_pre_hook(
        lambda _, args, kwargs: ((args[0] * 2,), kwargs), with_kwargs=True
    )
    with pytest.raises(ValueError, match="do not simply follow one another"):
        GPTQ(4, 16).quantize(model, [n for n in names if ".0." in n], ids)


@pytest.mark.parametrize(
    ("peer", "message"),
    [
        (lambda: RoundToNearest(0), "bits=0"),
        (lambda: GPTQ(4, 0), "group_size=0"),
        (lambda: GPTQ(9), "bits=9"),
    ],
)
def test_options_out_of_range(peer: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        peer()  # type: ignore[operator]


def bits_of(
    peer: NF4 | HQQ | RoundToNearest, rows: int = 512, n: int = 1024
) -> tuple[float, float]:
    """Bits a weight of a random matrix, and the relative error."""
    model = nn.ModuleDict({"layer": nn.Linear(n, rows, bias=False, dtype=torch.bfloat16)})
    w = model["layer"].weight.detach().clone()
    n_bits = peer.quantize(model, ["layer"], torch.empty(0))
    error = (model["layer"].weight - w).norm() / w.norm()
    return n_bits / w.numel(), error.item()


@pytest.mark.parametrize(
    ("double_quant", "bits"), [(False, 4 + 32 / 64), (True, 4 + 8 / 64 + 32 / (64 * 256))]
)
def test_bits_of_nf4(double_quant: bool, bits: float) -> None:
    pytest.importorskip("bitsandbytes")
    found, error = bits_of(NF4(double_quant=double_quant))
    assert found == pytest.approx(bits, abs=1e-4)
    assert 0.03 < error < 0.12


@pytest.mark.parametrize(
    ("bits", "group_size", "axis", "packed"),
    [(4, 64, 1, 4), (4, 128, 1, 4), (4, 64, 0, 4), (3, 64, 1, 3.2), (2, 128, 1, 2)],
)
def test_bits_of_hqq(bits: int, group_size: int, axis: int, packed: float) -> None:
    pytest.importorskip("hqq")
    found, error = bits_of(HQQ(bits, group_size, axis))
    assert found == pytest.approx(packed + 32 / group_size, rel=1e-3)
    assert error < {4: 0.15, 3: 0.3, 2: 0.7}[bits]


def test_bits_of_rounding() -> None:
    assert bits_of(RoundToNearest(4, 64))[0] == 4 + (16 + 4) / 64
