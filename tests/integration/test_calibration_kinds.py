"""What each kind of model is calibrated on, by its own head."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from squeezellm_hf import SqueezeLLMConfig, SqueezeLLMLinear, quantize_model
from squeezellm_hf.calibration.objectives import (
    CausalLM,
    MaskedLM,
    Objective,
    Outputs,
    SampledLabels,
    Seq2SeqLM,
)
from squeezellm_hf.integration.calibration import objective_for
from squeezellm_hf.pipeline import quantize_modules
from squeezellm_hf.pipeline.linears import is_linear
from tests.families import FAMILIES, TEXT, VOCABULARY, ids, speech

BY_NAME = {family.name: family for family in FAMILIES}


class Words:
    """A tokenizer: a token a character."""

    mask_token_id = 5

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) % VOCABULARY for character in text]}


def config(dataset: Any, **changes: Any) -> SqueezeLLMConfig:
    return SqueezeLLMConfig(
        **{"dataset": dataset, "n_samples": 4, "sequence_length": 16, **changes}
    )


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("Llama", CausalLM(7)),
        ("Mamba", CausalLM(7)),
        ("LLaVA", CausalLM(7)),
        ("BERT", MaskedLM(7, VOCABULARY, 5)),
        ("BERT classifier", SampledLabels(7)),
        ("BERT encoder", Outputs(7)),
        ("T5", Seq2SeqLM(7)),
        ("Whisper", Seq2SeqLM(7)),
    ],
)
def test_objective_of_a_head(family: str, expected: Objective) -> None:
    settings = config(["text"], seed=7)
    assert objective_for(BY_NAME[family].build(), settings, Words()) == expected


def test_objective_of_other_outputs() -> None:
    settings = config(ids())
    regression = transformers.BertConfig(**TEXT, num_labels=1)
    several = transformers.BertConfig(**TEXT, problem_type="multi_label_classification")
    kind = transformers.BertForSequenceClassification
    for options in (regression, several):
        assert objective_for(kind(options), settings) == Outputs(0)
    t5 = transformers.T5Model(transformers.T5Config(**BY_NAME["T5"].options))
    assert objective_for(t5, settings) == Outputs(0, encoder_decoder=True)
    assert objective_for(transformers.BertForMaskedLM(regression), settings).mask_token is None


@pytest.mark.parametrize(
    "family", ["BERT", "BERT classifier", "BERT encoder", "T5", "Mamba", "Jamba", "Falcon-H1"]
)
@pytest.mark.parametrize("codebook", ["kmeans", "guided"])
@pytest.mark.filterwarnings("error:calibration did not reach")
def test_text_reaches_every_layer(family: str, codebook: str) -> None:
    model = BY_NAME[family].build()
    text = "It was the best of times, it was the worst of times. " * 8
    settings = config([text], tokenizer=Words(), codebook=codebook, lnq_rounds=1, lnq_sweeps=1)
    quantize_model(model, None, settings, progress=False)
    assert any(isinstance(module, SqueezeLLMLinear) for module in model.modules())


def test_objective_changes_the_result() -> None:
    """Gradients of hidden tokens are others than those of the outputs."""
    found = []
    for objective in (MaskedLM(0, VOCABULARY), MaskedLM(1, VOCABULARY), Outputs(0)):
        model = BY_NAME["BERT"].build()
        name = "bert.encoder.layer.0.output.dense"
        plan = {name: SqueezeLLMConfig(bits=2).parameters}
        quantize_modules(model, plan, ids(4, 16), objective=objective, progress=False)
        found.append(model.get_submodule(name).lookup_table)
    assert not found[0].equal(found[1])
    assert not found[0].equal(found[2])


def test_batches_of_a_speech_model(tmp_path: Path) -> None:
    """With labels, or with what the decoder reads; an interrupted run goes on with the same."""
    with_labels = [
        {"input_features": s["input_features"], "labels": s["decoder_input_ids"]}
        for s in (speech(1, seed) for seed in range(3))
    ]
    without = [speech(1, seed) for seed in range(3)]
    tables = []
    for dataset in (with_labels, without, without):
        model = BY_NAME["Whisper"].build()
        settings = config(dataset, bits=3, work_dir=str(tmp_path / "work"))
        quantize_model(model, None, settings, progress=False)
        tables.append(model.model.encoder.layers[0].fc1.lookup_table)
        assert model.config.quantization_config.to_dict()["dataset"].startswith("3 batches sha256")
    assert not tables[0].equal(tables[1])
    assert tables[1].equal(tables[2])
    # Fisher sums of two data sets, three sets of layers at most: the third run reused the second's.
    assert len(list((tmp_path / "work").glob("fisher-*"))) == 2


@pytest.mark.filterwarnings("error:calibration did not reach")
def test_batches_with_images_reach_the_tower() -> None:
    model = BY_NAME["LLaVA"].build()
    generator = torch.Generator().manual_seed(0)
    n_patches = (32 // 8) ** 2
    batches = []
    for seed in range(2):
        image = torch.full((1, n_patches), model.config.image_token_id)
        batches.append(
            {
                "input_ids": torch.cat([image, ids(1, 8, seed)], dim=1),
                "pixel_values": torch.randn(1, 3, 32, 32, generator=generator),
            }
        )
    settings = config(batches, modules_to_not_convert=["!multi_modal_projector"])
    quantize_model(model, None, settings, progress=False)
    assert isinstance(model.model.multi_modal_projector.linear_1, SqueezeLLMLinear)


def test_masks_of_batches_count() -> None:
    """Padding must not change what is found."""
    row = ids(1, 12)
    padded = torch.cat([row, torch.zeros(1, 4, dtype=row.dtype)], dim=1)
    mask = (padded > 0).long()
    tables = []
    for batch in ({"input_ids": row}, {"input_ids": padded, "attention_mask": mask}):
        model = BY_NAME["Llama"].build()
        quantize_model(model, None, config([batch], sensitive_fraction=0.0), progress=False)
        tables.append(model.model.layers[0].mlp.up_proj.dequantize())
    torch.testing.assert_close(tables[0], tables[1], rtol=1e-3, atol=1e-3)


def test_speech_without_data_is_quantized_uncalibrated() -> None:
    model = BY_NAME["Whisper"].build()
    with pytest.warns(UserWarning, match=r"reads input_features, .* list of batches"):
        quantize_model(model, None, SqueezeLLMConfig(), progress=False)
    plain = BY_NAME["Whisper"].build()
    quantize_model(plain, None, SqueezeLLMConfig(dataset=None), progress=False)
    for name, tensor in plain.state_dict().items():
        assert tensor.equal(model.state_dict()[name]), name


def test_what_does_not_fit_is_named() -> None:
    whisper = BY_NAME["Whisper"].build()
    features = [{"input_features": speech()["input_features"]}]
    for settings, message in (
        (config(["text"]), "reads input_features, which text does not give it"),
        (config(features), r"dataset\[0\] has input_features; .* labels or decoder_input_ids"),
    ):
        with pytest.raises(ValueError, match=message):
            quantize_model(whisper, None, settings, progress=False)
    with pytest.raises(ValueError, match=r"dataset\[1\] is list, not a mapping"):
        config([{"input_ids": ids()}, [1, 2]])
    settings = config(ids(4, 32), distill_steps=2)
    with pytest.raises(ValueError, match=r"distill_steps=2 needs a causal .*, got BertForMasked"):
        quantize_model(BY_NAME["BERT"].build(), None, settings, progress=False)


@pytest.mark.filterwarnings("ignore:.*without calibration")
def test_hessians_need_batches() -> None:
    settings = SqueezeLLMConfig(codebook="guided")
    with pytest.warns(UserWarning, match="It is quantized without calibration now: by k-means"):
        quantize_model(BY_NAME["Whisper"].build(), None, settings, progress=False)
    assert settings.codebook == "kmeans"
    settings = SqueezeLLMConfig(overrides={"fc1": {"codebook": "lnq"}})
    with (
        pytest.warns(UserWarning, match="It is quantized without calibration now"),
        pytest.raises(ValueError, match=r"codebook='lnq' of .*fc1 needs calibration data"),
    ):
        quantize_model(BY_NAME["Whisper"].build(), None, settings, progress=False)


def test_falcon_has_linear_layers_of_its_own() -> None:
    model = BY_NAME["Falcon"].build()
    layer = model.transformer.h[0].mlp.dense_h_to_4h
    assert type(layer) is not torch.nn.Linear
    assert is_linear(layer)


def test_weights_that_are_read_and_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mamba multiplies by ``dt_proj.weight`` itself, and T5 asks ``wo.weight`` for its dtype."""
    read: list[str] = []
    weight = SqueezeLLMLinear.weight

    def recorded(self: SqueezeLLMLinear) -> Tensor:
        read.append(f"{self.out_features} x {self.in_features}")
        return weight.fget(self)

    monkeypatch.setattr(SqueezeLLMLinear, "weight", property(recorded))
    for name, shape in (("Mamba", "160 x 4"), ("T5", "64 x 160")):
        family = BY_NAME[name]
        model = family.build()
        settings = config(family.dataset(), bits=8)
        with torch.no_grad():
            expected = model(**family.inputs()).logits
            quantize_model(model, None, settings, progress=False)
            actual = model(**family.inputs()).logits
        assert shape in read, name
        assert (actual - expected).norm() < 0.02 * expected.norm()
