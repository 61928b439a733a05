"""``quantize_lm_head``: the output head, tied to the embeddings or not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from squeezellm_hf import SqueezeLLMConfig, SqueezeLLMLinear, quantize_model
from squeezellm_hf.evaluation.footprint import model_footprint
from tests.conftest import tiny_llama
from tests.families import FAMILIES, Family

BY_NAME = {family.name: family for family in FAMILIES}


def config(token_ids: Tensor, **changes: object) -> SqueezeLLMConfig:
    options = {"dataset": token_ids, "n_samples": 4, "sequence_length": 32, **changes}
    return SqueezeLLMConfig(quantize_lm_head=True, **options)


@pytest.mark.parametrize("tied", [False, True])
def test_head_is_quantized_and_reloads(token_ids: Tensor, tmp_path: Path, tied: bool) -> None:
    tiny_llama(tie_word_embeddings=tied).save_pretrained(tmp_path / "original")
    auto = transformers.AutoModelForCausalLM
    original = auto.from_pretrained(tmp_path / "original")
    model = auto.from_pretrained(
        tmp_path / "original", quantization_config=config(token_ids, bits=8)
    )
    assert isinstance(model.lm_head, SqueezeLLMLinear)
    assert model.get_output_embeddings() is model.lm_head
    embeddings = model.get_input_embeddings()
    assert type(embeddings) is nn.Embedding
    assert embeddings.weight.equal(original.get_input_embeddings().weight)
    with torch.no_grad():
        expected, logits = original(token_ids).logits, model(token_ids).logits
    assert 0 < (logits - expected).norm() < 0.02 * expected.norm()
    model.save_pretrained(tmp_path / "quantized", max_shard_size="40KB")
    saved = json.loads((tmp_path / "quantized" / "config.json").read_text())
    assert saved["tie_word_embeddings"] is False
    assert saved["quantization_config"]["quantize_lm_head"] is True
    again = auto.from_pretrained(tmp_path / "quantized")
    assert isinstance(again.lm_head, SqueezeLLMLinear)
    assert again(token_ids).logits.equal(logits)
    assert again.get_input_embeddings().weight.equal(embeddings.weight)
    prompt = token_ids[:1, :8]
    assert again.generate(prompt, max_new_tokens=4, do_sample=False).shape == (1, 12)


def test_tied_head_counts_with_its_own_gradients(token_ids: Tensor) -> None:
    """The gradients of the embeddings must not weigh the cells of the head."""
    tied, untied = tiny_llama(tie_word_embeddings=True), tiny_llama(tie_word_embeddings=False)
    untied.load_state_dict(tied.state_dict())
    for model in (tied, untied):
        quantize_model(model, None, config(token_ids), progress=False)
    for name, tensor in tied.lm_head.state_dict().items():
        assert tensor.equal(untied.lm_head.state_dict()[name]), name


def test_the_head_stays_by_default(token_ids: Tensor, tmp_path: Path) -> None:
    settings = SqueezeLLMConfig(dataset=token_ids, n_samples=4, sequence_length=32)
    assert settings.quantize_lm_head is False
    model = tiny_llama(tie_word_embeddings=True)
    quantize_model(model, None, settings, progress=False)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is True


@pytest.mark.parametrize("name", ["Gemma 3", "BERT", "T5", "Whisper", "LLaVA", "Falcon"])
def test_heads_of_other_families(tmp_path: Path, name: str) -> None:
    """Tied by other names, with a bias, or beside other weights that stay tied."""
    family: Family = BY_NAME[name]
    options = {**family.options, "tie_word_embeddings": True}
    model = Family(**{**vars(family), "options": options}).build()
    assert model.all_tied_weights_keys
    ties = {
        pair
        for pair in model.all_tied_weights_keys.items()
        if not any(f".{head}." in f".{key}" for key in pair for head in family.kept)
    }
    settings = config(family.dataset(), bits=8)
    quantize_model(model, None, settings, progress=False)
    assert isinstance(model.get_output_embeddings(), SqueezeLLMLinear)
    assert set(model.all_tied_weights_keys.items()) == ties
    model.save_pretrained(tmp_path)
    again = getattr(transformers, family.auto).from_pretrained(tmp_path)
    assert_same_output(model, again, family)
    again.tie_weights()
    assert_same_output(model, again, family)
    first, second = model.state_dict(), again.state_dict()
    assert first.keys() == second.keys()
    assert all(tensor.equal(second[key]) for key, tensor in first.items())
    for key, source in ties:
        assert again.get_parameter(key) is again.get_parameter(source)


def test_dequantized_head_stays_untied(token_ids: Tensor, tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    quantize_model(model, None, config(token_ids, bits=2), progress=False)
    weight = model.lm_head.dequantize(torch.float32)
    model.dequantize().save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight.equal(weight)
    assert not again.get_input_embeddings().weight.equal(weight)


def test_footprint_counts_the_head(token_ids: Tensor) -> None:
    plain, full = tiny_llama(), tiny_llama()
    settings = SqueezeLLMConfig(dataset=token_ids, n_samples=4, sequence_length=32)
    quantize_model(plain, None, settings, progress=False)
    quantize_model(full, None, config(token_ids), progress=False)
    assert len(model_footprint(full).layers) == len(model_footprint(plain).layers) + 1
    assert full.get_memory_footprint() < plain.get_memory_footprint()


def test_what_cannot_be_is_named(token_ids: Tensor) -> None:
    torch.manual_seed(0)
    headless = tiny_llama().model
    with pytest.raises(ValueError, match="quantize_lm_head=True: LlamaModel has no linear output"):
        quantize_model(headless, None, config(token_ids), progress=False)
    with pytest.raises(ValueError, match="quantize_lm_head must be true or false, got 1"):
        SqueezeLLMConfig(quantize_lm_head=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="quantize_lm_head=True goes without distillation"):
        SqueezeLLMConfig(quantize_lm_head=True, distill_steps=5)


def assert_same_output(first: Any, second: Any, family: Family) -> None:
    with torch.no_grad():
        expected = next(iter(first(**family.inputs()).values()))
        actual = next(iter(second(**family.inputs()).values()))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
