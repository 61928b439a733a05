"""Presets stand behind what is not given, and a checkpoint holds what was done."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from squeezellm_hf import SqueezeLLMConfig, quantize_model
from squeezellm_hf.integration.presets import PRESETS
from squeezellm_hf.nn import SqueezeLLMLinear

FIELDS = ("codebook", "distill_steps", "distill_norms", "distill_values")


def values(config: SqueezeLLMConfig) -> tuple[object, ...]:
    return tuple(getattr(config, name) for name in FIELDS)


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("fast", ("kmeans", 0, False, False)),
        ("balanced", ("guided", 0, False, False)),
        ("best", ("guided", 300, True, True)),
        (None, ("guided", 0, False, False)),
    ],
)
def test_what_they_set(preset: str | None, expected: tuple[object, ...]) -> None:
    assert values(SqueezeLLMConfig(preset=preset)) == expected
    assert {frozenset(fields) for fields in PRESETS.values()} == {frozenset(FIELDS)}


@pytest.mark.parametrize("preset", [None, *PRESETS])
@pytest.mark.parametrize(
    "given",
    [
        {"codebook": "lnq"},
        {"codebook": "kmeans"},
        {"distill_steps": 0},
        {"distill_steps": 7, "distill_norms": True},
        {"distill_values": False},
    ],
)
def test_what_is_given_wins(preset: str | None, given: dict) -> None:
    config = SqueezeLLMConfig(preset=preset, **given)
    plain = SqueezeLLMConfig(preset=preset)
    expected = {name: getattr(plain, name) for name in FIELDS} | given
    assert {name: getattr(config, name) for name in FIELDS} == expected
    assert config.bits == plain.bits == 4


@pytest.mark.parametrize("preset", ["Fast", "", 3, ["fast"], True])
def test_unknown_names(preset: object) -> None:
    with pytest.raises(ValueError, match=r"preset must be one of fast, balanced, best or None"):
        SqueezeLLMConfig(preset=preset)


def test_without_calibration_data() -> None:
    assert values(SqueezeLLMConfig(dataset=None)) == values(SqueezeLLMConfig(preset="fast"))
    for preset in ("balanced", "best"):
        with pytest.raises(ValueError, match=rf"preset='{preset}' needs calibration data"):
            SqueezeLLMConfig(preset=preset, dataset=None)
    kmeans = {"codebook": "kmeans", "dataset": None, "distill_dataset": ["text"]}
    assert SqueezeLLMConfig(preset="best", **kmeans).distill_steps == 300
    with pytest.raises(ValueError, match="distill_steps needs text"):
        SqueezeLLMConfig(preset="best", codebook="kmeans", dataset=None)


@pytest.mark.parametrize("preset", [None, *PRESETS])
def test_reading_applies_nothing_again(preset: str | None) -> None:
    config = SqueezeLLMConfig(preset=preset, distill_steps=5, codebook="lnq", distill_norms=False)
    record = json.loads(json.dumps(config.to_dict()))
    assert record["preset"] == preset
    again = SqueezeLLMConfig.from_dict(record)
    assert again.to_dict() == config.to_dict()
    assert values(replace(config, bits=3)) == values(config)


def test_a_request_in_json_is_a_request() -> None:
    config = SqueezeLLMConfig.from_dict({"quant_method": "squeezellm", "preset": "best", "bits": 3})
    assert values(config) == values(SqueezeLLMConfig(preset="best"))
    overridden = SqueezeLLMConfig.from_dict({"preset": "best"}, distill_steps=0)
    assert (overridden.codebook, overridden.distill_steps) == ("guided", 0)


def test_a_checkpoint_from_before_presets_was_made_by_kmeans() -> None:
    record = SqueezeLLMConfig(preset="fast").to_dict()
    record["modules"] = {"a": {"bits": 3, "nnz": 7, "table_dtype": "float16"}}
    for name in ("preset", "average_bits", "target_kl", "budget", *FIELDS):
        del record[name]
    assert values(SqueezeLLMConfig.from_dict(record)) == ("kmeans", 0, False, False)


def test_budget_fields() -> None:
    config = SqueezeLLMConfig(average_bits=3.3)
    assert SqueezeLLMConfig.from_dict(config.to_dict()).average_bits == 3.3
    for changes, message in (
        ({"average_bits": "3"}, "average_bits must be a number above 0"),
        ({"target_kl": -1}, "target_kl must be a number above 0"),
        ({"average_bits": 3, "target_kl": 0.1}, "exclude each other"),
        ({"average_bits": 3, "dataset": None}, "average_bits needs calibration data"),
        ({"target_kl": 0.1, "dataset": None}, "target_kl needs calibration data"),
    ):
        with pytest.raises(ValueError, match=message):
            SqueezeLLMConfig(**changes)
    with pytest.raises(ValueError, match="budget must be an object of numbers"):
        SqueezeLLMConfig.from_dict({**config.to_dict(), "budget": {"gap": "none"}})


@pytest.mark.parametrize("codebook", ["kmeans", "guided"])
def test_a_budget_is_kept_recorded_and_reloaded(
    codebook: str, checkpoint: Path, token_ids: Tensor, tmp_path: Path
) -> None:
    config = SqueezeLLMConfig(
        codebook=codebook,
        average_bits=5.0,
        dataset=token_ids,
        n_samples=4,
        sequence_length=32,
        overrides={"k_proj": {"bits": 3}},
        modules_to_not_convert=["layers.0.mlp"],
    )
    model = AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=config)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, SqueezeLLMLinear)}
    weights = sum(m.in_features * m.out_features for m in layers.values())
    assert 4.7 < 8 * sum(m.weight_bytes for m in layers.values()) / weights <= 5.0
    assert {m.bits for n, m in layers.items() if n.endswith("k_proj")} == {3}
    assert not any("layers.0.mlp" in name for name in layers)
    model.save_pretrained(tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert record["average_bits"] == 5.0
    assert record["budget"]["bits_per_weight"] <= 5.0
    assert record["budget"]["measured_kl"] > 0
    assert record["budget"]["gap"] == 0
    assert {n: r["bits"] for n, r in record["modules"].items()} == {
        name: layer.bits for name, layer in layers.items()
    }
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.quantization_config.budget == record["budget"]
    ours, theirs = model.state_dict(), again.state_dict()
    assert all(ours[name].equal(theirs[name]) for name in ours)


@pytest.mark.parametrize("stage", ["divergence", "errors", "layer"])
@pytest.mark.parametrize("codebook", ["kmeans", "guided"])
def test_a_budget_resumes_in_every_stage(
    codebook: str,
    stage: str,
    model: LlamaForCausalLM,
    token_ids: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from squeezellm_hf.pipeline import calibrate, work_dir
    from tests.conftest import tiny_llama

    def run(path: Path | None) -> dict[str, Tensor]:
        config = SqueezeLLMConfig(
            codebook=codebook,
            average_bits=5.0,
            dataset=token_ids[:4],
            n_samples=4,
            sequence_length=token_ids.shape[1],
            work_dir=None if path is None else str(path),
        )
        changed = quantize_model(tiny_llama(), None, config, progress=False)
        return {"report": changed.config.quantization_config.budget, **changed.state_dict()}

    saved = 0
    save_layer = work_dir.WorkDir.save_layer

    def dying(self: object, name: str, parameters: object, tensors: dict, kind: str = "layer"):
        nonlocal saved
        saved += kind == stage
        if saved == 3:
            raise KeyboardInterrupt
        return save_layer(self, name, parameters, tensors, kind)

    expected = run(None)
    with monkeypatch.context() as patch:
        patch.setattr(work_dir.WorkDir, "save_layer", dying)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)

    def not_again(*_: object, **__: object) -> None:
        raise AssertionError("the calibration was finished")

    monkeypatch.setattr(calibrate, "accumulate", not_again)
    found = run(tmp_path)
    assert found.keys() == expected.keys()
    assert found.pop("report") == expected.pop("report")
    assert all(found[name].equal(expected[name]) for name in expected)
