"""`squeezellm convert`, in this process."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from squeezellm_hf.cli import main
from tests.conftest import tiny_llama
from tests.integration.test_convert import assert_same_model, legacy_checkpoint


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base model with a tokenizer."""
    tiny_llama().save_pretrained(tmp_path / "base")
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_with_a_base_model(
    base: Path, tmp_path: Path, token_ids: torch.Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = tiny_llama()
    checkpoint = legacy_checkpoint(dense, 3, sparse=True)
    checkpoint.others = {}
    path, out = checkpoint.save(tmp_path / "sq-tiny-w3.pt"), tmp_path / "out"
    command = ["convert", str(path), str(out), "--base-model", str(base), "--bits", "3"]
    assert main(command) == 0
    printed = capsys.readouterr()
    assert "of 14 layers" in printed.out
    assert f"7 tensors were read from {base}" in printed.out
    assert "All weights are exactly those of the file" in printed.out
    assert "14/14" in printed.err
    assert_same_model(out, dense, token_ids)
    assert AutoTokenizer.from_pretrained(out).vocab_size == 2
    assert main(["inspect", str(out)]) == 0
    assert "not known: converted from sq-tiny-w3.pt" in capsys.readouterr().out

    assert main(command) == 1
    assert "--overwrite replaces it" in capsys.readouterr().err
    rounded = ["--overwrite", "--table-dtype", "bfloat16", "--dtype", "bfloat16"]
    assert main([*command, *rounded]) == 0
    assert "14 layers are rounded, the largest error of a weight is" in capsys.readouterr().out
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert {p.dtype for p in loaded.parameters() if p.is_floating_point()} == {torch.bfloat16}


def test_a_whole_folder_without_a_tokenizer(
    tmp_path: Path, token_ids: torch.Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = tiny_llama()
    checkpoint = legacy_checkpoint(dense, 4)
    dense.config.save_pretrained(tmp_path / "in")
    checkpoint.save(tmp_path / "in" / "sq-tiny-w4.pt")
    assert main(["convert", str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    assert "No tokenizer was found" in capsys.readouterr().out
    assert_same_model(tmp_path / "out", dense, token_ids)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.pt", "out"], "there is no file or folder 'none.pt'"),
        (["{p}", "out"], "--base-model"),
        (["{p}", "out", "--base-model", "/no/such"], "there is no folder '/no/such'"),
        (["{p}", "out", "--bits", "5"], "bits must be one of (3, 4), got 5"),
        (["{p}", "out", "--bits", "3", "--base-model", "{b}"], "must have 8 columns (3 bits)"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str],
    message: str,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    path = legacy_checkpoint(tiny_llama(), 4).save(tmp_path / "tiny.pt")
    capsys.readouterr()
    assert main(["convert", *(a.format(p=path, b=base) for a in arguments)]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("squeezellm convert: ")
    assert message in last
    assert not (tmp_path / "out").exists()


def test_help_gives_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["convert", "--help"])
    assert exit_.value.code == 0
    printed = capsys.readouterr().out
    assert "squeezellm convert sq-" in printed
    assert "--base-model" in printed
