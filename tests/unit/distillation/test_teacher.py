"""The original's hidden states on disk."""

from pathlib import Path

import pytest
import torch
from accelerate import disk_offload

from squeezellm_hf.distillation.causal_lm import CausalLM
from squeezellm_hf.distillation.teacher import record_teacher
from tests.conftest import tiny_llama

IDS = torch.randint(0, 128, (10, 12), generator=torch.Generator().manual_seed(0))


def record(path: Path, model=None, batch_size: int = 4):
    model = tiny_llama() if model is None else model
    return record_teacher(CausalLM(model), IDS, path, batch_size=batch_size, progress=False)


def test_are_those_of_the_model(tmp_path: Path) -> None:
    states = record(tmp_path / "states.bin")
    model = tiny_llama()
    rows = torch.tensor([7, 0, 3])
    with torch.no_grad():
        expected = model.model(IDS[rows]).last_hidden_state
    torch.testing.assert_close(states.batch(rows), expected)
    assert (tmp_path / "states.bin").stat().st_size == 10 * 12 * 64 * 4


@pytest.mark.parametrize("left", [0, 1, 4 * 12 * 64 * 4, 4 * 12 * 64 * 4 + 100, 29_000])
def test_goes_on_after_a_kill(tmp_path: Path, left: int) -> None:
    record(tmp_path / "whole.bin")
    whole = (tmp_path / "whole.bin").read_bytes()
    (tmp_path / "states.bin").write_bytes(whole[:left])
    record(tmp_path / "states.bin")
    assert (tmp_path / "states.bin").read_bytes() == whole


def test_finished_states_are_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(tmp_path / "states.bin")
    lm = CausalLM(tiny_llama())
    monkeypatch.setattr(CausalLM, "hidden_states", lambda *_: pytest.fail("run again"))
    record_teacher(lm, IDS, tmp_path / "states.bin", batch_size=4, progress=False)


def test_a_file_of_another_size_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "states.bin").write_bytes(bytes(10 * 12 * 64 * 4 + 8))
    with pytest.raises(ValueError, match=r"states\.bin has 30728 bytes, not 30720"):
        record(tmp_path / "states.bin")


def test_an_offloaded_original(tmp_path: Path) -> None:
    model = tiny_llama()
    disk_offload(model, tmp_path / "weights", execution_device="cpu")
    assert model.model.layers[0].mlp.up_proj.weight.is_meta
    states = record(tmp_path / "offloaded.bin", model)
    rows = torch.arange(10)
    torch.testing.assert_close(states.batch(rows), record(tmp_path / "states.bin").batch(rows))
