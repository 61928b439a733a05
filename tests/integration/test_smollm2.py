"""End to end on a real model: SmolLM2-135M-Instruct, quantized, saved, loaded, generating."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.smollm2 import build
from squeezellm_hf import SqueezeLLMConfig, SqueezeLLMLinear
from squeezellm_hf.calibration.datasets import token_stream

PROMPT = "The capital of France is"
CONFIG = {"preset": "fast", "bits": 4, "n_samples": 4, "sequence_length": 256}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("gguf")
    try:
        return build(tmp_path_factory.mktemp("smollm2") / "original")
    except FileNotFoundError as error:
        pytest.skip(str(error))


def quantize(original: Path, work_dir: Path):
    config = SqueezeLLMConfig(**CONFIG, work_dir=str(work_dir))
    return AutoModelForCausalLM.from_pretrained(
        original, dtype=torch.bfloat16, quantization_config=config
    )


@pytest.fixture(scope="module")
def saved(original: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, dict]:
    """The quantized checkpoint, and what the model generated and held before it was saved."""
    path = tmp_path_factory.mktemp("smollm2") / "quantized"
    model = quantize(original, path.parent / "work")
    text = generate(model, AutoTokenizer.from_pretrained(original))
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(original).save_pretrained(path)
    return path, text, model.state_dict()


def generate(model, tokenizer) -> str:
    ids = tokenizer(PROMPT, return_tensors="pt")
    output = model.generate(**ids, max_new_tokens=48, do_sample=False)
    return tokenizer.decode(output[0], skip_special_tokens=True)


def perplexity(model, token_ids: torch.Tensor) -> float:
    with torch.no_grad():
        losses = [
            model(input_ids=window[None], labels=window[None]).loss.double()
            for window in token_ids.unfold(0, 512, 512)
        ]
    return float(torch.stack(losses).mean().exp())


def test_reload_gives_the_same_tensors_and_text(saved: tuple[Path, str, dict]) -> None:
    path, text, tensors = saved
    model = AutoModelForCausalLM.from_pretrained(path)
    assert model.dtype == torch.bfloat16
    assert tensors.keys() == model.state_dict().keys()
    assert all(t.equal(tensors[name]) for name, t in model.state_dict().items())
    assert generate(model, AutoTokenizer.from_pretrained(path)) == text
    assert "Paris" in text


PIPELINE = """
import sys
from transformers import pipeline
generate = pipeline("text-generation", model=sys.argv[1])
print(generate(sys.argv[2], max_new_tokens=48, do_sample=False)[0]["generated_text"], end="")
"""


def test_pipeline_in_a_process_that_does_not_import_us(saved: tuple[Path, str, dict]) -> None:
    path, text, _ = saved
    result = subprocess.run(
        [sys.executable, "-c", PIPELINE, path, PROMPT],
        capture_output=True,
        text=True,
        check=True,
        cwd=path.parent,
        env={**os.environ, "PYTHONPATH": ""},
    )
    assert result.stdout == text


def test_a_second_run_gives_the_same_files(
    original: Path, saved: tuple[Path, str, dict], tmp_path: Path
) -> None:
    path, _, _ = saved
    model = quantize(original, tmp_path / "work")  # nothing to resume from: computed again
    model.save_pretrained(tmp_path / "again")
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (path / name).read_bytes()


def test_quality_and_size(original: Path, saved: tuple[Path, str, dict]) -> None:
    path, _, _ = saved
    plain = AutoModelForCausalLM.from_pretrained(original, dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(path)
    layers = [m for m in model.modules() if isinstance(m, SqueezeLLMLinear)]
    assert len(layers) == 210
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    assert weights == 106_168_320
    bits = 8 * sum(layer.weight_bytes for layer in layers) / weights
    assert bits == pytest.approx(4.57, abs=0.02)  # 4 + 256/in + 32 * 0.45 % + 32/in
    head = plain.get_memory_footprint() - 2 * weights
    assert model.get_memory_footprint() == pytest.approx(head + weights * bits / 8, rel=1e-3)
    ids = token_stream("builtin", AutoTokenizer.from_pretrained(original), max_tokens=2048)[0:2048]
    ratio = perplexity(model, ids) / perplexity(plain, ids)
    assert 1.0 < ratio < 1.25


def test_compiles_as_a_whole(saved: tuple[Path, str, dict]) -> None:
    path, _, _ = saved
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(path)(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        actual = compiled(ids, use_cache=False).logits
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
