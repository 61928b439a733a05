"""Tiny random models whose weights are not all in ``nn.Linear``: experts, and GPT-2's Conv1D."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GPT2Config,
    GptOssConfig,
    Llama4TextConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen3MoeConfig,
)

VOCABULARY = 128
EXPERTS = 8

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _mixtral() -> Any:
    return MixtralConfig(
        **_COMMON,
        intermediate_size=96,
        num_key_value_heads=2,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
    )


def _qwen3_moe() -> Any:
    return Qwen3MoeConfig(
        **_COMMON,
        intermediate_size=96,
        moe_intermediate_size=48,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
    )


def _gpt_oss() -> Any:
    return GptOssConfig(
        **_COMMON,
        intermediate_size=96,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        sliding_window=16,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )


def _deepseek_v3() -> Any:
    return DeepseekV3Config(
        **_COMMON,
        intermediate_size=96,
        moe_intermediate_size=48,
        num_key_value_heads=4,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=2,
        n_shared_experts=1,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
    )


def _olmoe() -> Any:
    return OlmoeConfig(
        **_COMMON,
        intermediate_size=48,
        num_key_value_heads=4,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
    )


def _llama4() -> Any:
    return Llama4TextConfig(
        **_COMMON,
        intermediate_size=96,
        intermediate_size_mlp=96,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        interleave_moe_layer_step=1,
    )


def _gpt2() -> Any:
    return GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


MIXTURES: dict[str, Callable[[], Any]] = {
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3_moe,
    "gpt_oss": _gpt_oss,
    "deepseek_v3": _deepseek_v3,
    "olmoe": _olmoe,
    "llama4": _llama4,
}
EXPANDED = {**MIXTURES, "gpt2": _gpt2}


def tiny(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """The model of a family, the same every time, with biases that show."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(EXPANDED[family](), dtype=dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
            elif parameter.dim() > 1:  # the usual initialization is so small that nothing shows
                parameter.mul_(4)
    return model
