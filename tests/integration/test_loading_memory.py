"""Loading a quantized checkpoint needs little more memory than its size, and no plain weight."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from squeezellm_hf import SqueezeLLMConfig, SqueezeLLMLinear

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
BLOCKS = 3
LEAST_BYTES = 300_000_000  # so large that what else a process allocates does not show


@pytest.fixture
def loading(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("loading")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_near_the_size(loading: ModuleType, tmp_path: Path) -> None:
    """Blocks of Llama-3-8B in a fresh process; read from mapped files, the indices copied."""
    models = importlib.import_module("random_models")
    made = models.config("8b", BLOCKS)
    made.vocab_size = 512
    loading.write_checkpoint(made, "w4", tmp_path / "blocks", "cpu", shard_size="100MB")
    loading.write_checkpoint(models.config("tiny"), "w4", tmp_path / "tiny", "cpu")
    assert len(loading.files(tmp_path / "blocks")) > 1
    size = loading.checkpoint_bytes(tmp_path / "blocks")
    assert size > LEAST_BYTES
    found = loading.fresh(tmp_path / "blocks", tmp_path / "tiny", "cpu")
    assert found["peak_bytes"] <= 1.2 * size
    assert found["peak_bytes"] >= 0.5 * size  # the measurement sees the weights


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_command(loading: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "loading.json"
    loading.main(f"--model tiny --weights w3+ --repeats 1 --json {file}".split())
    document = json.loads(file.read_text())
    result = document["result"]
    assert document["weights"] == "w3+"
    assert result["checkpoint_bytes"] > 2 * 128 * 64 * 2  # embeddings and head in bf16
    assert min(result["read_seconds"], result["load_seconds"]) > 0


def test_no_plain_weight_is_made(
    checkpoint: Path, token_ids: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every nn.Linear that is replaced lies on meta until it is dropped."""
    config = SqueezeLLMConfig(dataset=token_ids, n_samples=4, sequence_length=32)
    AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=config).save_pretrained(
        tmp_path
    )
    replaced: list[nn.Module] = []
    set_submodule = nn.Module.set_submodule

    def recorded(self: nn.Module, target: str, module: nn.Module, *args: object) -> None:
        replaced.append(self.get_submodule(target))
        set_submodule(self, target, module, *args)

    monkeypatch.setattr(nn.Module, "set_submodule", recorded)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    layers = [module for module in model.modules() if isinstance(module, SqueezeLLMLinear)]
    assert len(replaced) == len(layers) > 0
    assert all(module.weight.is_meta for module in replaced)
    assert not any(parameter.is_meta for parameter in model.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_memory_of_a_gpu(loading: ModuleType, tmp_path: Path) -> None:
    models = importlib.import_module("random_models")
    made = models.config("8b", BLOCKS)
    loading.write_checkpoint(made, "w3+", tmp_path / "blocks", "cuda")
    loading.write_checkpoint(models.config("tiny"), "w3+", tmp_path / "tiny", "cuda")
    found = loading.fresh(tmp_path / "blocks", tmp_path / "tiny", "cuda")
    assert found["gpu_peak_bytes"] <= 1.15 * found["gpu_bytes"]
