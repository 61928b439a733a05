"""Requests and checkpoints that are wrong: a clear error, before any work where possible."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from squeezellm_hf import SqueezeLLMConfig, quantize_model
from tests.conftest import tiny_llama

LAYER = "model.layers.0.mlp.up_proj"


def config(token_ids: Tensor, **changes: object) -> SqueezeLLMConfig:
    return SqueezeLLMConfig(
        **{"dataset": token_ids, "n_samples": 4, "sequence_length": 32, **changes}
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 0}, "bits"),
        ({"bits": 9}, "bits"),
        ({"bits": 3.5}, "bits"),
        ({"bits": "4"}, "bits"),
        ({"bits": True}, "bits"),
        ({"outlier_fraction": -0.1}, "outlier_fraction"),
        ({"outlier_fraction": 1.0}, "outlier_fraction"),
        ({"outlier_fraction": float("nan")}, "outlier_fraction"),
        ({"sensitive_fraction": "much"}, "sensitive_fraction"),
        ({"solver": "fast"}, "solver"),
        ({"codebook": "gptq"}, "codebook"),
        ({"guided_groups": 0}, "guided_groups"),
        ({"lnq_rounds": 1.5}, "lnq_rounds"),
        ({"lnq_sweeps": True}, "lnq_sweeps"),
        ({"n_samples": 0}, "n_samples"),
        ({"sequence_length": 1.5}, "sequence_length"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert"),
        ({"modules_to_not_convert": [3]}, "modules_to_not_convert"),
        ({"overrides": {"mlp": 3}}, "overrides"),
        ({"overrides": {"mlp": {"bits": 12}}}, "overrides"),
        ({"dequantize": 1}, "dequantize"),
        ({"text_column": 5}, "text_column"),
    ],
)
def test_config_values(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SqueezeLLMConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 128}, "unknown field 'group_size'"),
        ({"schema_version": 2}, "schema_version=2 was written by a newer"),
        ({"schema_version": "1"}, "schema_version must be an integer"),
        ({"quant_method": "gptq"}, "quant_method must be 'squeezellm'"),
        ({"bits": "four"}, "bits"),
        ({"versions": 5}, "versions must be an object of strings, got 5"),
        ({"versions": {"torch": 2}}, "versions must be an object of strings"),
        ({"dataset": 5}, "dataset must be a name, a path, .* got 5"),
        ({"dataset": {"a": 1}}, "dataset must be a name"),
        ({"modules": ["a"]}, "modules must be an object"),
        ({"modules": {"a": 3}}, r"modules\['a'\] must be an object"),
        ({"modules": {"a": {"bits": 9}}}, r"modules\['a'\]\.bits must be an integer from 1 to 8"),
        ({"modules": {"a": {"bits": 4, "nnz": -1}}}, r"modules\['a'\]\.nnz must be an integer"),
        ({"modules": {"a": {"bits": 4, "nnz": 1.0}}}, r"modules\['a'\]\.nnz must be an integer"),
        ({"modules": {"a": {"bits": 4, "table_dtype": "int8"}}}, r"modules\['a'\]\.table_dtype"),
        ({"modules": {"a": {"bits": 4, "table_dtype": []}}}, r"modules\['a'\]\.table_dtype"),
        ({"modules": {"a": {"bits": 4, "group": 1}}}, r"modules\['a'\] must be an object"),
    ],
)
def test_config_json(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SqueezeLLMConfig.from_dict({**SqueezeLLMConfig().to_dict(), **changes})


def test_config_survives_json() -> None:
    settings = SqueezeLLMConfig(bits=3, overrides={"mlp": {"bits": 4}}, tokenizer=object())
    settings.modules = {"a": {"bits": 3, "nnz": 7, "table_dtype": "float16"}}
    again = SqueezeLLMConfig.from_dict(json.loads(settings.to_json_string()))
    assert again.to_dict() == settings.to_dict()
    assert again.tokenizer is None


@pytest.mark.parametrize("name", [f"{LAYER}.weight", "model.norm.weight", "lm_head.weight"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite(
    model: LlamaForCausalLM, token_ids: Tensor, name: str, value: float
) -> None:
    with torch.no_grad():
        model.get_parameter(name).view(-1)[5] = value
    with pytest.raises(ValueError, match=f"{name} holds NaN or infinite"):
        quantize_model(model, None, config(token_ids), progress=False)


def test_quantized_twice(model: LlamaForCausalLM, token_ids: Tensor) -> None:
    quantize_model(model, None, config(token_ids), progress=False)
    with pytest.raises(ValueError, match=r"is quantized already \(squeezellm\)"):
        quantize_model(model, None, config(token_ids), progress=False)


def test_nothing_to_quantize(model: LlamaForCausalLM, token_ids: Tensor) -> None:
    with pytest.raises(ValueError, match="nothing to quantize"):
        quantize_model(model, None, config(token_ids, modules_to_not_convert=["layers"]))


def test_token_ids_outside_the_vocabulary(model: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match="128"):
        quantize_model(model, None, config(torch.full((4, 32), 128)))


def test_no_tokenizer(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"needs a tokenizer, and none could be loaded from"):
        AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=SqueezeLLMConfig())


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_degenerate_weights(bits: int, token_ids: Tensor, tmp_path: Path) -> None:
    """All-zero rows, constant rows, rows with few distinct values: quantized without loss."""
    model = tiny_llama()
    with torch.no_grad():
        weight = model.get_parameter(f"{LAYER}.weight")
        weight.zero_()
        weight[1] = 0.25
        weight[2, ::2] = -1.5
    expected = weight.clone()
    quantize_model(model, None, config(token_ids, bits=bits), progress=False)
    assert model.get_submodule(LAYER).dequantize(torch.float32).equal(expected)
    model.save_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory, token_ids: Tensor) -> Path:
    path = tmp_path_factory.mktemp("quantized") / "model"
    quantize_model(tiny_llama(), None, config(token_ids), progress=False).save_pretrained(path)
    return path


def tampered(source: Path, target: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    shutil.copytree(source, target)
    file = target / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({k: t.contiguous() for k, t in tensors.items()}, file, {"format": "pt"})
    return target


def replace(kind: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def apply(tensors: dict[str, Tensor]) -> None:
        tensors[f"{LAYER}.{kind}"] = change(tensors[f"{LAYER}.{kind}"])

    return apply


def at(index: int, value: int) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor[index] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("qweight", lambda t: t[:, :-1], "must be int32"),
        ("qweight", lambda t: t[:-1], "must have shape"),
        ("qweight", lambda t: t.to(torch.int64), "must have the dtype I32, got I64"),
        ("lookup_table", lambda t: t[:, :-1], "must have shape"),
        ("lookup_table", lambda t: t.float(), "must have the dtype F16, got F32"),
        ("lookup_table", lambda t: t.bfloat16(), "must have the dtype F16, got BF16"),
        ("lookup_table", lambda t: t * torch.nan, "holds values that are not finite"),
        ("values", lambda t: t[:-1], "must be a floating-point tensor"),
        ("values", lambda t: t.int(), "must have the dtype F16, got I32"),
        ("col_indices", lambda t: t.int(), "must be torch.int16"),
        ("col_indices", at(0, 64), r"must lie in \[0, in_features=64\)"),
        ("col_indices", at(0, -1), r"must lie in \[0, in_features=64\)"),
        ("crow_indices", at(-1, 2**31 - 1), "must start at 0 and end at nnz"),
        ("crow_indices", at(3, 2**31 - 1), "must never decrease"),
        ("crow_indices", at(3, -7), "must never decrease"),
        ("crow_indices", lambda t: t[:-1], "must be int32"),
    ],
)
def test_tampered_tensors_are_named(
    quantized: Path, tmp_path: Path, kind: str, change: Callable, message: str
) -> None:
    path = tampered(quantized, tmp_path / "model", replace(kind, change))
    with pytest.raises(ValueError, match=rf"{LAYER}\.{kind} {message}"):
        AutoModelForCausalLM.from_pretrained(path)


@pytest.mark.parametrize("kind", ["qweight", "lookup_table", "crow_indices", "values"])
def test_missing_tensors_are_named(quantized: Path, tmp_path: Path, kind: str) -> None:
    path = tampered(quantized, tmp_path / "model", lambda t: t.__delitem__(f"{LAYER}.{kind}"))
    with pytest.raises(ValueError, match=rf"{LAYER}\.{kind} is missing"):
        AutoModelForCausalLM.from_pretrained(path)


def test_indices_beyond_the_row(token_ids: Tensor, tmp_path: Path) -> None:
    model = tiny_llama(hidden_size=72, num_attention_heads=6, num_key_value_heads=2)  # 216 bits
    quantize_model(model, None, config(token_ids, bits=3), progress=False)
    model.save_pretrained(tmp_path / "good")
    path = tampered(tmp_path / "good", tmp_path / "bad", replace("qweight", lambda t: t | 2**30))
    with pytest.raises(ValueError, match=rf"{LAYER}\.qweight holds bits beyond"):
        AutoModelForCausalLM.from_pretrained(path)


def test_a_truncated_file_is_named(quantized: Path, tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(quantized, path)
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or truncated"):
        AutoModelForCausalLM.from_pretrained(path)


def with_config(source: Path, target: Path, change: Callable[[dict], None]) -> Path:
    shutil.copytree(source, target)
    file = target / "config.json"
    settings = json.loads(file.read_text())
    change(settings["quantization_config"])
    file.write_text(json.dumps(settings))
    return target


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q.update(schema_version=99), "schema_version=99"),
        (lambda q: q.update(modules=None), "no modules"),
        (lambda q: q["modules"].update({"model.layers.9.x": {"bits": 4}}), r"'model\.layers\.9"),
        (lambda q: q["modules"].update({"model.norm": {"bits": 4}}), "not a linear layer"),
        (lambda q: q["modules"][LAYER].update(bits=3), rf"{LAYER}\.qweight must be int32"),
        (lambda q: q["modules"][LAYER].update(nnz=1), rf"{LAYER}\.values must be \[nnz=1\]"),
        (lambda q: q["modules"][LAYER].update(nnz=0), rf"{LAYER}\.values is in the checkpoint"),
        (lambda q: q["modules"][LAYER].update(nnz=10**9), r"nnz=1000000000 is more than"),
        (lambda q: q["modules"][LAYER].update(table_dtype="bfloat16"), "must have the dtype BF16"),
    ],
)
def test_a_config_that_does_not_fit(
    quantized: Path, tmp_path: Path, change: Callable, message: str
) -> None:
    path = with_config(quantized, tmp_path / "model", change)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(path)
