"""Which modules of a model of Transformers are quantized by default, and how to say otherwise."""

from typing import Any

import pytest
import torch
import transformers

from squeezellm_hf import SqueezeLLMConfig, SqueezeLLMLinear, quantize_model
from squeezellm_hf.integration.run import prepare
from squeezellm_hf.integration.selection import modules_to_skip
from tests.families import FAMILIES, TEXT, VISION, Family, ids

BY_NAME = {family.name: family for family in FAMILIES}


def planned(model: Any, **changes: Any) -> set[str]:
    """The names of the layers that would be quantized."""
    return set(prepare(model, SqueezeLLMConfig(dataset=None, **changes)).plan)


def on_meta(family: Family, **options: Any) -> Any:
    config = getattr(transformers, family.config)(**family.options, **options)
    with torch.device("meta"):
        return getattr(transformers, family.model)(config)


def test_only_the_text_part_of_a_model_that_sees() -> None:
    for name in ("LLaVA", "Qwen2-VL"):
        model = on_meta(BY_NAME[name])
        plan = planned(model)
        assert len(plan) == 14
        assert all(layer.startswith("model.language_model.layers.") for layer in plan)


def test_exceptions_from_what_is_skipped() -> None:
    model = on_meta(BY_NAME["LLaVA"])
    text = planned(model)
    tower = planned(model, modules_to_not_convert=["!vision_tower"]) - text
    assert len(tower) == 12
    assert all(name.startswith("model.vision_tower.") for name in tower)
    both = ["!vision_tower", "!multi_modal_projector", "re:.*vision_tower.*fc1"]
    more = planned(model, modules_to_not_convert=both) - text
    assert {"model.multi_modal_projector.linear_1"} < more
    assert len(more) == 12 + 2 - 2
    # The head has an option of its own.
    assert planned(model, modules_to_not_convert=["!lm_head"]) == text
    assert planned(model, quantize_lm_head=True) - text == {"lm_head"}
    classifier = on_meta(BY_NAME["BERT classifier"])
    found = planned(classifier, modules_to_not_convert=["!classifier"])
    assert found - planned(classifier) == {"classifier"}


def test_a_tower_that_text_does_not_reach_is_reported() -> None:
    model = BY_NAME["LLaVA"].build()
    settings = SqueezeLLMConfig(
        dataset=ids(2, 16),
        n_samples=2,
        sequence_length=16,
        codebook="lnq",
        modules_to_not_convert=["!multi_modal_projector"],
    )
    with pytest.warns(UserWarning, match="calibration did not reach model.multi_modal_projector"):
        quantize_model(model, None, settings, progress=False)
    assert isinstance(model.model.multi_modal_projector.linear_1, SqueezeLLMLinear)


@pytest.mark.parametrize(
    ("encoder", "decoder", "expected"),
    [("bert", "bert", {"encoder", "decoder"}), ("vit", "bert", {"decoder"})],
)
def test_two_models_in_one(encoder: str, decoder: str, expected: set[str]) -> None:
    kinds = {"bert": TEXT, "vit": VISION}
    first = transformers.AutoConfig.for_model(encoder, **kinds[encoder])
    second = transformers.AutoConfig.for_model(
        decoder, **kinds[decoder], is_decoder=True, add_cross_attention=True
    )
    kind = "EncoderDecoder" if encoder == "bert" else "VisionEncoderDecoder"
    config = getattr(transformers, f"{kind}Config").from_encoder_decoder_configs(first, second)
    model = getattr(transformers, f"{kind}Model")(config=config)
    plan = planned(model)
    assert {name.split(".")[0] for name in plan} == expected
    assert not any("predictions" in name for name in plan)


def test_a_tower_in_a_model_that_reads_text_itself() -> None:
    config = transformers.GitConfig(**TEXT, vision_config={**VISION, "num_channels": 3})
    with torch.device("meta"):
        plan = planned(transformers.GitForCausalLM(config))
    assert len([name for name in plan if name.startswith("git.encoder.layer.")]) == 12
    assert not any("image_encoder" in name for name in plan)


def test_models_of_one_kind_alone_are_quantized_whole() -> None:
    vision = transformers.ViTModel(transformers.ViTConfig(**VISION))
    linears = {n for n, m in vision.named_modules() if isinstance(m, torch.nn.Linear)}
    assert planned(vision) == linears
    clip = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16)
    )
    assert {name.split(".")[0] for name in planned(clip)} == {"text_model"}


@pytest.mark.parametrize(
    ("dtype", "kept"), [(torch.float16, True), (torch.bfloat16, False), (torch.float32, False)]
)
def test_fp32_where_fp16_overflows(dtype: torch.dtype, kept: bool) -> None:
    model = on_meta(BY_NAME["T5"]).to(dtype)
    assert any(name.endswith(".wo") for name in planned(model)) is not kept
    assert any(name.endswith(".wi_0") for name in planned(model))


def test_patterns_fit_nothing_else() -> None:
    """A skipped module's name may be another's last component."""
    model = on_meta(BY_NAME["BERT classifier"])
    model.bert.encoder.layer[0].classifier = torch.nn.Linear(64, 64, device="meta")
    assert "bert.encoder.layer.0.classifier" in planned(model)
    assert "classifier" not in planned(model)
    assert any(p.startswith("re:") for p in modules_to_skip(model, SqueezeLLMConfig()))


@pytest.mark.parametrize("pattern", ["!", "!re:("])
def test_wrong_exceptions_are_named(pattern: str) -> None:
    with pytest.raises(ValueError, match="modules_to_not_convert: "):
        SqueezeLLMConfig(modules_to_not_convert=[pattern])
