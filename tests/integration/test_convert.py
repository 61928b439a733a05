"""Checkpoints of the public SqueezeLLM code, converted and loaded, against a dense model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from squeezellm_hf.integration.convert import Conversion, convert_checkpoint
from squeezellm_hf.nn import SqueezeLLMLinear
from tests.conftest import VOCABULARY, tiny_llama
from tests.legacy_writer import Checkpoint, random_layer

HEAD = "lm_head"


def legacy_checkpoint(model: Any, bits: int, **options: Any) -> Checkpoint:
    """Random layers for the linear layers of ``model``, which gets their weights in fp32."""
    rng = np.random.default_rng(bits)
    result = Checkpoint()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != HEAD:
            bias = module.bias is not None
            layer = random_layer(
                rng, module.out_features, module.in_features, bits, bias=bias, **options
            )
            result.layers[name] = layer
            with torch.no_grad():
                module.weight.copy_(torch.from_numpy(layer.weight()))
                if layer.bias is not None:
                    module.bias.copy_(torch.tensor(layer.bias))
    quantized = tuple(f"{name}." for name in result.layers)
    result.others = {
        key: tensor.detach().clone()
        for key, tensor in model.state_dict().items()
        if not key.startswith(quantized)
    }
    return result


def logits(model: Any, token_ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(token_ids).logits


def assert_same_model(folder: Path, dense: Any, token_ids: Tensor) -> None:
    """The checkpoint loads, each weight is exact, and the logits are those of the dense model."""
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    layers = {n: m for n, m in loaded.named_modules() if isinstance(m, SqueezeLLMLinear)}
    linears = {n: m for n, m in dense.named_modules() if isinstance(m, torch.nn.Linear)}
    assert set(layers) == set(linears) - {HEAD}
    for name, layer in layers.items():
        assert layer.dequantize(torch.float32).equal(linears[name].weight), name
        assert (layer.bias is None) == (linears[name].bias is None)
        assert layer.bias is None or layer.bias.equal(linears[name].bias)
    expected = logits(dense, token_ids)
    assert (logits(loaded, token_ids) - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize(
    ("bits", "options"),
    [
        (4, {}),
        (3, {"sparse": True}),
        (4, {"sparse": True, "full_rows": 2}),
        (3, {"full_rows": 1, "half": False}),
        (4, {"sparse": True, "half": False}),
    ],
)
def test_llama(bits: int, options: Any, tmp_path: Path, token_ids: Tensor) -> None:
    dense = tiny_llama()
    checkpoint = legacy_checkpoint(dense, bits, **options)
    dense.config.save_pretrained(tmp_path / "in")
    path = checkpoint.save(tmp_path / "in" / f"sq-tiny-w{bits}.pt")
    (tmp_path / "in" / "quant_config.json").write_text(json.dumps({"wbits": bits}))
    seen: list[tuple[str, int, int]] = []

    conversion = convert_checkpoint(
        tmp_path / "in", tmp_path / "out", progress=lambda *step: seen.append(step)
    )

    assert (conversion.errors, conversion.from_base) == ({}, ())
    assert [number for _, number, _ in seen] == list(range(14))
    assert {total for _, _, total in seen} == {14}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]  # no temporary files
    assert_same_model(tmp_path / "out", dense, token_ids)
    record = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (record["bits"], record["converted_from"]) == (bits, path.name)
    expected = {"float16" if options.get("half", True) else "float32"}
    assert {module["table_dtype"] for module in record["modules"].values()} == expected
    assert f"not known; converted from {path.name}" in (tmp_path / "out/README.md").read_text()


def test_shards(tmp_path: Path, token_ids: Tensor) -> None:
    dense = tiny_llama()
    checkpoint = legacy_checkpoint(dense, 4, sparse=True)
    dense.config.save_pretrained(tmp_path)
    path = checkpoint.save(tmp_path / "tiny.pt")
    convert_checkpoint(path, tmp_path / "out", max_shard_size="40KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert_same_model(tmp_path / "out", dense, token_ids)


def test_the_converted_model_in_memory_and_saved_again(tmp_path: Path, token_ids: Tensor) -> None:
    dense = tiny_llama()
    checkpoint = legacy_checkpoint(dense, 3, sparse=True)
    dense.config.save_pretrained(tmp_path)
    convert_checkpoint(checkpoint.save(tmp_path / "tiny.pt"), tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    loaded.save_pretrained(tmp_path / "again")
    assert_same_model(tmp_path / "again", dense, token_ids)
    first, second = (tmp_path / name / "model.safetensors" for name in ("out", "again"))
    assert first.read_bytes() == second.read_bytes()


def from_base(tmp_path: Path, dense: LlamaForCausalLM, **options: Any) -> Conversion:
    """Convert a file without embeddings, norms and head; the base model has other linear layers."""
    base = tmp_path / "base"
    dense.save_pretrained(base)
    checkpoint = legacy_checkpoint(dense, 4, sparse=True)
    checkpoint.others = {}
    path = checkpoint.save(tmp_path / "tiny.pt")
    return convert_checkpoint(path, tmp_path / "out", base_model=str(base), **options)


@pytest.mark.parametrize("tied", [False, True])
def test_what_the_file_lacks_comes_from_the_base_model(
    tied: bool, tmp_path: Path, token_ids: Tensor
) -> None:
    dense = tiny_llama(tie_word_embeddings=tied)
    conversion = from_base(tmp_path, dense)
    assert len(conversion.from_base) == 6 + (not tied)
    assert "model.embed_tokens.weight" in conversion.from_base
    assert_same_model(tmp_path / "out", dense, token_ids)


def test_dtypes(tmp_path: Path, token_ids: Tensor) -> None:
    dense = tiny_llama(attention_bias=True, dtype="float16").half()
    from_base(tmp_path, dense)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.float16
    assert loaded.model.layers[0].self_attn.q_proj.bias.dtype == torch.float16
    assert logits(loaded, token_ids).dtype == torch.float16
    convert_checkpoint(
        tmp_path / "tiny.pt",
        tmp_path / "bf16",
        base_model=str(tmp_path / "base"),
        dtype=torch.bfloat16,
        table_dtype=torch.bfloat16,
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "bf16")
    assert {t.dtype for t in loaded.parameters() if t.is_floating_point()} == {torch.bfloat16}


def test_rounded_tables_tell_their_error(tmp_path: Path, token_ids: Tensor) -> None:
    dense = tiny_llama()
    checkpoint = legacy_checkpoint(dense, 3, sparse=True, half=False)
    dense.config.save_pretrained(tmp_path)
    path = checkpoint.save(tmp_path / "tiny.pt")
    conversion = convert_checkpoint(path, tmp_path / "out", table_dtype=torch.float16)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert set(conversion.errors) == set(checkpoint.layers)
    for name, error in conversion.errors.items():
        got = loaded.get_submodule(name).dequantize(torch.float32).double().numpy()
        difference = np.abs(got - checkpoint.layers[name].weight()).max()
        assert difference == pytest.approx(error, rel=1e-6)


def test_opt_with_tied_embeddings_and_obsolete_entries(tmp_path: Path, token_ids: Tensor) -> None:
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        ffn_dim=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=64,
    )
    dense = OPTForCausalLM(config).eval()
    checkpoint = legacy_checkpoint(dense, 3, sparse=True)
    assert "lm_head.weight" in checkpoint.others
    checkpoint.others["model.decoder.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    dense.config.save_pretrained(tmp_path)
    convert_checkpoint(checkpoint.save(tmp_path / "opt.pt"), tmp_path / "out")
    assert_same_model(tmp_path / "out", dense, token_ids)


def test_tensors_that_share_memory_or_are_transposed(tmp_path: Path, token_ids: Tensor) -> None:
    """As of a model whose head was tied when it was saved; its config.json says otherwise."""
    dense = tiny_llama()
    with torch.no_grad():
        dense.lm_head.weight.copy_(dense.model.embed_tokens.weight)
    checkpoint = legacy_checkpoint(dense, 4)
    embedding = checkpoint.others["model.embed_tokens.weight"].T.contiguous().T
    checkpoint.others["model.embed_tokens.weight"] = embedding
    checkpoint.others["lm_head.weight"] = embedding
    dense.config.save_pretrained(tmp_path)
    convert_checkpoint(checkpoint.save(tmp_path / "tiny.pt"), tmp_path / "out")
    assert_same_model(tmp_path / "out", dense, token_ids)


def test_a_file_of_old_torch(tmp_path: Path, token_ids: Tensor) -> None:
    """Before torch 1.6 a file was no zip, and cannot be mapped."""
    dense = tiny_llama()
    checkpoint = legacy_checkpoint(dense, 4)
    dense.config.save_pretrained(tmp_path)
    path = tmp_path / "tiny.pt"
    torch.save(checkpoint.state_dict(), path, _use_new_zipfile_serialization=False)
    convert_checkpoint(path, tmp_path / "out")
    assert_same_model(tmp_path / "out", dense, token_ids)
