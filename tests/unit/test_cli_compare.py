"""`squeezellm compare` on a tiny model in a folder."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from squeezellm_hf.cli import main
from tests.tiny_checkpoint import byte_level

SHORT = ("--n-samples", "3", "--n-windows", "2", "--sequence-length", "16")
FORMATS = ("json", "markdown", "plot")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = byte_level()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_table_json_markdown_and_plot(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    files = [tmp_path / name for name in ("out.json", "out.md", "out.svg")]
    cases = ("squeezellm:bits=3", "rtn:bits=4,group_size=16", "gptq:bits=2,group_size=16")
    outputs = [f"--{flag}={file}" for flag, file in zip(FORMATS, files, strict=True)]
    work = f"--work-dir={tmp_path / 'work'}"
    status = main(["compare", str(folder), *SHORT, work, *outputs, "--cases", *cases])
    assert status == 0
    content = json.loads(files[0].read_text())
    assert (content["model"], content["dataset"], content["n_samples"]) == ("tiny", "builtin", 3)
    rows = content["rows"]
    assert [row["case"] for row in rows] == [
        "original",
        "gptq:bits=2,group_size=16",
        "rtn:bits=4,group_size=16",
        "squeezellm:bits=3",
    ]
    # 3-bit tables of 8 entries for rows of 32 weights take more than the weights' indices do.
    assert rows[3]["bits_per_weight"] > rows[2]["bits_per_weight"] == 4 + 20 / 16
    assert len(files[1].read_text().splitlines()) == 6
    assert files[2].stat().st_size > 1000
    assert "gptq:bits=2,group_size=16" in capsys.readouterr().out


def test_what_is_missing_is_left_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["compare", str(folder), *SHORT, "--cases", "rtn", "nf4"]) == 0
    out = capsys.readouterr().out
    assert "nf4 is left out: bitsandbytes is not installed" in out
    assert main(["compare", str(folder), *SHORT, "--cases", "nf4"]) == 1
    assert "none of the cases can be run" in capsys.readouterr().err


def test_wrong_arguments(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert main(["compare", str(folder), "--cases", "awq:bits=4"]) == 1
    assert "'awq' is no method" in capsys.readouterr().err
    assert main(["compare", str(folder), "--cases", "rtn", "--plot", "x.doc"]) == 1
    assert "must end in one of" in capsys.readouterr().err
