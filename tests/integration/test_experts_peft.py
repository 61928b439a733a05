"""LoRA on experts and on layers that were Conv1D."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from squeezellm_hf import SqueezeLLMConfig, SqueezeLLMLinear, quantize_model
from tests.mixtures import tiny

peft = pytest.importorskip("peft")


def adapted(family: str, token_ids: Tensor, **fields: Any) -> tuple[Any, Any]:
    config = SqueezeLLMConfig(dataset=token_ids, n_samples=4, sequence_length=32)
    model = quantize_model(tiny(family), None, config, progress=False)
    lora = peft.LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False, **fields)
    return model, peft.get_peft_model(model, lora)


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_gpt2_merges_into_conv1d(fan_in_fan_out: bool, token_ids: Tensor, tmp_path: Path) -> None:
    # [768, 768] would take a transposed weight without a word.
    _, model = adapted(
        "gpt2", token_ids, target_modules=["c_proj", "c_attn"], fan_in_fan_out=fan_in_fan_out
    )
    with torch.no_grad():
        expected = model(token_ids).logits
        merged = model.merge_and_unload()
        block = merged.transformer.h[1]
        assert isinstance(block.attn.c_proj, Conv1D)
        assert isinstance(block.mlp.c_fc, SqueezeLLMLinear)
        torch.testing.assert_close(merged(token_ids).logits, expected, rtol=1e-4, atol=1e-4)
        merged.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert again(token_ids).logits.equal(merged(token_ids).logits)


def test_experts_train_and_merge(token_ids: Tensor, tmp_path: Path) -> None:
    _, model = adapted("mixtral", token_ids, target_modules=["down_proj", "gate_up_proj"])
    first = model(token_ids, labels=token_ids).loss
    first.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert any(g is not None and bool(g.any()) for g in gradients)
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = model(token_ids).logits
        merged = model.merge_and_unload()
        assert merged.model.layers[0].mlp.experts.gate_up_proj.dim() == 3  # fused again
        torch.testing.assert_close(merged(token_ids).logits, expected, rtol=1e-4, atol=1e-4)
        merged.save_pretrained(tmp_path / "merged")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(again(token_ids).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_an_adapter_reloads(family: str, targets: Any, token_ids: Tensor, tmp_path: Path) -> None:
    _base, model = adapted(family, token_ids, target_modules=targets)
    experts = [name for name, _ in model.named_modules() if name.endswith("lora_A.default")]
    assert any(".experts.7.down_proj" in name for name in experts)
    with torch.no_grad():
        expected = model(token_ids).logits
        model.save_pretrained(tmp_path / "adapter")
        model.unload().save_pretrained(tmp_path / "base")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        again = peft.PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
        assert again(token_ids).logits.equal(expected)


def test_some_of_the_experts_merge(token_ids: Tensor, tmp_path: Path) -> None:
    _, model = adapted("qwen3_moe", token_ids, target_modules=r".*experts\.\d+\.down_proj")
    with torch.no_grad():
        expected = model(token_ids).logits
        merged = model.merge_and_unload()
        expert = merged.model.layers[1].mlp.experts[4]
        assert type(expert["down_proj"]) is nn.Linear
        assert isinstance(expert["gate_up_proj"], SqueezeLLMLinear)
        merged.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        torch.testing.assert_close(again(token_ids).logits, expected, rtol=1e-4, atol=1e-4)
