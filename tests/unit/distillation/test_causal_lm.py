"""The two halves of a model are the model."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    OPTConfig,
    Qwen2Config,
    T5Config,
    T5ForConditionalGeneration,
)

from squeezellm_hf.distillation.causal_lm import CausalLM
from squeezellm_hf.nn import SqueezeLLMLinear
from tests.conftest import tiny_llama

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
CONFIGS = {
    "qwen2": Qwen2Config(**SIZES),
    "scaled logits": GraniteConfig(**SIZES, logits_scaling=8.0),
    "other scale": CohereConfig(**SIZES, logit_scale=0.25),
    "soft-capped logits": Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=3.0),
    "decoder in decoder": OPTConfig(
        vocab_size=64,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=16,
        max_position_embeddings=64,
    ),
    "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "gpt-neox": GPTNeoXConfig(**{k: v for k, v in SIZES.items() if k != "num_key_value_heads"}),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_halves_make_the_model_s_logits(kind: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind]).eval()
    lm = CausalLM(model)
    ids = torch.randint(2, 64, (3, 9))
    with torch.no_grad():
        expected = model(ids).logits
        hidden = lm.hidden_states(ids)
        actual = lm.logits(hidden.flatten(0, 1)).view(expected.shape)
        torch.testing.assert_close(actual, expected)
        # The model is what it was.
        assert model(ids).logits.equal(expected)


def test_mixed_precision_keeps_hidden_states_in_bf16() -> None:
    model = tiny_llama()
    lm = CausalLM(model, mixed_precision=True)
    ids = torch.arange(20).view(2, 10)
    with torch.no_grad():
        hidden = lm.hidden_states(ids)
        logits = lm.logits(hidden[0])
        expected = model(ids).logits[0]
    assert hidden.dtype == logits.dtype == torch.bfloat16
    assert (logits.float() - expected).norm() < 0.05 * expected.norm()


def test_a_quantized_head_is_an_error() -> None:
    model = tiny_llama()
    model.lm_head = SqueezeLLMLinear(64, 128, 4)
    with pytest.raises(ValueError, match="LlamaForCausalLM cannot be distilled: its output head"):
        CausalLM(model)


def test_an_encoder_decoder_model_is_an_error() -> None:
    config = T5Config(vocab_size=64, d_model=32, d_ff=48, d_kv=8, num_layers=1, num_heads=4)
    with pytest.raises(ValueError, match="T5ForConditionalGeneration cannot be distilled"):
        CausalLM(T5ForConditionalGeneration(config))


def test_logits_of_something_else_are_an_error() -> None:
    class Restless(type(tiny_llama())):
        calls = 0

        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            self.calls += 1
            output.logits = output.logits + self.calls
            return output

    model = tiny_llama()
    model.__class__ = Restless
    with pytest.raises(ValueError, match="not a function of the last hidden states"):
        CausalLM(model)
