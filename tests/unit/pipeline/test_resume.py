"""A run that dies at any point and is started again ends in the identical result."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from squeezellm_hf.methods.squeezellm import SqueezeLLMParameters
from squeezellm_hf.pipeline import calibrate as pipeline_calibrate
from squeezellm_hf.pipeline import make_plan, quantize_modules, work_dir
from squeezellm_hf.pipeline import quantize as pipeline_quantize
from tests.conftest import tiny_llama

PARAMETERS = {
    "kmeans": SqueezeLLMParameters(bits=3),
    "lnq": SqueezeLLMParameters(bits=3, codebook="lnq"),
    "guided": SqueezeLLMParameters(bits=3, codebook="guided", guided_groups=2),
}
# Bytes for Hessians: all in one pass over the data, or a few layers in each.
ONE_PASS, PASSES = 1 << 30, 200_000


class Killed(Exception):
    pass


def run(
    token_ids: torch.Tensor, path: Path | None, parameters=PARAMETERS["kmeans"], budget=ONE_PASS
) -> dict:
    model = tiny_llama()
    plan = make_plan(model, parameters, skip=["lm_head"])
    budgets = {torch.device("cpu"): budget}
    quantize_modules(model, plan, token_ids, work_dir=path, progress=False, hessian_budgets=budgets)
    return model.state_dict()


def assert_identical(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    assert all(first[k].equal(second[k]) and first[k].dtype == second[k].dtype for k in first)


def dying_quantization(monkeypatch: pytest.MonkeyPatch, after: int | None) -> list[list[str]]:
    """Kill the run before it quantizes part number ``after``; returns the names of parts done."""
    original, parts = pipeline_quantize.quantize_weights, []

    def dying(matrices):
        if len(parts) == after:
            raise Killed
        parts.append([matrix.name for matrix in matrices])
        return original(matrices)

    monkeypatch.setattr(pipeline_quantize, "quantize_weights", dying)
    return parts


def counting_calibration(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Note from which sequence each statistic of each walk over the data goes on."""
    original, walks = pipeline_calibrate.accumulate, []

    def counting(model, sequences, statistics, **kwargs):
        walks.append(tuple(s.sequences for s in statistics))
        return original(model, sequences, statistics, **kwargs)

    monkeypatch.setattr(pipeline_calibrate, "accumulate", counting)
    return walks


@pytest.mark.parametrize("parts_before_death", [0, 1, 9, 13])
def test_death_while_quantizing(
    parts_before_death: int,
    token_ids: torch.Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        before = dying_quantization(patch, parts_before_death)
        with pytest.raises(Killed):
            run(token_ids, tmp_path)
    with monkeypatch.context() as patch:
        after = dying_quantization(patch, None)
        walks = counting_calibration(patch)
        resumed = run(token_ids, tmp_path)
    assert walks == []
    assert len(before) == parts_before_death
    assert sorted(name for part in before + after for name in part) == sorted(
        name for name in make_plan(tiny_llama(), PARAMETERS["kmeans"], skip=["lm_head"])
    )
    assert_identical(resumed, run(token_ids, None))


@pytest.mark.parametrize("codebook", ["lnq", "guided"])
@pytest.mark.parametrize("budget", [ONE_PASS, PASSES])
@pytest.mark.parametrize("parts_before_death", [0, 1, 3])
def test_death_while_solving_with_hessians(
    codebook: str,
    budget: int,
    parts_before_death: int,
    token_ids: torch.Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parameters = PARAMETERS[codebook]
    with monkeypatch.context() as patch:
        before = dying_quantization(patch, parts_before_death)
        with pytest.raises(Killed):
            run(token_ids, tmp_path, parameters, budget)
    with monkeypatch.context() as patch:
        after = dying_quantization(patch, None)
        resumed = run(token_ids, tmp_path, parameters, budget)
    assert len(before) == parts_before_death
    assert not {tuple(part) for part in before} & {tuple(part) for part in after}
    assert sum(map(len, before + after)) == 14
    assert_identical(resumed, run(token_ids, None, parameters, budget))
    assert len(list(tmp_path.glob("hessian-*"))) == (1 if budget == ONE_PASS else 0)


def test_a_part_of_which_layers_are_missing_is_done_anew(
    token_ids: torch.Tensor, tmp_path: Path
) -> None:
    whole = run(token_ids, tmp_path, PARAMETERS["guided"])
    next(tmp_path.glob("layer-model.layers.1.self_attn.q_proj-*")).unlink()
    next(tmp_path.glob("fisher-*")).unlink()
    assert_identical(run(token_ids, tmp_path, PARAMETERS["guided"]), whole)


def test_one_pass_or_several_end_in_the_same_result(token_ids: torch.Tensor) -> None:
    for codebook in ("lnq", "guided"):
        one, several = (
            run(token_ids, None, PARAMETERS[codebook], budget) for budget in (ONE_PASS, PASSES)
        )
        assert_identical(one, several)


@pytest.mark.parametrize("codebook", ["kmeans", "lnq", "guided"])
@pytest.mark.parametrize("sequences_before_death", [1, 3])
def test_death_while_calibrating(
    codebook: str,
    sequences_before_death: int,
    token_ids: torch.Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parameters = PARAMETERS[codebook]
    monkeypatch.setattr(work_dir, "SECONDS_BETWEEN_WRITES", 0.0)
    monkeypatch.setattr(work_dir, "WRITE_SHARE", 1e9)
    save = work_dir.WorkDir.save_sums

    def dying(self, label, sums, sequences, *, final):
        save(self, label, sums, sequences, final=final)
        if sequences == sequences_before_death:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(work_dir.WorkDir, "save_sums", dying)
        with pytest.raises(Killed):
            run(token_ids, tmp_path, parameters)
    walks = counting_calibration(monkeypatch)
    resumed = run(token_ids, tmp_path, parameters)
    # The kill came after the first of the files of sums: Fisher, tokens, maybe Hessians.
    expected = (sequences_before_death, sequences_before_death - 1, sequences_before_death - 1)
    assert walks == [expected if codebook != "kmeans" else expected[:2]]
    assert_identical(resumed, run(token_ids, None, parameters))


@pytest.mark.parametrize("codebook", ["kmeans", "lnq", "guided"])
def test_other_bits_reuse_the_sums_and_nothing_else(
    codebook: str, token_ids: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(token_ids, tmp_path, PARAMETERS[codebook])
    walks = counting_calibration(monkeypatch)
    other = replace(PARAMETERS[codebook], bits=4)
    resumed = run(token_ids, tmp_path, other)
    assert walks == []
    assert_identical(resumed, run(token_ids, None, other))


def test_another_codebook_reuses_the_fisher_sum(
    token_ids: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(token_ids, tmp_path)
    with monkeypatch.context() as patch:
        walks = counting_calibration(patch)
        resumed = run(token_ids, tmp_path, PARAMETERS["guided"])
    assert walks == [(0,)]
    assert_identical(resumed, run(token_ids, None, PARAMETERS["guided"]))


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
from tests.unit.pipeline import test_resume
torch.set_num_threads(1)
ids = torch.load(sys.argv[1])
print("started", flush=True)
test_resume.run(ids, sys.argv[2], test_resume.PARAMETERS[sys.argv[3]], int(sys.argv[4]))
"""


@pytest.mark.parametrize(
    ("codebook", "seconds"), [("kmeans", 0.2), ("guided", 0.2), ("guided", 0.6), ("lnq", 0.4)]
)
@pytest.mark.usefixtures("one_thread")
def test_a_real_kill(
    codebook: str, seconds: float, token_ids: torch.Tensor, tmp_path: Path
) -> None:
    torch.save(token_ids, tmp_path / "ids.pt")
    arguments = [sys.executable, "-c", SCRIPT, str(tmp_path / "ids.pt"), str(tmp_path / "work")]
    process = subprocess.Popen(
        [*arguments, codebook, str(PASSES)],
        cwd=Path(__file__).parents[3],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
    process.wait()
    resumed = run(token_ids, tmp_path / "work", PARAMETERS[codebook], PASSES)
    assert_identical(resumed, run(token_ids, None, PARAMETERS[codebook], PASSES))


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
