"""Tiny models of the families that are supported, with random weights: from their configs alone.

Each has two layers of 64 hidden units.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCABULARY = 128
LENGTH = 16

TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}


def ids(rows: int = 1, length: int = LENGTH, seed: int = 1) -> Tensor:
    """Token ids, int64 [rows, length], none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, VOCABULARY, (rows, length), generator=generator)


def text_inputs() -> dict[str, Tensor]:
    return {"input_ids": ids()}


def two_texts() -> dict[str, Tensor]:
    return {"input_ids": ids(), "decoder_input_ids": ids(length=6, seed=2)}


def speech(rows: int = 1, seed: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_features": torch.randn(rows, 16, 40, generator=generator),
        "decoder_input_ids": ids(rows, 6, seed),
    }


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        name: as in docs/models.md.
        model: the class of the model.
        config: the class of its config.
        options: of the config.
        auto: the class that loads it.
        inputs: makes arguments of forward.
        dataset: makes calibration data; default: token ids.
        blocks: where the blocks are, of whose parameters at least ``fraction`` are quantized.
        fraction: at least so much of the parameters of the blocks is quantized.
        reason: why it is less than 0.95.
        kept: modules with linear layers that must not be quantized.
        not_adapted: layers that get no LoRA adapter: PEFT refuses one, or the model reads the
            layer's weight and never calls it.
        compiles: whether the model can be traced as a whole.
        adapts: whether one input reaches the adapters of all layers.
        scale: what the weights are multiplied by, for the usual initialization is so small that
            rounding hardly shows.
        error: the output of the quantized model differs from that of the original by less,
            relative to its norm.
    """

    name: str
    model: str
    config: str
    options: dict[str, Any]
    auto: str = "AutoModelForCausalLM"
    inputs: Callable[[], dict[str, Tensor]] = text_inputs
    dataset: Callable[[], Any] = field(default=lambda: ids(4, 32))
    blocks: tuple[str, ...] = ("layers",)
    fraction: float = 0.95
    reason: str = ""
    kept: tuple[str, ...] = ("lm_head",)
    not_adapted: tuple[str, ...] = ()
    compiles: bool = True
    adapts: bool = True
    scale: float = 2.0
    error: float = 0.2

    def build(self) -> Any:
        """The model, the same every time."""
        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**self.options)
        model = getattr(transformers, self.model)(config).eval()
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, nn.Linear):
                    module.weight.mul_(self.scale)
        return model


def _vision_language() -> list[Family]:
    text = {**TEXT, "model_type": "llama"}
    qwen = {**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}}
    return [
        Family(
            "LLaVA",
            "LlavaForConditionalGeneration",
            "LlavaConfig",
            {
                "text_config": text,
                "vision_config": {**VISION, "model_type": "clip_vision_model"},
                "image_token_index": 3,
            },
            auto="AutoModelForImageTextToText",
            blocks=("language_model.layers",),
            kept=("lm_head", "vision_tower", "multi_modal_projector"),
        ),
        Family(
            "Qwen2-VL",
            "Qwen2VLForConditionalGeneration",
            "Qwen2VLConfig",
            {
                "text_config": qwen,
                "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2},
            },
            auto="AutoModelForImageTextToText",
            blocks=("language_model.layers",),
            kept=("lm_head", "visual"),
        ),
    ]


FAMILIES: list[Family] = [
    Family("Llama", "LlamaForCausalLM", "LlamaConfig", TEXT),
    Family("Mistral", "MistralForCausalLM", "MistralConfig", TEXT),
    Family("Qwen2", "Qwen2ForCausalLM", "Qwen2Config", TEXT),
    Family("Qwen3", "Qwen3ForCausalLM", "Qwen3Config", {**TEXT, "head_dim": 16}),
    Family(
        "Gemma 3",
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {**TEXT, "head_dim": 16, "sliding_window": 8},
    ),
    Family("Phi-3", "Phi3ForCausalLM", "Phi3Config", TEXT),
    Family(
        "OPT",
        "OPTForCausalLM",
        "OPTConfig",
        {**TEXT, "ffn_dim": 256, "word_embed_proj_dim": 64, "activation_function": "relu"},
    ),
    Family("GPT-NeoX", "GPTNeoXForCausalLM", "GPTNeoXConfig", TEXT),
    Family(
        "Falcon",
        "FalconForCausalLM",
        "FalconConfig",
        {**TEXT, "new_decoder_architecture": True, "num_kv_heads": 2},
        blocks=("transformer.h",),
    ),
    Family(
        "Mamba",
        "MambaForCausalLM",
        "MambaConfig",
        {**TEXT, "state_size": 8},
        not_adapted=("out_proj", "dt_proj"),
        fraction=0.9,
        scale=1.0,
        reason="state matrix and convolution, 1 % of a model of 130 million parameters",
    ),
    Family(
        "Jamba",
        "JambaForCausalLM",
        "JambaConfig",
        {
            **TEXT,
            "num_experts": 1,
            "num_experts_per_tok": 1,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
        },
        not_adapted=("dt_proj",),
    ),
    Family(
        "Falcon-H1",
        "FalconH1ForCausalLM",
        "FalconH1Config",
        {
            **TEXT,
            "mamba_d_ssm": 64,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_n_groups": 1,
            "mamba_d_state": 8,
            "mamba_chunk_size": 8,
        },
        not_adapted=("out_proj",),
    ),
    Family(
        "BERT",
        "BertForMaskedLM",
        "BertConfig",
        TEXT,
        auto="AutoModelForMaskedLM",
        blocks=("bert.encoder.layer",),
        kept=("cls",),
    ),
    Family(
        "BERT classifier",
        "BertForSequenceClassification",
        "BertConfig",
        {**TEXT, "num_labels": 3},
        auto="AutoModelForSequenceClassification",
        blocks=("bert.encoder.layer",),
        kept=("classifier",),
    ),
    Family(
        "BERT encoder",
        "BertModel",
        "BertConfig",
        TEXT,
        auto="AutoModel",
        blocks=("encoder.layer",),
        kept=(),
    ),
    Family(
        "T5",
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": VOCABULARY,
            "d_model": 64,
            "d_kv": 16,
            "d_ff": 160,
            "num_layers": 2,
            "num_heads": 4,
            "feed_forward_proj": "gated-gelu",
            "decoder_start_token_id": 0,
        },
        auto="AutoModelForSeq2SeqLM",
        inputs=two_texts,
        blocks=("encoder.block", "decoder.block"),
        scale=1.0,
    ),
    Family(
        "Whisper",
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            "vocab_size": VOCABULARY,
            "d_model": 64,
            "num_mel_bins": 16,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 160,
            "decoder_ffn_dim": 160,
            "max_source_positions": 20,
            "max_target_positions": 32,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
        auto="AutoModelForSpeechSeq2Seq",
        inputs=speech,
        dataset=lambda: [speech(1, seed) for seed in range(4)],
        blocks=("encoder.layers", "decoder.layers"),
        kept=("proj_out",),
    ),
    *_vision_language(),
]

_MIXTURE = {**TEXT, "num_experts_per_tok": 2}


def _experts() -> list[Family]:
    plain: dict[str, Any] = {"compiles": False, "adapts": False}
    return [
        Family(
            "Mixtral",
            "MixtralForCausalLM",
            "MixtralConfig",
            {**_MIXTURE, "num_local_experts": 4},
            **plain,
        ),
        Family(
            "Qwen3-MoE",
            "Qwen3MoeForCausalLM",
            "Qwen3MoeConfig",
            {**_MIXTURE, "head_dim": 16, "moe_intermediate_size": 48, "num_experts": 4},
            **plain,
        ),
        Family(
            "gpt-oss",
            "GptOssForCausalLM",
            "GptOssConfig",
            {
                **_MIXTURE,
                "head_dim": 16,
                "num_local_experts": 4,
                "sliding_window": 8,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            },
            **plain,
        ),
        Family(
            "DeepSeek-V3",
            "DeepseekV3ForCausalLM",
            "DeepseekV3Config",
            {
                **_MIXTURE,
                "num_key_value_heads": 4,
                "moe_intermediate_size": 48,
                "n_routed_experts": 4,
                "n_shared_experts": 1,
                "n_group": 2,
                "topk_group": 1,
                "first_k_dense_replace": 1,
                "q_lora_rank": 32,
                "kv_lora_rank": 32,
                "qk_nope_head_dim": 16,
                "qk_rope_head_dim": 8,
                "v_head_dim": 16,
            },
            **plain,
        ),
        Family(
            "OLMoE",
            "OlmoeForCausalLM",
            "OlmoeConfig",
            {**_MIXTURE, "num_experts": 4},
            **plain,
        ),
        Family(
            "GPT-2",
            "GPT2LMHeadModel",
            "GPT2Config",
            {
                "vocab_size": VOCABULARY,
                "n_embd": 64,
                "n_layer": 2,
                "n_head": 4,
                "n_positions": 64,
                "pad_token_id": 0,
                "bos_token_id": 1,
                "eos_token_id": 2,
            },
            blocks=("transformer.h",),
        ),
    ]


FAMILIES += _experts()
