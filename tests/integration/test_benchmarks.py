"""The benchmark scripts run, and the models they build are what they say."""

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM

from squeezellm_hf import SqueezeLLMConfig, SqueezeLLMLinear

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module(request.param)


@pytest.mark.parametrize("script", ["random_models"], indirect=True)
@pytest.mark.parametrize(
    ("name", "parameters"),
    [("8b", 8_030_261_248), ("32b", 32_763_876_352), ("70b", 70_553_706_496)],
)
def test_shapes_are_those_of_the_real_models(
    script: ModuleType, name: str, parameters: int
) -> None:
    """As their model cards count them."""
    model = script.skeleton(script.config(name))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("script", ["random_models"], indirect=True)
def test_a_quantized_model_is_like_its_dequantized_self(script: ModuleType) -> None:
    torch.manual_seed(0)
    model = script.quantized_model(script.config("tiny"), bits=3, sparse=True, device="cpu")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, SqueezeLLMLinear)}
    assert len(layers) == 14
    assert any(layer.nnz for layer in layers.values())
    ids = torch.arange(10)[None]
    with torch.no_grad():
        logits = model(ids).logits
        for name, layer in layers.items():
            model.set_submodule(name, layer.to_linear(torch.bfloat16))
        plain = model(ids).logits
    assert logits.isfinite().all()
    assert logits.std() > 0
    assert (logits - plain).norm() < 0.05 * plain.norm()


@pytest.mark.parametrize("script", ["models"], indirect=True)
def test_models(script: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "models.json"
    script.main(
        f"--models tiny --layers 1 --weights bf16 w4+ --ways eager --device cpu --prompt 4 "
        f"--eager-tokens 2 --repeats 1 --together 2 --json {file}".split()
    )
    document = json.loads(file.read_text())
    plain, quantized = document["results"]
    assert document["hardware"]["torch"] == torch.__version__
    assert (plain["weights"], quantized["weights"]) == ("bf16", "w4+")
    assert plain["linear_bytes"] == 2 * (64 * 64 * 2 + 64 * 32 * 2 + 64 * 160 * 3)
    assert plain["other_bytes"] == quantized["other_bytes"]
    assert quantized["linear_bytes"] < 0.6 * plain["linear_bytes"]
    assert quantized["eager"]["prefill"] > 0
    assert quantized["eager_decode_over_bf16"] is not None


@pytest.mark.parametrize("script", ["overhead"], indirect=True)
def test_overhead(script: ModuleType, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    file = tmp_path / "overhead.json"
    try:
        script.main(f"--turns 1 --modes no_grad --json {file}".split())
    finally:
        torch.set_num_threads(threads)
    us = json.loads(file.read_text())["us"]["no_grad"]
    assert set(us) > {"F.linear", "SqueezeLLMLinear"}
    assert all(value > 0 for value in us.values())


@pytest.mark.parametrize("script", ["devices"], indirect=True)
def test_devices(
    script: ModuleType, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against itself everything agrees; against another text and another perplexity it does not."""

    class Tokenizer:
        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [ord(letter) % 128 for letter in text]}

        def decode(self, ids: list[int]) -> str:
            return str(ids)

    monkeypatch.setattr(script.AutoTokenizer, "from_pretrained", lambda _: Tokenizer())
    monkeypatch.setattr(script, "WINDOW", 32)
    monkeypatch.setattr(script, "NEW_TOKENS", 4)
    monkeypatch.setattr(script, "CHUNKS", {32: 2, 8: 2, 1: 1})
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, quantization_config=SqueezeLLMConfig(bits=3, dataset=None)
    )
    model.save_pretrained(tmp_path / "quantized")
    expected, results = tmp_path / "expected.json", tmp_path / "results.json"
    script.main(["record", str(tmp_path / "quantized"), str(expected)])

    compare = ["compare", str(tmp_path / "quantized"), str(expected), "--dtypes", "fp32"]
    script.main([*compare, "--json", str(results)])
    document = json.loads(results.read_text())
    assert document["same_text"] == [True] * len(script.PROMPTS)
    assert [row["tokens"] for row in document["perplexities"]] == [32, 8, 1]
    assert all(abs(row["difference"]) < 1e-4 for row in document["perplexities"])

    recorded = json.loads(expected.read_text())
    for changed in (
        {"nlls": [nll + 0.01 for nll in recorded["nlls"]]},
        {"continuations": [[*ids[:-1], ids[-1] ^ 1] for ids in recorded["continuations"]]},
    ):
        expected.write_text(json.dumps({**recorded, **changed}))
        with pytest.raises(SystemExit):
            script.main(compare)


@pytest.mark.parametrize("script", ["blockwise"], indirect=True)
def test_blockwise(script: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "blockwise.json"
    script.main(
        f"--model tiny --device cpu --n-samples 2 --sequence-length 16 --json {file}".split()
    )
    results = json.loads(file.read_text())["results"]
    assert [result["codebook"] for result in results] == ["kmeans", "guided"]
    assert all(result["tokens"] == 32 and result["seconds"] > 0 for result in results)


@pytest.mark.parametrize("script", ["experts"], indirect=True)
def test_experts(script: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "experts.json"
    script.main(f"--shape 16 64 32 --tokens 1 9 --turns 1 --json {file}".split())
    rows = json.loads(file.read_text())["rows"]
    assert [row["tokens"] for row in rows] == [1, 9]
    assert all({"bf16, eager", "3 bits", "4 bits"} <= row["milliseconds"].keys() for row in rows)


@pytest.mark.parametrize(
    "script", sorted(path.stem for path in BENCHMARKS.glob("*.py")), indirect=True
)
def test_every_script_can_be_imported(script: ModuleType) -> None:
    assert script.__doc__
