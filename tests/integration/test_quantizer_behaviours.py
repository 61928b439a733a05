"""What Transformers' users may expect of any quantizer, beside what other files test."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    pipeline,
)

from squeezellm_hf import SqueezeLLMConfig, SqueezeLLMLinear, quantize_model
from squeezellm_hf.integration.card import model_card
from tests.conftest import BLOCKS, LINEARS_PER_BLOCK, VOCABULARY
from tests.families import FAMILIES

BY_NAME = {family.name: family for family in FAMILIES}


def config(token_ids: Tensor, **changes: Any) -> SqueezeLLMConfig:
    options = {"dataset": token_ids, "n_samples": 4, "sequence_length": 32, **changes}
    return SqueezeLLMConfig(**options)


def count(model: nn.Module) -> int:
    return sum(isinstance(module, SqueezeLLMLinear) for module in model.modules())


@pytest.fixture
def quantized(checkpoint: Path, token_ids: Tensor) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=config(token_ids))


@pytest.fixture(scope="module")
def with_tokenizer(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama, not quantized, with a tokenizer of one token a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    path = tmp_path_factory.mktemp("behaviours") / "model"
    AutoModelForCausalLM.from_pretrained(checkpoint).save_pretrained(path)
    words = {"<pad>": 0, **{f"w{i}": i for i in range(1, VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(path)
    return path


def test_config_may_be_a_dictionary(checkpoint: Path) -> None:
    request = {"quant_method": "squeezellm", "bits": 3, "dataset": None}
    model = AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=request)
    assert count(model) == BLOCKS * LINEARS_PER_BLOCK
    assert {m.bits for m in model.modules() if isinstance(m, SqueezeLLMLinear)} == {3}


def test_config_round_trip_of_a_quantized_model(quantized: Any, tmp_path: Path) -> None:
    """The record of a checkpoint, read and written again, is the same."""
    quantized.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    again = SqueezeLLMConfig.from_dict(saved)
    assert json.loads(again.to_json_string(use_diff=False)) == saved
    assert AutoConfig.from_pretrained(tmp_path).quantization_config == saved
    assert quantized.config.to_diff_dict()["quantization_config"]["bits"] == 4
    assert repr(quantized.config)


def test_what_is_marked_on_the_model(quantized: Any, tmp_path: Path) -> None:
    quantized.save_pretrained(tmp_path)
    for model in (quantized, AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert model.is_quantized
        assert model.quantization_method == "squeezellm"
        assert model.hf_quantizer.is_serializable()
        assert model.hf_quantizer.is_trainable
        assert isinstance(model.config.quantization_config, SqueezeLLMConfig)
        assert not any(p.requires_grad for m in _layers(model) for p in m.parameters())


def test_only_loading_attributes_of_a_second_config_count(
    quantized: Any, token_ids: Tensor, tmp_path: Path
) -> None:
    quantized.save_pretrained(tmp_path)
    other = SqueezeLLMConfig(bits=2, modules_to_not_convert=["mlp"])
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        again = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=other)
    assert count(again) == count(quantized)
    assert again.config.quantization_config.bits == 4
    assert again(token_ids).logits.equal(quantized(token_ids).logits)


def test_casts_that_would_spoil_it_are_refused(quantized: Any, token_ids: Tensor) -> None:
    before = quantized(token_ids).logits
    for cast in ("half", "float"):
        with pytest.raises(ValueError, match="not supported for quantized model"):
            getattr(quantized, cast)()
    assert quantized.cpu()(token_ids).logits.equal(before)
    assert quantized.to("cpu")(token_ids).logits.equal(before)


@pytest.mark.parametrize("as_dictionary", [False, True])
def test_pipeline_quantizes(with_tokenizer: Path, tmp_path: Path, as_dictionary: bool) -> None:
    """The request also reaches the tokenizer, which then can save a dictionary, but no object."""
    options = {"dataset": ["w5 w6 w7 w8 w9 " * 40], "n_samples": 2, "sequence_length": 16}
    settings: Any = SqueezeLLMConfig(**options)
    if as_dictionary:
        settings = {"quant_method": "squeezellm", **options}
    made = pipeline(
        "text-generation",
        model=str(with_tokenizer),
        model_kwargs={"quantization_config": settings},
    )
    text = made("w1 w2 w3", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert text.startswith("w1 w2 w3")
    assert count(made.model) == BLOCKS * LINEARS_PER_BLOCK
    if as_dictionary:
        made.save_pretrained(tmp_path)
    else:
        made.model.save_pretrained(tmp_path)
        AutoTokenizer.from_pretrained(with_tokenizer).save_pretrained(tmp_path)
    again = pipeline("text-generation", model=str(tmp_path))
    assert count(again.model) == count(made.model)
    assert again("w1 w2 w3", max_new_tokens=4, do_sample=False)[0]["generated_text"] == text


@pytest.mark.parametrize("strategy", [{"num_beams": 3}, {"do_sample": True, "top_k": 5}])
def test_generation_survives_a_reload(
    quantized: Any, token_ids: Tensor, tmp_path: Path, strategy: dict[str, Any]
) -> None:
    quantized.save_pretrained(tmp_path, max_shard_size="40KB")
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    texts = []
    for model in (quantized, again):
        torch.manual_seed(3)
        texts.append(model.generate(token_ids[:2, :8], max_new_tokens=8, **strategy))
    assert texts[0].equal(texts[1])


def test_embeddings_may_be_resized(quantized: Any, token_ids: Tensor, tmp_path: Path) -> None:
    before = quantized(token_ids).logits
    quantized.resize_token_embeddings(VOCABULARY + 8, mean_resizing=False)
    after = quantized(token_ids).logits
    assert after.shape[-1] == VOCABULARY + 8
    torch.testing.assert_close(after[..., :VOCABULARY], before, rtol=1e-5, atol=1e-5)
    quantized.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(token_ids).logits, after, rtol=1e-5, atol=1e-5)


def test_what_stays_in_fp32_where_the_model_is_fp16(tmp_path: Path) -> None:
    """T5's ``wo`` overflows in fp16: Transformers keeps it in fp32, and so do we."""
    family = BY_NAME["T5"]
    family.build().save_pretrained(tmp_path / "original")
    auto = transformers.AutoModelForSeq2SeqLM
    model = auto.from_pretrained(
        tmp_path / "original", dtype=torch.float16, quantization_config=config(family.dataset())
    )
    model.save_pretrained(tmp_path / "quantized")
    for each in (model, auto.from_pretrained(tmp_path / "quantized")):
        dense = each.encoder.block[0].layer[1].DenseReluDense
        assert type(dense.wo) is nn.Linear
        assert dense.wo.weight.dtype == torch.float32
        assert isinstance(dense.wi_0, SqueezeLLMLinear)
        with torch.no_grad():
            logits = each(**family.inputs()).logits
        assert bool(logits.isfinite().all())
        assert logits.dtype == torch.float16


def test_loading_reports_nothing_missing(quantized: Any, tmp_path: Path) -> None:
    quantized.save_pretrained(tmp_path, max_shard_size="40KB")
    _, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not report[kind], kind


def test_quantized_model_in_memory_is_the_one_from_pretrained(
    quantized: Any, checkpoint: Path, token_ids: Tensor, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    quantize_model(model, None, config(token_ids), progress=False)
    for name, each in (("first", quantized), ("second", model)):
        each.save_pretrained(tmp_path / name)
    first, second = (
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("first", "second")
    )
    assert first == second


@pytest.mark.parametrize(
    ("family", "tag"),
    [
        ("Llama", "text-generation"),
        ("BERT", "fill-mask"),
        ("BERT classifier", "text-classification"),
        ("T5", None),
        ("Whisper", "automatic-speech-recognition"),
        ("LLaVA", "image-text-to-text"),
    ],
)
def test_the_card_fits_the_model(family: str, tag: str | None) -> None:
    model = BY_NAME[family].build()
    settings = SqueezeLLMConfig(dataset=None)
    quantize_model(model, None, settings, progress=False)
    settings.dataset = "2 batches sha256:0123456789abcdef"  # as a checkpoint says
    card = model_card(model, "me/model")
    assert card.data.pipeline_tag == tag
    loader = "pipeline" if tag == "text-generation" else type(model).__name__
    assert f"from transformers import {loader}" in card.text
    assert '"me/model")' in card.text
    assert "| 2 batches sha256:0123456789abcdef |" in card.text


def _layers(model: nn.Module) -> list[SqueezeLLMLinear]:
    return [module for module in model.modules() if isinstance(module, SqueezeLLMLinear)]
