"""Training, verification and resumption, on a tiny Llama."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from squeezellm_hf.distillation import checkpoint as checkpoint_module
from squeezellm_hf.distillation import distill as module
from squeezellm_hf.distillation.data import Sequences, split_tokens
from squeezellm_hf.distillation.distill import distill_layers, teacher_states
from squeezellm_hf.distillation.settings import DistillationSettings
from squeezellm_hf.distillation.student import Student, training
from squeezellm_hf.distillation.trainer import Progress, Trainer
from squeezellm_hf.methods.squeezellm import SqueezeLLMParameters
from squeezellm_hf.nn import SqueezeLLMLinear
from squeezellm_hf.pipeline import make_plan, quantize_modules
from tests.conftest import tiny_llama

SETTINGS = {"steps": 24, "lr": 6e-3, "batch_size": 3, "sequence_length": 16, "held_out": 6}


def settings(**changes: Any) -> DistillationSettings:
    return DistillationSettings(**{**SETTINGS, **changes})


@pytest.fixture(scope="module")
def sequences() -> Sequences:
    ids = torch.randint(0, 128, (600,), generator=torch.Generator().manual_seed(3))
    return split_tokens(ids, settings())


def quantized(bits: int = 2) -> nn.Module:
    model = tiny_llama()
    plan = make_plan(model, SqueezeLLMParameters(bits=bits), skip=["lm_head"])
    quantize_modules(model, plan, None, progress=False)
    return model


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_identical(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert tensor.equal(second[name]), name


def run(
    model: nn.Module, sequences: Sequences, path: Path, keep: bool = False, **changes: Any
) -> module.DistillationResult:
    path.mkdir(exist_ok=True)
    options = {"mixed_precision": False, "progress": False}
    states = teacher_states(tiny_llama(), sequences, settings(), path, **options)
    work_dir = path if keep else None
    return distill_layers(
        model, states, sequences, settings(**changes), work_dir=work_dir, **options
    )


def held_out_kl(model: nn.Module, sequences: Sequences) -> float:
    """In fp64, from the logits of both models."""
    with torch.no_grad():
        ids = sequences.held_out
        p = tiny_llama().double()(input_ids=ids).logits.log_softmax(-1)
        q = model(input_ids=ids).logits.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum() / ids.numel())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train_norms": True},
        {"train_values": True},
        {"train_norms": True, "train_values": True},
        {"train_indices": True},
    ],
)
def test_brings_the_model_nearer(
    changes: dict[str, bool], sequences: Sequences, tmp_path: Path
) -> None:
    model = quantized()
    before = tensors(model)
    result = run(model, sequences, tmp_path, **changes)
    undistilled = quantized()
    assert result.kept
    assert result.divergence_before == pytest.approx(held_out_kl(undistilled, sequences), rel=1e-4)
    assert result.divergence_after == pytest.approx(held_out_kl(model, sequences), rel=1e-4)
    assert result.divergence_after < 0.97 * result.divergence_before
    after = tensors(model)
    changed = {name.rpartition(".")[2] for name in after if not after[name].equal(before[name])}
    assert "lookup_table" in changed
    assert changed <= {"lookup_table", "values", "qweight", "weight"}
    norms = {n for n in after if n.endswith(".weight") and not after[n].equal(before[n])}
    assert all("norm" in name for name in norms)
    assert bool(norms) == changes.get("train_norms", False)


def test_indices_and_sparse_weights_stay(sequences: Sequences, tmp_path: Path) -> None:
    model, before = quantized(), quantized()
    run(model, sequences, tmp_path)
    for name, layer in model.named_modules():
        if not isinstance(layer, SqueezeLLMLinear):
            continue
        old = before.get_submodule(name)
        layer.check(name)
        first, second = old.dequantize(torch.float32), layer.dequantize(torch.float32)
        rows = torch.repeat_interleave(torch.arange(layer.out_features), layer.crow_indices.diff())
        sparse = torch.zeros_like(first, dtype=torch.bool)
        sparse[rows, layer.col_indices.long()] = True
        torch.testing.assert_close(second[sparse], first[sparse], rtol=1e-3, atol=1e-4)
        # Cells that shared an entry still do: the partition of every row is what it was.
        for old_row, new_row, mask in zip(first, second, ~sparse, strict=True):
            groups = old_row[mask].unique(return_inverse=True)[1]
            values = torch.zeros(len(groups.unique()))
            values[groups] = new_row[mask]
            assert new_row[mask].equal(values[groups])


@pytest.mark.parametrize("lr", [10.0, 1e6, 1e30])
def test_divergence_leaves_the_model_as_it_was(
    lr: float, sequences: Sequences, tmp_path: Path
) -> None:
    model = quantized()
    before = tensors(model)
    result = run(model, sequences, tmp_path, lr=lr, train_norms=True, train_values=True)
    assert not result.kept
    assert result.steps < 24
    assert result.divergence_after == result.divergence_before
    assert_identical(tensors(model), before)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "proj" in n)


def test_what_is_stored_is_verified(
    sequences: Sequences, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training went well, but what was written is worse: it is taken back."""
    store = module._store

    def broken(model: nn.Module, student: Student) -> Any:
        undo = store(model, student)
        layer = model.get_submodule(next(iter(student.layers)))
        layer.lookup_table.data = -layer.lookup_table.data
        return undo

    monkeypatch.setattr(module, "_store", broken)
    model = quantized()
    before = tensors(model)
    result = run(model, sequences, tmp_path, train_norms=True)
    assert not result.kept
    assert result.best_step == 0
    assert min(d for _, d in result.held_out) < result.divergence_before
    assert_identical(tensors(model), before)


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    "changes", [{}, {"train_norms": True, "train_values": True, "train_indices": True}]
)
@pytest.mark.parametrize("steps_before_death", [0, 1, 7, 23])
def test_death_and_resumption(
    steps_before_death: int,
    changes: dict[str, bool],
    sequences: Sequences,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(checkpoint_module, "SECONDS_BETWEEN_WRITES", 0.0)
    monkeypatch.setattr(checkpoint_module, "WRITE_SHARE", torch.inf)
    step, steps = Trainer._step, []

    def dying(self: Trainer) -> Tensor:
        if len(steps) == steps_before_death:
            raise Killed
        steps.append(self.progress.step)
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", dying)
        model = quantized()
        before = tensors(model)
        with pytest.raises(Killed):
            run(model, sequences, tmp_path / "killed", keep=True, **changes)
        assert_identical(tensors(model), before)  # the layers are back in their places

    monkeypatch.setattr(
        Trainer, "_step", lambda self: (steps.append(self.progress.step), step(self))[1]
    )
    resumed = quantized()
    result = run(resumed, sequences, tmp_path / "killed", keep=True, **changes)
    assert steps == list(range(24))
    monkeypatch.undo()
    whole = quantized()
    assert run(whole, sequences, tmp_path / "whole", **changes) == result
    assert_identical(tensors(resumed), tensors(whole))


def test_a_finished_run_is_not_repeated(
    sequences: Sequences, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = quantized(), quantized()
    result = run(first, sequences, tmp_path, keep=True)
    monkeypatch.setattr(Trainer, "_step", lambda _: pytest.fail("trained again"))
    assert run(second, sequences, tmp_path, keep=True) == result
    assert_identical(tensors(first), tensors(second))


@pytest.mark.parametrize("changes", [{"lr": 2e-3}, {"seed": 1}, {"steps": 25}])
def test_another_run_takes_nothing_over(
    changes: dict[str, Any], sequences: Sequences, tmp_path: Path
) -> None:
    run(quantized(), sequences, tmp_path / "shared", keep=True)
    second, alone = quantized(), quantized()
    run(second, sequences, tmp_path / "shared", keep=True, **changes)
    run(alone, sequences, tmp_path / "alone", **changes)
    assert_identical(tensors(second), tensors(alone))


def test_a_damaged_state_is_an_error(sequences: Sequences, tmp_path: Path) -> None:
    run(quantized(), sequences, tmp_path, keep=True)
    (path,) = tmp_path.glob("distill-*.pt")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"distill-.*\.pt is damaged; delete it"):
        run(quantized(), sequences, tmp_path, keep=True)


def test_micro_batches_differ_by_rounding_alone(sequences: Sequences, tmp_path: Path) -> None:
    first, second = quantized(), quantized()
    run(first, sequences, tmp_path, steps=4)
    run(second, sequences, tmp_path, steps=4, micro_batch_size=2)
    for (name, one), two in zip(tensors(first).items(), tensors(second).values(), strict=True):
        if name.endswith("lookup_table"):
            torch.testing.assert_close(one, two, rtol=1e-2, atol=2e-3)


def test_stops_when_nothing_is_gained() -> None:
    assert not Progress(held_out=[(0, 1.0)]).is_hopeless(1)
    assert Progress(held_out=[(0, 1.0), (2, 1.5)]).is_hopeless(1)
    fallen = Progress(held_out=[(0, 1.0), (2, 1.5), (4, 0.5), (6, 0.7)], best_step=4)
    assert fallen.best_divergence == 0.5
    assert fallen.is_hopeless(1)
    assert not fallen.is_hopeless(2)
    assert Progress(held_out=[(0, 1.0), (2, float("nan"))]).is_hopeless(9)


def test_training_mode_and_gradients_are_restored(sequences: Sequences, tmp_path: Path) -> None:
    model = quantized().train()
    model.model.embed_tokens.weight.requires_grad_(True)
    required = {name: p.requires_grad for name, p in model.named_parameters()}
    run(model, sequences, tmp_path, steps=2)
    assert model.training
    assert {name: p.requires_grad for name, p in model.named_parameters()} == required
    assert all(p.grad is None for p in model.parameters())


def test_nothing_quantized_is_an_error(sequences: Sequences, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="LlamaForCausalLM has no quantized layer to distill"):
        run(tiny_llama(), sequences, tmp_path)


def test_states_of_other_data_are_an_error(sequences: Sequences, tmp_path: Path) -> None:
    options = {"mixed_precision": False, "progress": False}
    states = teacher_states(tiny_llama(), sequences, settings(), tmp_path, **options)
    fewer = Sequences(sequences.train[1:], sequences.held_out)
    with pytest.raises(
        ValueError, match=r"states are of \[37, 16\] tokens, the data of \[36, 16\]"
    ):
        distill_layers(quantized(), states, fewer, settings(), **options)


def test_learning_rates_follow_the_bits_of_a_layer() -> None:
    model = tiny_llama()
    plan = make_plan(
        model,
        SqueezeLLMParameters(bits=3),
        skip=["lm_head"],
        overrides={"re:.*down_proj": {"bits": 4}},
    )
    quantize_modules(model, plan, None, progress=False)
    student = Student(model, settings(lr=None, train_norms=True, train_values=True))
    groups = {group["lr"]: group["params"] for group in student.groups(settings(lr=None))}
    assert set(groups) == {1e-3, 1.5e-3}
    with training(model, student):
        ours = {id(p) for p in model.parameters() if p.requires_grad}
    assert ours == {id(p) for group in groups.values() for p in group}
    tables = [p for p in groups[1e-3] if p.dim() == 2]
    assert [p.shape[1] for p in tables] == [16, 16]
