"""A run that dies at any point and is started again ends in the identical result."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from squeezellm_hf.methods.squeezellm import SqueezeLLMParameters
from squeezellm_hf.pipeline import make_plan, quantize_modules, work_dir
from squeezellm_hf.pipeline import quantize as pipeline_quantize
from tests.conftest import tiny_llama

PARAMETERS = SqueezeLLMParameters(bits=3)


class Killed(Exception):
    pass


def run(token_ids: torch.Tensor, path: Path | None, parameters=PARAMETERS) -> dict:
    model = tiny_llama()
    plan = make_plan(model, parameters, skip=["lm_head"])
    quantize_modules(model, plan, token_ids, work_dir=path, progress=False)
    return model.state_dict()


def assert_identical(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    assert all(first[k].equal(second[k]) and first[k].dtype == second[k].dtype for k in first)


@pytest.mark.parametrize("layers_before_death", [0, 1, 9, 13])
def test_death_while_quantizing(
    layers_before_death: int,
    token_ids: torch.Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = pipeline_quantize.quantize_weight
    calls = []

    def dying(*args, **kwargs):
        if len(calls) == layers_before_death:
            raise Killed
        calls.append(kwargs["name"])
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline_quantize, "quantize_weight", dying)
        with pytest.raises(Killed):
            run(token_ids, tmp_path)

    again = []
    monkeypatch.setattr(
        pipeline_quantize,
        "quantize_weight",
        lambda *a, **k: (again.append(k["name"]), original(*a, **k))[1],
    )
    monkeypatch.setattr(
        pipeline_quantize, "calibrate_fisher", _only_if_nothing_is_left(pipeline_quantize)
    )
    resumed = run(token_ids, tmp_path)
    assert len(again) == 14 - layers_before_death
    assert not set(again) & set(calls)
    monkeypatch.undo()
    assert_identical(resumed, run(token_ids, None))


def _only_if_nothing_is_left(module):
    original = module.calibrate_fisher

    def wrapped(model, linears, sequences, **kwargs):
        assert kwargs["first"] == len(sequences)
        return original(model, linears, sequences, **kwargs)

    return wrapped


@pytest.mark.parametrize("sequences_before_death", [1, 3])
def test_death_while_calibrating(
    sequences_before_death: int,
    token_ids: torch.Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(work_dir, "SECONDS_BETWEEN_WRITES", 0.0)
    monkeypatch.setattr(work_dir, "WRITE_SHARE", 1e9)
    save = work_dir.WorkDir.save_fisher

    def dying(self, fisher, sequences, *, final):
        save(self, fisher, sequences, final=final)
        if sequences == sequences_before_death:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(work_dir.WorkDir, "save_fisher", dying)
        with pytest.raises(Killed):
            run(token_ids, tmp_path)
    firsts = []
    original = pipeline_quantize.calibrate_fisher
    monkeypatch.setattr(
        pipeline_quantize,
        "calibrate_fisher",
        lambda *a, **k: (firsts.append(k["first"]), original(*a, **k))[1],
    )
    resumed = run(token_ids, tmp_path)
    assert firsts == [sequences_before_death]
    assert_identical(resumed, run(token_ids, None))


def test_other_bits_reuse_the_fisher_sum_and_nothing_else(
    token_ids: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(token_ids, tmp_path)
    monkeypatch.setattr(
        pipeline_quantize, "calibrate_fisher", _only_if_nothing_is_left(pipeline_quantize)
    )
    other = SqueezeLLMParameters(bits=4)
    resumed = run(token_ids, tmp_path, other)
    monkeypatch.undo()
    assert_identical(resumed, run(token_ids, None, other))


def test_other_data_reuse_nothing(token_ids: torch.Tensor, tmp_path: Path) -> None:
    run(token_ids, tmp_path)
    other = token_ids.flip(0)[:2]
    assert_identical(run(other, tmp_path), run(other, None))


def test_damaged_files_are_named(token_ids: torch.Tensor, tmp_path: Path) -> None:
    run(token_ids, tmp_path)
    path = next(tmp_path.glob("layer-*"))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=f"{path.name} is damaged"):
        run(token_ids, tmp_path)


SCRIPT = """
import sys, torch
from tests.unit.pipeline.test_resume import run
torch.set_num_threads(1)
ids = torch.load(sys.argv[1])
print("started", flush=True)
state = run(ids, sys.argv[2])
torch.save(state, sys.argv[3])
"""


@pytest.mark.parametrize("seconds", [0.05, 0.3])
def test_a_real_kill(seconds: float, token_ids: torch.Tensor, tmp_path: Path) -> None:
    torch.save(token_ids, tmp_path / "ids.pt")
    arguments = [sys.executable, "-c", SCRIPT]
    arguments += [str(tmp_path / name) for name in ("ids.pt", "work", "state.pt")]
    root = Path(__file__).parents[3]
    process = subprocess.Popen(arguments, cwd=root, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
    process.wait()
    subprocess.run(arguments, cwd=root, check=True, capture_output=True)
    assert_identical(torch.load(tmp_path / "state.pt"), run(token_ids, None))
