"""Files that are not what they should be: a ValueError that tells where, and nothing written."""

import json
import os
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from squeezellm_hf.integration.convert import convert_checkpoint
from tests.conftest import tiny_llama
from tests.integration.test_convert import legacy_checkpoint

Q = "model.layers.1.self_attn.q_proj"
UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def state() -> dict[str, Any]:
    return legacy_checkpoint(tiny_llama(), 3, sparse=True, full_rows=1).state_dict()


def folder(path: Path, state: Any) -> Path:
    path.mkdir()
    tiny_llama().config.save_pretrained(path)
    torch.save(state, path / "tiny.pt")
    return path


def assert_refused(source: Path, message: str, **options: Any) -> None:
    out = source.parent / "out"
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(source, out, **options)
    assert not out.exists()
    assert not list(source.parent.glob(".*"))


Change = Callable[[dict[str, Any]], Any]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop(f"{Q}.qweight"), rf"{Q}\.qweight is missing beside {Q}\.lookup_table"),
        (lambda s: s.pop(f"{UP}.cols"), rf"{UP}\.cols is missing beside {UP}\.rows"),
        (
            lambda s: s.update(
                {f"{Q}.qweight": s[f"{UP}.qweight"], f"{Q}.lookup_table": s[f"{UP}.lookup_table"]}
            ),
            rf"{Q}\.rows must be int32 \[161\], got int32 \[65\]",
        ),
        (
            lambda s: (
                [
                    s.update({f"{Q}.{kind}": s[f"{UP}.{kind}"]})
                    for kind in (
                        "qweight",
                        "lookup_table",
                        "rows",
                        "cols",
                        "vals",
                        "full_rows",
                        "full_row_indices",
                    )
                ]
                + [s.update({f"sparse_threshold.{Q}": s[f"sparse_threshold.{UP}"]})]
            ),
            rf"{Q}\.qweight stands for .*=\[160, 64\] at 3 bits; config\.json says \[64, 64\]",
        ),
        (lambda s: s.update({f"{Q}.bias": torch.zeros(64)}), rf"{Q}\.bias: the file has one"),
        (
            lambda s: s.update({f"sparse_threshold.{Q}": 7}),
            rf"sparse_threshold\.{Q}=7 must be the size of {Q}\.vals, got \[\d+\]",
        ),
        (
            lambda s: s.update({f"sparse_threshold.{Q}": 0.5}),
            rf"sparse_threshold\.{Q} must be an integer",
        ),
        (
            lambda s: s.update({"sparse_threshold.x": 0}),
            r"sparse_threshold\.x names a layer without",
        ),
        (lambda s: s.update({"extra": torch.zeros(1)}), r"extra in tiny\.pt is unexpected: Llama"),
        (lambda s: s.update({"note": "text"}), r"note must be a dense tensor, got str"),
        (
            lambda s: s.update({"model.norm.weight": torch.ones(64).to_sparse()}),
            r"model\.norm\.weight must be a dense tensor, got a tensor of layout torch\.sparse_coo",
        ),
        (
            lambda s: s.update({"model.norm.weight": torch.ones(65)}),
            r"model\.norm\.weight in tiny\.pt must be floating-point \[64\] as .* got float32 \[65",
        ),
        (
            lambda s: s.update({"model.norm.weight": torch.ones(64, dtype=torch.int32)}),
            r"model\.norm\.weight in tiny\.pt must be floating-point \[64\] .* got int32",
        ),
        (lambda s: s.pop("model.norm.weight"), r"model\.norm\.weight is missing .*name the base"),
        (
            lambda s: s.update({"other.0.qweight": s.pop(f"{Q}.qweight")}),
            r"other\.0\.qweight is in tiny\.pt, but other\.0 in LlamaForCausalLM is nothing",
        ),
        (
            lambda s: s.update({"model.norm.qweight": torch.zeros(1)}),
            r"model\.norm in LlamaForCausalLM is LlamaRMSNorm, not a linear layer",
        ),
    ],
)
def test_a_state_dict_that_does_not_fit(
    change: Change, message: str, state: dict[str, Any], tmp_path: Path
) -> None:
    state = dict(state)
    change(state)
    assert_refused(folder(tmp_path / "in", state), message)


def test_a_linear_layer_that_is_not_in_the_file(state: dict[str, Any], tmp_path: Path) -> None:
    """It is not quietly taken from the base model: a gap in the blocks is a damaged file."""
    tiny_llama().save_pretrained(tmp_path / "base")
    state = {key: value for key, value in state.items() if UP not in key}
    source = folder(tmp_path / "in", state)
    assert_refused(source, rf"{UP}\.weight is missing", base_model=str(tmp_path / "base"))


def test_a_file_without_quantized_layers(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", tiny_llama().state_dict())
    assert_refused(source, r"tiny\.pt holds no quantized layer")


def test_tied_tensors_that_differ(tmp_path: Path) -> None:
    state = legacy_checkpoint(tiny_llama(), 3).state_dict()
    source = folder(tmp_path / "in", state)
    tiny_llama(tie_word_embeddings=True).config.save_pretrained(source)
    assert_refused(source, r"lm_head\.weight must be equal to model\.embed_tokens\.weight")


class Malicious:
    def __reduce__(self) -> Any:
        return os.mkdir, ("malicious",)


@pytest.mark.parametrize("as_zip", [True, False])
def test_code_is_refused_and_not_run(
    as_zip: bool, state: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = folder(tmp_path / "in", {})
    torch.save(
        state | {"model.norm.weight": Malicious()},
        source / "tiny.pt",
        _use_new_zipfile_serialization=as_zip,
    )
    assert_refused(source, r"tiny\.pt is refused: .* would run code \(.*mkdir\); only tensors")
    assert not (tmp_path / "malicious").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"tiny\.pt is damaged"),
        (b"not a checkpoint at all", r"tiny\.pt is (damaged|refused)"),
        (pickle.dumps({"a": 1}, protocol=2), r"tiny\.pt is (damaged|refused)"),
    ],
)
def test_no_checkpoint(content: bytes, message: str, tmp_path: Path) -> None:
    source = folder(tmp_path / "in", {})
    (source / "tiny.pt").write_bytes(content)
    assert_refused(source, message)


def test_a_truncated_file(state: dict[str, Any], tmp_path: Path) -> None:
    source = folder(tmp_path / "in", state)
    whole = (source / "tiny.pt").read_bytes()
    (source / "tiny.pt").write_bytes(whole[: len(whole) // 2])
    assert_refused(source, r"tiny\.pt is (damaged|refused)")


@pytest.mark.parametrize("value", [[torch.zeros(1)], OrderedDict({1: torch.zeros(1)})])
def test_no_state_dict(value: Any, tmp_path: Path) -> None:
    assert_refused(folder(tmp_path / "in", value), r"tiny\.pt must hold a state dict")


@pytest.mark.parametrize(
    ("content", "bits", "message"),
    [
        ("{", None, r"quant_config\.json must hold"),
        ("[]", None, r"quant_config\.json must hold"),
        ('{"bits": 3}', None, r"quant_config\.json must hold"),
        ('{"wbits": 5}', None, r"wbits in .* must be one of \(3, 4\), got 5"),
        ('{"wbits": 3}', 4, r"bits=4 contradicts .* which says wbits=3"),
        ('{"wbits": 3}', 2, r"bits must be one of \(3, 4\), got 2"),
        ('{"wbits": 4}', None, r"lookup_table must have 16 columns \(4 bits\), got \[\d+, 8\]"),
    ],
)
def test_bits_that_contradict(
    content: str, bits: int | None, message: str, state: dict[str, Any], tmp_path: Path
) -> None:
    source = folder(tmp_path / "in", state)
    (source / "quant_config.json").write_text(content)
    assert_refused(source, message, bits=bits)


def test_paths(state: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file or folder"):
        convert_checkpoint(tmp_path / "none.pt", tmp_path / "out")
    source = folder(tmp_path / "in", state)
    (tmp_path / "taken").write_text("")
    with pytest.raises(ValueError, match="is a file; a folder is needed"):
        convert_checkpoint(source, tmp_path / "taken")
    (source / "second.pt").write_bytes(b"")
    assert_refused(source, r"must hold one \.pt file, got second\.pt, tiny\.pt")
    (source / "config.json").unlink()
    assert_refused(source / "tiny.pt", "there is no config.json in .*base model must be named")


def test_a_base_model_that_is_quantized(state: dict[str, Any], tmp_path: Path) -> None:
    source = folder(tmp_path / "in", state)
    convert_checkpoint(source, tmp_path / "base")
    (source / "config.json").unlink()
    assert_refused(source, "is quantized itself", base_model=str(tmp_path / "base"))


def test_an_error_leaves_the_previous_output(state: dict[str, Any], tmp_path: Path) -> None:
    source = folder(tmp_path / "in", state)
    convert_checkpoint(source, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    damaged = dict(state) | {f"{Q}.vals": state[f"{Q}.vals"] * torch.nan}
    torch.save(damaged, source / "tiny.pt")
    with pytest.raises(ValueError, match=rf"{Q}\.vals holds values that are not finite"):
        convert_checkpoint(source, tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert json.loads(before["config.json"])["quantization_config"]["converted_from"] == "tiny.pt"
