"""Quantize while loading, save, load again: what a user does, on a tiny Llama."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from squeezellm_hf import SqueezeLLMConfig, SqueezeLLMLinear, quantize_model
from tests.conftest import BLOCKS, LINEARS_PER_BLOCK, tiny_llama


def config(token_ids: Tensor, **changes: object) -> SqueezeLLMConfig:
    return SqueezeLLMConfig(
        **{"dataset": token_ids, "n_samples": 4, "sequence_length": 32, **changes}
    )


def load(path: Path, **kwargs: object):
    return AutoModelForCausalLM.from_pretrained(path, **kwargs)


def quantized(model: nn.Module) -> dict[str, SqueezeLLMLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, SqueezeLLMLinear)}


def assert_same_tensors(first: nn.Module, second: nn.Module) -> None:
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert tensor.equal(theirs[name]), name


def test_converts_every_linear_layer_of_the_blocks(checkpoint: Path, token_ids: Tensor) -> None:
    model = load(checkpoint, quantization_config=config(token_ids))
    assert len(quantized(model)) == BLOCKS * LINEARS_PER_BLOCK
    assert type(model.lm_head) is nn.Linear
    assert not any(type(m) is nn.Linear for m in model.model.modules())
    assert model.is_quantized
    assert not model.training


@pytest.mark.parametrize("shard_size", ["50GB", "40KB"])
def test_reload_is_bit_identical(
    checkpoint: Path, token_ids: Tensor, tmp_path: Path, shard_size: str
) -> None:
    model = load(checkpoint, quantization_config=config(token_ids, bits=3))
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard_size == "40KB")
    again = load(tmp_path)
    assert_same_tensors(model, again)
    assert again(token_ids).logits.equal(model(token_ids).logits)
    generate = {"max_new_tokens": 16, "do_sample": False}
    prompt = token_ids[:1, :8]
    assert again.generate(prompt, **generate).equal(model.generate(prompt, **generate))
    again.save_pretrained(tmp_path / "twice")
    assert_same_tensors(model, load(tmp_path / "twice"))


def test_same_seed_same_files(checkpoint: Path, token_ids: Tensor, tmp_path: Path) -> None:
    for name in ("first", "second"):
        load(checkpoint, quantization_config=config(token_ids)).save_pretrained(tmp_path / name)
    names = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "second").iterdir())
    for name in set(names) - {"README.md"}:  # it says how the repository is called
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_quantize_model_in_memory_gives_the_same(checkpoint: Path, token_ids: Tensor) -> None:
    loaded = load(checkpoint, quantization_config=config(token_ids))
    model = quantize_model(load(checkpoint), None, config(token_ids), progress=False)
    assert_same_tensors(model, loaded)
    assert model.is_quantized


def test_output_is_near_the_original(checkpoint: Path, token_ids: Tensor) -> None:
    errors = []
    with torch.no_grad():
        original = load(checkpoint)(token_ids).logits
    for bits in (2, 3, 4, 8):
        model = load(checkpoint, quantization_config=config(token_ids, bits=bits))
        with torch.no_grad():
            errors.append(float((model(token_ids).logits - original).norm() / original.norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.25
    assert errors[3] < 0.02


def test_overrides_and_skips(checkpoint: Path, token_ids: Tensor, tmp_path: Path) -> None:
    overrides = {"re:.*down_proj": {"bits": 4}, "layers.1.self_attn": {"skip": True}}
    settings = config(
        token_ids, bits=3, overrides=overrides, modules_to_not_convert=["layers.0.mlp.up_proj"]
    )
    model = load(checkpoint, quantization_config=settings)
    layers = quantized(model)
    assert len(layers) == 14 - 4 - 1
    assert {n for n, layer in layers.items() if layer.bits == 4} == {
        f"model.layers.{i}.mlp.down_proj" for i in range(2)
    }
    model.save_pretrained(tmp_path)
    assert_same_tensors(model, load(tmp_path))


def test_dense_only_and_without_calibration(checkpoint: Path, tmp_path: Path) -> None:
    settings = SqueezeLLMConfig(dataset=None, outlier_fraction=0.0, sensitive_fraction=0.0)
    model = load(checkpoint, quantization_config=settings)
    assert all(layer.nnz == 0 for layer in quantized(model).values())
    model.save_pretrained(tmp_path)
    assert_same_tensors(model, load(tmp_path))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(
    checkpoint: Path, token_ids: Tensor, tmp_path: Path, dtype: torch.dtype
) -> None:
    model = load(checkpoint, dtype=dtype, quantization_config=config(token_ids))
    assert model.dtype == dtype
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.dtype == dtype
    assert_same_tensors(model, again)
    full = load(tmp_path, dtype=torch.float32)
    layer = quantized(full)["model.layers.0.mlp.up_proj"]
    assert layer.lookup_table.dtype == torch.float16  # the tables are what they were
    torch.testing.assert_close(
        full(token_ids).logits, again(token_ids).logits.float(), rtol=0.1, atol=0.3
    )


def test_layers_with_bias(token_ids: Tensor, tmp_path: Path) -> None:
    model = tiny_llama(attention_bias=True, mlp_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    original = model(token_ids).logits
    quantize_model(model, None, config(token_ids, bits=8), progress=False)
    assert (model(token_ids).logits - original).norm() < 0.02 * original.norm()
    model.save_pretrained(tmp_path)
    assert_same_tensors(model, load(tmp_path))


def test_tied_embeddings_stay_tied(token_ids: Tensor, tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    quantize_model(model, None, config(token_ids), progress=False)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert_same_tensors(model, again)


def test_memory_footprint_is_the_bytes_of_the_tensors(checkpoint: Path, token_ids: Tensor) -> None:
    plain = load(checkpoint)
    model = load(checkpoint, quantization_config=config(token_ids))
    saved = sum(p.nbytes for n, p in plain.named_parameters() if "proj" in n)
    spent = sum(layer.weight_bytes for layer in quantized(model).values())
    difference = plain.get_memory_footprint() - model.get_memory_footprint()
    assert difference == saved - spent
    assert spent < saved / 3


def test_dequantize_gives_a_plain_model(
    checkpoint: Path, token_ids: Tensor, tmp_path: Path
) -> None:
    model = load(checkpoint, quantization_config=config(token_ids))
    logits = model(token_ids).logits
    model.save_pretrained(tmp_path / "quantized")
    plain = model.dequantize()
    assert not quantized(plain)
    assert type(plain.model.layers[0].mlp.up_proj) is nn.Linear
    torch.testing.assert_close(plain(token_ids).logits, logits, rtol=1e-4, atol=1e-4)
    plain.save_pretrained(tmp_path / "plain")
    again = load(tmp_path / "plain")
    assert not getattr(again, "is_quantized", False)
    assert_same_tensors(plain, again)
    while_loading = load(
        tmp_path / "quantized", quantization_config=SqueezeLLMConfig(dequantize=True)
    )
    assert_same_tensors(while_loading, plain)


def test_gradients_reach_the_embeddings(checkpoint: Path, token_ids: Tensor) -> None:
    model = load(checkpoint, quantization_config=config(token_ids))
    model.model.embed_tokens.weight.requires_grad_(True)
    model(input_ids=token_ids, labels=token_ids).loss.backward()
    reference = model.model.embed_tokens.weight.grad.clone()
    plain = model.dequantize()
    plain.zero_grad()
    plain(input_ids=token_ids, labels=token_ids).loss.backward()
    torch.testing.assert_close(
        plain.model.embed_tokens.weight.grad, reference, rtol=1e-3, atol=1e-5
    )


def test_to_another_dtype_keeps_the_tables(checkpoint: Path, token_ids: Tensor) -> None:
    model = load(checkpoint, quantization_config=config(token_ids))
    before = {name: layer.lookup_table.clone() for name, layer in quantized(model).items()}
    model.to(torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert all(layer.lookup_table.equal(before[name]) for name, layer in quantized(model).items())
    assert model(token_ids).logits.dtype == torch.bfloat16


def test_offload_to_disk(checkpoint: Path, token_ids: Tensor, tmp_path: Path) -> None:
    model = load(checkpoint, quantization_config=config(token_ids))
    model.save_pretrained(tmp_path / "quantized")
    parts = ["model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.norm", "lm_head"]
    devices = {"model.layers.1": "disk", **dict.fromkeys(parts, "cpu")}
    offloaded = load(tmp_path / "quantized", device_map=devices, offload_folder=tmp_path / "disk")
    assert offloaded.model.layers[1].mlp.up_proj.qweight.is_meta
    torch.testing.assert_close(offloaded(token_ids).logits, model(token_ids).logits)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, "balanced"])
def test_device_maps(checkpoint: Path, token_ids: Tensor, tmp_path: Path, device_map) -> None:
    if torch.accelerator.is_available():
        pytest.skip("compares placements on a CPU")
    model = load(checkpoint, quantization_config=config(token_ids), device_map=device_map)
    model.save_pretrained(tmp_path)
    assert_same_tensors(model, load(tmp_path, device_map=device_map))


def test_compiles_without_graph_break(checkpoint: Path, token_ids: Tensor) -> None:
    model = load(checkpoint, quantization_config=config(token_ids))
    assert model.hf_quantizer.is_compileable
    with torch.no_grad():
        expected = model(token_ids, use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True)
        actual = compiled(token_ids, use_cache=False).logits
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
