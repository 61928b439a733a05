"""Saving: nothing is lost when it fails, and the card says what the model is."""

import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers.modeling_utils
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from squeezellm_hf import SqueezeLLMConfig, quantize_model
from tests.conftest import tiny_llama


@pytest.fixture(scope="module")
def quantized(token_ids: Tensor) -> LlamaForCausalLM:
    settings = SqueezeLLMConfig(bits=3, dataset=token_ids, n_samples=4, sequence_length=32)
    return quantize_model(tiny_llama(), None, settings, progress=False)


def contents(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in path.iterdir()}


def test_a_full_disk_leaves_the_previous_output(
    quantized: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model"
    quantized.save_pretrained(target, max_shard_size="40KB")
    before = contents(target)
    shards = 0
    original = transformers.modeling_utils.safe_save_file

    def full(tensors: dict, path: str, *args: object, **kwargs: object) -> None:
        nonlocal shards
        shards += 1
        original(tensors, path, *args, **kwargs)
        if shards == 2:
            Path(path).write_bytes(Path(path).read_bytes()[:100])
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", full)
    with pytest.raises(OSError, match="No space left"):
        quantized.save_pretrained(target, max_shard_size="40KB")
    assert shards == 2
    assert contents(target) == before
    assert list(tmp_path.iterdir()) == [target]


KILLED_WHILE_SAVING = """
import os, sys
import transformers.modeling_utils
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
original = transformers.modeling_utils.safe_save_file
def die(*args, **kwargs):
    original(*args, **kwargs)
    os.kill(os.getpid(), 9)
transformers.modeling_utils.safe_save_file = die
model.save_pretrained(sys.argv[1])
"""


def test_a_kill_leaves_the_previous_output(quantized: LlamaForCausalLM, tmp_path: Path) -> None:
    target = tmp_path / "model"
    quantized.save_pretrained(target, max_shard_size="40KB")
    before = contents(target)
    died = subprocess.run([sys.executable, "-c", KILLED_WHILE_SAVING, target], capture_output=True)
    assert died.returncode == -9, died.stderr.decode()
    assert contents(target) == before


def test_a_save_over_another_leaves_no_old_shards(
    quantized: LlamaForCausalLM, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    quantized.save_pretrained(tmp_path, max_shard_size="40KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    quantized.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "notes.txt",
    }  # fmt: skip
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(t.equal(again.state_dict()[name]) for name, t in quantized.state_dict().items())


def test_a_file_in_the_place_of_the_directory(quantized: LlamaForCausalLM, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(ValueError, match="is a file; a directory is needed"):
        quantized.save_pretrained(path)


def test_the_card(quantized: LlamaForCausalLM, tmp_path: Path) -> None:
    quantized.save_pretrained(tmp_path / "tiny-3bit")
    card = huggingface_hub.ModelCard.load(tmp_path / "tiny-3bit" / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert "squeezellm" in card.data.tags
    layers = [m for m in quantized.modules() if type(m).__name__ == "SqueezeLLMLinear"]
    stored = sum(
        getattr(layer, name).nbytes
        for layer in layers
        for name in ("qweight", "lookup_table", "crow_indices", "col_indices", "values")
    )
    bits = 8 * stored / sum(layer.in_features * layer.out_features for layer in layers)
    assert f"| Bits per quantized weight | {bits:.2f} " in card.text
    assert "4 sequences of 32 tokens, seed 0" in card.text
    assert 'model="tiny-3bit"' in card.text


def test_a_card_that_somebody_wrote_is_kept(quantized: LlamaForCausalLM, tmp_path: Path) -> None:
    quantized.save_pretrained(tmp_path)
    stale = (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text(stale + "old")
    quantized.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == stale
    (tmp_path / "README.md").write_text("# Mine")
    quantized.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# Mine"


def test_a_copy_of_the_model_saves_itself(quantized: LlamaForCausalLM, tmp_path: Path) -> None:
    import copy

    twin = copy.deepcopy(quantized)
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    twin.save_pretrained(tmp_path)
    assert not AutoModelForCausalLM.from_pretrained(tmp_path).lm_head.weight.any()
