"""The command line, in this process, on a tiny model in a folder."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from squeezellm_hf.cli import main
from squeezellm_hf.nn import SqueezeLLMLinear
from tests.tiny_checkpoint import byte_level

TEXT = "\n\n".join(f"The {word} of line {i}." for i in range(40) for word in ("start", "end"))
WINDOWS = ("--sequence-length", "32")
FAST = ("--preset", "fast", "--n-samples", "2", "--sequence-length", "16", "--seed", "3")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "original"
    tokenizer = byte_level()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=40,
        intermediate_size=72,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def quantized(original: Path, text: Path) -> Path:
    out = original.parent / "quantized"
    status = main(["quantize", str(original), str(out), "--dataset", str(text), *FAST])
    assert status == 0
    return out


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def layers(folder: Path, **options: Any) -> dict[str, SqueezeLLMLinear]:
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    return {n: m for n, m in model.named_modules() if isinstance(m, SqueezeLLMLinear)}


def test_quantize_writes_a_checkpoint_with_tokenizer_and_record(quantized: Path) -> None:
    assert len(layers(quantized)) == 14
    assert (quantized / "tokenizer.json").is_file()
    record = json.loads((quantized / "config.json").read_text())["quantization_config"]
    assert (record["bits"], record["n_samples"], record["seed"]) == (4, 2, 3)
    assert record["dataset"].startswith("text.txt sha256:")


def test_quantize_loads_the_class_that_the_config_names(
    original: Path, text: Path, tmp_path: Path
) -> None:
    config = BertConfig(
        vocab_size=AutoTokenizer.from_pretrained(original).vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    model, out = tmp_path / "bert", tmp_path / "out"
    BertForMaskedLM(config).save_pretrained(model)
    AutoTokenizer.from_pretrained(original).save_pretrained(model)
    arguments = ["--dataset", str(text), "--quantize-lm-head", *FAST]
    assert main(["quantize", str(model), str(out), *arguments]) == 0
    again = BertForMaskedLM.from_pretrained(out)
    found = {n for n, m in again.named_modules() if isinstance(m, SqueezeLLMLinear)}
    assert len(found) == 2 * 6 + 1
    assert "cls.predictions.decoder" in found


def test_flags_reach_the_config(original: Path, text: Path, tmp_path: Path) -> None:
    arguments = [
        *("--bits", "3", "--outlier-fraction", "0.02", "--sensitive-fraction", "0"),
        *("--overrides", '{"re:.*down_proj": {"bits": 2}, "q_proj": {"skip": true}}'),
        *("--modules-to-not-convert", "o_proj", "k_proj", "--solver", "exact"),
        *("--dataset", str(text), "--dtype", "bfloat16", *FAST),
    ]
    assert main(["quantize", str(original), str(tmp_path / "out"), *arguments]) == 0
    found = layers(tmp_path / "out")
    assert {name.rpartition(".")[2] for name in found} == {
        *("v_proj", "gate_proj", "up_proj", "down_proj"),
    }
    assert {m.bits for n, m in found.items() if n.endswith("down_proj")} == {2}
    assert {m.bits for n, m in found.items() if not n.endswith("down_proj")} == {3}
    assert tensors(tmp_path / "out")["model.norm.weight"].dtype == torch.bfloat16
    record = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert record["solver"] == "exact"


def test_codebook_flags_reach_the_config(original: Path, text: Path, tmp_path: Path) -> None:
    arguments = [
        *("--codebook", "guided", "--guided-groups", "2", "--lnq-rounds", "1", "--lnq-sweeps", "3"),
        *("--overrides", '{"re:.*down_proj": {"codebook": "lnq"}}'),
        *("--dataset", str(text), *FAST),
    ]
    assert main(["quantize", str(original), str(tmp_path / "out"), *arguments]) == 0
    assert len(layers(tmp_path / "out")) == 14
    record = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (record["codebook"], record["guided_groups"]) == ("guided", 2)
    assert (record["lnq_rounds"], record["lnq_sweeps"]) == (1, 3)


def test_a_codebook_without_its_data_is_an_error(
    original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["quantize", str(original), str(tmp_path / "out"), "--dataset", "none"]
    assert main([*command, "--codebook", "lnq"]) == 1
    assert "codebook='lnq' of model.layers.0" in capsys.readouterr().err


def test_without_calibration_data(original: Path, tmp_path: Path) -> None:
    assert main(["quantize", str(original), str(tmp_path / "out"), "--dataset", "none"]) == 0
    record = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert record["dataset"] is None


def test_resume_ends_in_the_same_checkpoint(
    original: Path, quantized: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from squeezellm_hf.pipeline import quantize as pipeline

    out = tmp_path / "out"
    command = ["quantize", str(original), str(out), "--dataset", str(text), *FAST, "--resume"]
    quantize_weights, calls = pipeline.quantize_weights, []

    def killed(matrices: Any) -> Any:
        calls.append(matrices)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return quantize_weights(matrices)

    monkeypatch.setattr(pipeline, "quantize_weights", killed)
    assert main(command) == 130
    assert not out.exists()
    assert (tmp_path / "out.work").is_dir()
    assert main(command) == 0
    assert len(calls) == 6 + 14 - 5
    assert not (tmp_path / "out.work").exists()
    expected, found = tensors(quantized), tensors(out)
    assert expected.keys() == found.keys()
    assert all(expected[name].equal(found[name]) for name in expected)


def test_push_to_hub_makes_the_repository_before_the_work(
    original: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import HfApi

    def refuse(self: HfApi, name: str, **options: Any) -> None:
        raise OSError(f"no permission to create {name}")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    out = tmp_path / "out"
    command = ["quantize", str(original), str(out), "--dataset", str(text), *FAST]
    assert main([*command, "--push-to-hub", "me/x"]) == 1
    assert not out.exists()


def test_push_to_hub_uploads_model_and_tokenizer(
    original: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import HfApi

    from squeezellm_hf.integration import saving

    pushed: list[tuple[str, str, str]] = []

    def record(self: Any, name: str, *, token: str) -> None:
        pushed.append((type(self).__name__, name, token))

    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **options: None)
    monkeypatch.setattr(saving, "push_to_hub", record)
    monkeypatch.setattr(PreTrainedTokenizerFast, "push_to_hub", record)
    command = ["quantize", str(original), str(tmp_path / "out"), "--dataset", str(text), *FAST]
    assert main([*command, "--push-to-hub", "me/x", "--token", "secret"]) == 0
    assert len({kind for kind, _, _ in pushed}) == 2
    assert [(name, token) for _, name, token in pushed] == [("me/x", "secret")] * 2


def test_inspect_counts_what_is_stored(
    quantized: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "layers.json"
    assert main(["inspect", str(quantized), "--json", str(path)]) == 0
    output = capsys.readouterr().out
    result = json.loads(path.read_text())
    found = layers(quantized)
    assert [row["module"] for row in result["rows"]] == sorted(found)
    for row in result["rows"]:
        module = found[row["module"]]
        assert row["module"] in output
        # in_features is no multiple of 32: it comes from the architecture, not from the words.
        assert row["shape"] == f"{module.out_features} x {module.in_features}"
        assert row["bytes"] == module.weight_bytes
    assert result["totals"]["bytes"] == sum(
        t.numel() * t.element_size() for t in tensors(quantized).values()
    )
    assert "text.txt sha256:" in output


def test_inspect_of_a_plain_checkpoint(original: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(original)]) == 0
    assert "no layer that SqueezeLLM quantized" in capsys.readouterr().out


def test_inspect_does_not_read_the_weights(
    quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", refuse)
    assert main(["inspect", str(quantized)]) == 0


def test_eval_compares_with_the_reference(
    original: Path,
    quantized: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "results.json"
    command = ["eval", str(quantized), "--reference", str(original), "--dataset", str(text)]
    assert main([*command, "--max-tokens", "160", *WINDOWS, "--json", str(path)]) == 0
    capsys.readouterr()
    result = json.loads(path.read_text())
    plain, ours = result["rows"]
    assert plain["model"] == str(original)
    assert ours["ratio"] == pytest.approx(ours["perplexity"] / plain["perplexity"])
    assert ours["kl_mean"] > 0
    assert result["dataset"].startswith("text.txt sha256:")
    assert result["environment"]["versions"]["torch"] == torch.__version__
    assert (
        main(["eval", str(original), "--dataset", str(text), "--max-tokens", "160", *WINDOWS]) == 0
    )
    assert f"{plain['perplexity']:,.3f}" in capsys.readouterr().out


def test_bench_measures_every_model(original: Path, quantized: Path, tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    command = ["bench", str(quantized), "--reference", str(original), "--prompt-tokens", "8"]
    assert main([*command, "--new-tokens", "3", "--repeats", "1", "--json", str(path)]) == 0
    plain, ours = json.loads(path.read_text())["rows"]
    assert ours["memory_bytes"] < plain["memory_bytes"]
    assert ours["file_bytes"] == (quantized / "model.safetensors").stat().st_size
    assert plain["bits_per_weight"] is None
    assert ours["decode_speedup"] == pytest.approx(
        ours["decode_tokens_per_s"] / plain["decode_tokens_per_s"]
    )


def test_env(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] == torch.__version__
    assert found["native_kernels"] or found["native_reason"]
    assert found["native_cuda_kernels"] or found["native_cuda_reason"]
    assert main(["env"]) == 0
    assert torch.__version__ in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("squeezellm ")


@pytest.mark.parametrize("command", ["quantize", "eval", "inspect", "bench", "env"])
def test_help_gives_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    assert f"squeezellm {command} " in capsys.readouterr().out


def test_every_field_of_the_config_is_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    from dataclasses import fields

    from squeezellm_hf import SqueezeLLMConfig

    with pytest.raises(SystemExit):
        main(["quantize", "--help"])
    output = capsys.readouterr().out
    for field in fields(SqueezeLLMConfig):
        if field.init and field.name not in ("dequantize", "backend"):
            assert f"--{field.name.replace('_', '-')} " in output


@pytest.mark.parametrize(
    "arguments", [["nope"], ["quantize"], ["quantize", "a", "b", "--bits", "x"]]
)
def test_malformed_command_lines_exit_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quantize", "{o}", "{t}/x", "--bits", "9"], "bits must be"),
        (["quantize", "{o}", "{t}/x", "--dataset", "no.txt"], "'no.txt': there is no such file"),
        (["quantize", "{o}", "{t}/x", "--overrides", "{{"], "--overrides='{' is not JSON"),
        (["quantize", "{o}", "{t}/x", "--n-samples", "999999"], "too short"),
        (["quantize", "{o}", "{q}"], "--overwrite replaces it"),
        (["quantize", "{o}", "{q}/config.json"], "is a file"),
        (["quantize", "{q}", "{t}/x"], "is quantized already (squeezellm)"),
        (["quantize", "/no/such", "{t}/x"], "there is no folder '/no/such'"),
        (["eval"], "no MODEL"),
        (["eval", "{o}", "--sequence-length", "65"], "more than the context"),
        (["eval", "{o}", "--dataset", "no.txt"], "there is no such file"),
        (["eval", "{o}", "--sequence-length", "8", "--stride", "9"], "stride=9"),
        (["bench"], "no MODEL"),
        (["bench", "{o}", "--new-tokens", "1"], "--new-tokens 1"),
        (["bench", "{o}", "--batch-size", "0"], "--batch-size 0"),
        (["inspect", "{t}"], "model_type"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str],
    message: str,
    original: Path,
    quantized: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    capsys.readouterr()
    status = main([a.format(o=original, q=quantized, t=tmp_path) for a in arguments])
    assert status == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"squeezellm {arguments[0]}: ")
    assert message in last


def test_models_with_different_tokens_are_not_compared(
    original: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    other = tmp_path / "other"
    shutil.copytree(original, other)
    path = other / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["e"] = vocab["e"], vocab["a"]
    path.write_text(json.dumps(tokenizer))
    command = ["eval", str(original), str(other), "--dataset", str(text)]
    assert main([*command, "--max-tokens", "160", *WINDOWS]) == 1
    assert "another tokenizer" in capsys.readouterr().err


def test_distillation(
    original: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        *("quantize", str(original), str(tmp_path / "out"), "--bits", "2"),
        *("--dataset", "none", "--distill-dataset", str(text), "--distill-steps", "3"),
        *("--distill-batch-size", "2", "--distill-sequence-length", "16", "--distill-norms"),
    ]
    assert main(command) == 0
    assert "Distilled: KL to the original on held-out text" in capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert record["distill_steps"] == 3
    assert record["distill_norms"] is True
    assert record["distill_dataset"].startswith("text.txt sha256:")
    assert record["distilled"]["divergence_after"] <= record["distilled"]["divergence_before"]
    assert len(layers(tmp_path / "out")) == 14


def test_a_bit_budget_is_shown_and_recorded(
    original: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["quantize", str(original), str(out), "--dataset", str(text), *FAST]
    assert main([*command, "--average-bits", "6.5"]) == 0
    shown = capsys.readouterr().out
    assert "Bits, by kind of layer" in shown
    assert "down_proj" in shown
    assert "nats a token" in shown
    record = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (record["preset"], record["average_bits"]) == ("fast", 6.5)
    assert 6.0 < record["budget"]["bits_per_weight"] <= 6.5
    assert {r["bits"] for r in record["modules"].values()} <= {2, 3, 4}


def test_help_and_errors_of_presets_and_budgets(
    original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["quantize", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for flag in ("--preset", "--average-bits", "--target-kl", "--distill-norms"):
        assert flag in shown
    command = ["quantize", str(original), str(tmp_path / "out")]
    assert main([*command, "--preset", "fastest"]) == 1
    assert "preset must be one of fast, balanced, best" in capsys.readouterr().err
    assert main([*command, "--average-bits", "3", "--target-kl", "0.1"]) == 1
    assert "exclude each other" in capsys.readouterr().err
