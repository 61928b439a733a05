"""Distillation as a user asks for it: while loading, in memory, afterwards, on the command line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from squeezellm_hf import DistillationSettings, SqueezeLLMConfig, distill, quantize_model
from squeezellm_hf.integration.quantizer import SqueezeLLMHfQuantizer
from tests.conftest import VOCABULARY, tiny_llama

TEXT = torch.randint(0, VOCABULARY, (800,), generator=torch.Generator().manual_seed(2))


def config(**changes: Any) -> SqueezeLLMConfig:
    return SqueezeLLMConfig(
        **{
            "bits": 2,
            "dataset": TEXT[:128],
            "n_samples": 4,
            "sequence_length": 32,
            "distill_steps": 12,
            "distill_dataset": TEXT,
            "distill_batch_size": 4,
            "distill_sequence_length": 16,
            **changes,
        }
    )


def load(path: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, **options)


def tensors(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_identical(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert tensor.equal(second[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"distill_norms": True, "distill_values": True}])
def test_quantize_distill_save_load(
    checkpoint: Path, tmp_path: Path, dtype: torch.dtype, changes: dict[str, bool]
) -> None:
    model = load(checkpoint, dtype=dtype, quantization_config=config(**changes))
    plain = load(checkpoint, dtype=dtype, quantization_config=config(distill_steps=0))
    record = model.config.quantization_config.distilled
    assert 0 < record["steps"] <= 12
    assert record["divergence_after"] < record["divergence_before"]
    assert plain.config.quantization_config.distilled is None
    assert not all(t.equal(plain.state_dict()[name]) for name, t in model.state_dict().items())
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert_identical(tensors(model), tensors(again))
    ids = TEXT[:20][None]
    assert again(ids).logits.equal(model(ids).logits)
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert saved["distilled"] == record
    assert saved["distill_steps"] == 12
    assert saved["distill_dataset"].startswith("1 token ids sha256:")
    again.save_pretrained(tmp_path / "twice")
    assert_identical(tensors(load(tmp_path / "twice")), tensors(model))


def test_in_memory_gives_the_same(checkpoint: Path) -> None:
    loaded = load(checkpoint, quantization_config=config())
    model = quantize_model(load(checkpoint), None, config(), progress=False)
    assert_identical(tensors(model), tensors(loaded))


@pytest.mark.parametrize("original", ["model", "path"])
def test_afterwards_gives_the_same(checkpoint: Path, tmp_path: Path, original: str) -> None:
    """A model that was saved undistilled, loaded, distilled: as if done at once."""
    at_once = load(checkpoint, quantization_config=config())
    load(checkpoint, quantization_config=config(distill_steps=0)).save_pretrained(tmp_path)
    model = load(tmp_path)
    settings = DistillationSettings(steps=12, batch_size=4, sequence_length=16)
    result = distill(
        model,
        load(checkpoint) if original == "model" else checkpoint,
        settings,
        dataset=TEXT,
        progress=False,
    )
    assert_identical(tensors(model), tensors(at_once))
    ours, theirs = (m.config.quantization_config for m in (model, at_once))
    assert ours.distilled == theirs.distilled
    assert ours.distillation == theirs.distillation == settings
    assert result.divergence_after == ours.distilled["divergence_after"]
    model.save_pretrained(tmp_path / "distilled")
    assert_identical(tensors(load(tmp_path / "distilled")), tensors(model))


def test_calibration_data_is_the_default(checkpoint: Path) -> None:
    given = load(checkpoint, quantization_config=config(dataset=TEXT, distill_dataset=TEXT))
    default = load(checkpoint, quantization_config=config(dataset=TEXT, distill_dataset=None))
    assert_identical(tensors(given), tensors(default))


def test_hopeless_training_warns_and_changes_nothing(checkpoint: Path) -> None:
    with pytest.warns(UserWarning, match="did not bring the model nearer"):
        model = load(checkpoint, quantization_config=config(distill_lr=1e3))
    plain = load(checkpoint, quantization_config=config(distill_steps=0))
    assert_identical(tensors(model), tensors(plain))
    record = model.config.quantization_config.distilled
    assert record["steps"] == 0
    assert record["divergence_after"] == record["divergence_before"]


SCRIPT = """
import sys, torch
from squeezellm_hf.distillation import checkpoint
from tests.integration.test_distillation import config, load
checkpoint.SECONDS_BETWEEN_WRITES, checkpoint.WRITE_SHARE = 0.0, float("inf")
torch.set_num_threads(1)
load(sys.argv[1], quantization_config=config(distill_steps=400, work_dir=sys.argv[2]))
"""


def test_sigkill_at_any_moment(checkpoint: Path, tmp_path: Path) -> None:
    """Killed while it distills, wherever that is; started again, it ends in the same tensors."""
    root = Path(__file__).resolve().parents[2]
    work_dir = tmp_path / "work"
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{os.environ.get('PYTHONPATH')}"}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(checkpoint), str(work_dir)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
    )
    deadline = time.monotonic() + 120
    while not list(work_dir.glob("distill-*.pt")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        resumed = load(
            checkpoint, quantization_config=config(distill_steps=400, work_dir=str(work_dir))
        )
        whole = load(checkpoint, quantization_config=config(distill_steps=400))
    finally:
        torch.set_num_threads(threads)
    assert_identical(tensors(resumed), tensors(whole))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distill_steps": -1}, "distill_steps must be an integer of at least 0, got -1"),
        ({"distill_steps": 2.5}, "distill_steps must be an integer"),
        ({"distill_lr": -1.0}, "distill_lr must be a positive number or None, got -1.0"),
        ({"distill_batch_size": 0}, "distill_batch_size must be an integer of at least 1"),
        ({"distill_micro_batch_size": 0}, "distill_micro_batch_size must be"),
        ({"distill_sequence_length": 1}, "distill_sequence_length must be"),
        ({"distill_norms": "yes"}, "distill_norms must be true or false, got 'yes'"),
        ({"distill_values": 1}, "distill_values must be true or false, got 1"),
        ({"distill_dataset": 5}, "distill_dataset must be a name"),
        (
            {"dataset": None, "distill_dataset": None},
            "distill_steps needs text: distill_dataset and dataset are both None",
        ),
    ],
)
def test_bad_fields(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_a_record_of_the_wrong_type_is_an_error() -> None:
    for wrong in (5, [1], {"steps": "many"}):
        with pytest.raises(ValueError, match="distilled must be an object of numbers"):
            SqueezeLLMConfig.from_dict({"bits": 4, "distilled": wrong})


def test_too_little_text_is_found_before_anything_is_done(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    never = lambda *_, **__: pytest.fail("the weights were read")  # noqa: E731
    monkeypatch.setattr(SqueezeLLMHfQuantizer, "_process_model_after_weight_loading", never)
    with pytest.raises(ValueError, match="the data for distillation is too short: found 64 tokens"):
        load(checkpoint, quantization_config=config(distill_dataset=TEXT[:64]))


def test_another_original_is_an_error(checkpoint: Path) -> None:
    model = load(checkpoint, quantization_config=config(distill_steps=0))
    other = load(checkpoint)
    torch.nn.init.normal_(other.lm_head.weight)
    with pytest.raises(ValueError, match="original is not what the model was quantized from"):
        distill(model, other, DistillationSettings(sequence_length=16), dataset=TEXT)
    with pytest.raises(ValueError, match="LlamaForCausalLM is not quantized with SqueezeLLM"):
        distill(tiny_llama(), other, dataset=TEXT)
