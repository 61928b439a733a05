"""The same on a GPU, through the PyTorch reference or whatever kernels are there."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from squeezellm_hf import SqueezeLLMConfig, SqueezeLLMLinear

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def config(token_ids: Tensor) -> SqueezeLLMConfig:
    return SqueezeLLMConfig(bits=3, dataset=token_ids, n_samples=4, sequence_length=32)


@pytest.mark.parametrize("device_map", ["cuda", "auto", 0, {"": "cuda:0"}])
def test_quantize_on_the_gpu_and_load_on_the_cpu(
    checkpoint: Path, token_ids: Tensor, tmp_path: Path, device_map: object
) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, quantization_config=config(token_ids), device_map=device_map
    )
    layers = [m for m in model.modules() if isinstance(m, SqueezeLLMLinear)]
    assert len(layers) == 14
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    logits = model(token_ids.cuda()).logits.cpu()
    model.save_pretrained(tmp_path)
    for target in ("cpu", "cuda"):
        again = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=target)
        for name, tensor in again.state_dict().items():
            assert tensor.cpu().equal(model.state_dict()[name].cpu()), name
        output = again(token_ids.to(target)).logits.cpu()
        torch.testing.assert_close(output, logits, rtol=1e-3, atol=1e-3)


def test_same_result_on_both_up_to_rounding(checkpoint: Path, token_ids: Tensor) -> None:
    logits = []
    for device_map in ("cpu", "cuda"):
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint, quantization_config=config(token_ids), device_map=device_map
        )
        logits.append(model(token_ids.to(model.device)).logits.cpu())
    # A gradient that differs in its last bit may move a weight to the neighbouring entry.
    assert (logits[0] - logits[1]).norm() < 0.05 * logits[0].norm()


def test_offload_to_the_cpu(checkpoint: Path, token_ids: Tensor, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, quantization_config=config(token_ids), device_map="cuda"
    )
    model.save_pretrained(tmp_path)
    parts = ["model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.norm", "lm_head"]
    devices = {"model.layers.1": "cpu", **dict.fromkeys(parts, 0)}
    offloaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=devices)
    torch.testing.assert_close(
        offloaded(token_ids.cuda()).logits, model(token_ids.cuda()).logits, rtol=1e-3, atol=1e-3
    )


def test_compiles_without_graph_break(checkpoint: Path, token_ids: Tensor) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, quantization_config=config(token_ids), device_map="cuda"
    )
    with torch.no_grad():
        expected = model(token_ids.cuda(), use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True)
        actual = compiled(token_ids.cuda(), use_cache=False).logits
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
