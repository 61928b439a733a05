"""--revision, --token and --trust-remote-code reach everything that is loaded."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import AutoModelForCausalLM

from squeezellm_hf import SqueezeLLMLinear
from squeezellm_hf.cli import main
from tests.tiny_checkpoint import write

FROM_HUB = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
OPTIONS = ("--revision", "v2", "--token", "secret", "--trust-remote-code")
SHORT = ("--sequence-length", "16", "--max-tokens", "64")

MODELING = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own-tiny"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("hub") / "original")


@pytest.fixture(scope="module")
def quantized(original: Path) -> Path:
    out = original.parent / "quantized"
    assert main(["quantize", str(original), str(out), "--dataset", "none"]) == 0
    return out


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[dict[str, Any]]]:
    """What each class of transformers was asked for from the outside, by class."""
    calls: dict[str, list[dict[str, Any]]] = {name: [] for name in FROM_HUB}
    for name in FROM_HUB:
        auto = getattr(transformers, name)
        load = auto.from_pretrained

        def spy(repository: str, *args: Any, name: str = name, load: Any = load, **options: Any):
            if "revision" in options and "_from_auto" not in options:
                calls[name].append(dict(options))
            return load(repository, *args, **options)

        monkeypatch.setattr(auto, "from_pretrained", spy)
    return calls


@pytest.mark.parametrize("command", ["quantize", "eval", "bench", "inspect"])
def test_options_reach_every_load(
    command: str, original: Path, quantized: Path, tmp_path: Path, loads: dict
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Some text to predict. " * 20)
    arguments = {
        "quantize": [str(original), str(tmp_path / "out"), "--dataset", "none"],
        "eval": [str(quantized), "--reference", str(original), "--dataset", str(text), *SHORT],
        "bench": [str(quantized), "--prompt-tokens", "4", "--new-tokens", "2", "--repeats", "1"],
        "inspect": [str(quantized)],
    }[command]
    assert main([command, *arguments, *OPTIONS]) == 0
    expected = {
        "quantize": set(FROM_HUB),
        "eval": set(FROM_HUB),
        "bench": {"AutoModelForCausalLM"},
        "inspect": {"AutoConfig"},
    }[command]
    assert expected <= {name for name, found in loads.items() if found}
    for options in (options for found in loads.values() for options in found):
        assert options["revision"] == "v2"
        assert options["token"] == "secret"
        assert options["trust_remote_code"] is True


@pytest.fixture(scope="module")
def own_code(original: Path) -> Path:
    """The tiny Llama as a model that brings its own Python code."""
    folder = original.parent / "own"
    shutil.copytree(original, folder)
    (folder / "modeling_own.py").write_text(MODELING)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["model_type"] = "own-tiny"
    config["auto_map"] = {
        "AutoConfig": "modeling_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnModel",
    }
    path.write_text(json.dumps(config))
    return folder


def test_a_model_with_its_own_code(own_code: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["quantize", str(own_code), str(out), "--dataset", "none", "--trust-remote-code"]
    assert main(command) == 0
    assert (out / "modeling_own.py").is_file()
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert type(model).__name__ == "OwnModel"
    assert sum(isinstance(m, SqueezeLLMLinear) for m in model.modules()) == 14
    assert main(["inspect", str(out), "--trust-remote-code"]) == 0


@pytest.mark.parametrize("command", ["quantize", "eval", "inspect"])
def test_code_that_is_not_trusted_does_not_run(
    command: str, own_code: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(tmp_path / "out"), "--dataset", "none"] if command == "quantize" else []
    assert main([command, str(own_code), *arguments]) == 1
    assert "trust_remote_code=True" in capsys.readouterr().err
