"""Device maps and offload: wherever the tensors lie, the model gives the same."""

from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, dispatch_model, infer_auto_device_map
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from squeezellm_hf import SqueezeLLMConfig, SqueezeLLMLinear, quantize_model
from tests.conftest import BLOCKS, LINEARS_PER_BLOCK, tiny_llama

OUTSIDE = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
MAPS: dict[str, dict[str, str]] = {
    "one block on the disk": OUTSIDE
    | {"model.layers.0": "cpu", "model.layers.1": "disk", "lm_head": "cpu"},
    "all on the disk": {"": "disk"},
    "a module's layers apart": OUTSIDE
    | {"model.layers.0": "disk", "lm_head": "disk"}
    | {
        f"model.layers.1.{part}": "disk" if part == "mlp.down_proj" else "cpu"
        for part in (
            "self_attn",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
            "mlp.act_fn",
            "input_layernorm",
            "post_attention_layernorm",
        )
    },
}


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory, token_ids: Tensor) -> Path:
    """Sparse, with biases, in several files."""
    path = tmp_path_factory.mktemp("offload") / "quantized"
    config = SqueezeLLMConfig(
        bits=3, outlier_fraction=0.01, dataset=token_ids, n_samples=4, sequence_length=32
    )
    model = quantize_model(tiny_llama(attention_bias=True), None, config, progress=False)
    model.save_pretrained(path, max_shard_size="40KB")
    return path


@pytest.fixture(scope="module")
def expected(quantized: Path, token_ids: Tensor) -> Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(quantized), token_ids)


@torch.no_grad()
def logits(model: nn.Module, token_ids: Tensor) -> Tensor:
    return model(token_ids).logits


def on_meta(model: nn.Module) -> set[str]:
    """The quantized layers whose tensors are elsewhere between two calls."""
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, SqueezeLLMLinear)
        and all(tensor.is_meta for tensor in module.parameters())
    }


@pytest.mark.parametrize("name", MAPS)
def test_disk_offload(
    quantized: Path, expected: Tensor, token_ids: Tensor, tmp_path: Path, name: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        quantized, device_map=MAPS[name], offload_folder=tmp_path
    )
    away = on_meta(model)
    targets = {key: target for key, target in MAPS[name].items() if target == "disk"}
    assert away == {
        layer
        for layer in dict(model.named_modules())
        if isinstance(model.get_submodule(layer), SqueezeLLMLinear)
        and any(layer.startswith(key) for key in targets)
    }
    assert away
    assert not any(tmp_path.iterdir())  # the checkpoint itself is what lies on the disk
    for _ in range(2):  # what a call has fetched, it gives back
        assert logits(model, token_ids).equal(expected)
        assert on_meta(model) == away
    text = model.generate(token_ids[:1, :8], max_new_tokens=8, do_sample=False)
    plain = AutoModelForCausalLM.from_pretrained(quantized)
    assert text.equal(plain.generate(token_ids[:1, :8], max_new_tokens=8, do_sample=False))


def test_a_gradient_passes_through_offloaded_layers(
    quantized: Path, token_ids: Tensor, tmp_path: Path
) -> None:
    """Accelerate takes the tensors away after the forward pass; the backward pass has its own."""
    gradients = []
    for device_map in (None, {"": "disk"}):
        model = AutoModelForCausalLM.from_pretrained(
            quantized, device_map=device_map, offload_folder=tmp_path
        )
        inputs = torch.ones(1, 8, model.config.hidden_size, requires_grad=True)
        model(inputs_embeds=inputs).logits.square().sum().backward()
        gradients.append(inputs.grad)
    assert gradients[0].abs().max() > 0
    assert gradients[1].equal(gradients[0])


def test_auto_keeps_all_in_memory_that_fits(quantized: Path, expected: Tensor, token_ids) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        quantized, device_map="auto", max_memory={"cpu": 2**30}
    )
    assert not on_meta(model)
    assert logits(model, token_ids).equal(expected)


def test_auto_offloads_what_does_not_fit(
    quantized: Path, expected: Tensor, token_ids: Tensor, tmp_path: Path
) -> None:
    """The sizes that decide are those of the packed tensors, not of what they stand for."""
    plain = AutoModelForCausalLM.from_pretrained(quantized)
    total = sum(tensor.nbytes for tensor in plain.parameters())
    block = sum(tensor.nbytes for tensor in plain.model.layers[1].parameters())
    assert 4 * block < sum(m.in_features * m.out_features * 4 for m in quantized_layers(plain))
    memory = {"cpu": 2 * total}
    assert set(device_map(plain, memory).values()) == {"cpu"}
    model = AutoModelForCausalLM.from_pretrained(
        quantized, device_map="auto", max_memory={"cpu": block // 2}, offload_folder=tmp_path
    )
    assert len(on_meta(model)) == BLOCKS * LINEARS_PER_BLOCK
    assert logits(model, token_ids).equal(expected)


def device_map(model: nn.Module, memory: dict[str, int]) -> dict[str, str]:
    return infer_auto_device_map(
        model, max_memory=memory, no_split_module_classes=model._no_split_modules
    )


def quantized_layers(model: nn.Module) -> list[SqueezeLLMLinear]:
    return [module for module in model.modules() if isinstance(module, SqueezeLLMLinear)]


def test_offload_to_memory(quantized: Path, expected: Tensor, token_ids: Tensor) -> None:
    """The hooks that offload to memory, with the CPU in the place of a GPU."""
    model = cpu_offload(AutoModelForCausalLM.from_pretrained(quantized), torch.device("cpu"))
    assert len(on_meta(model)) == BLOCKS * LINEARS_PER_BLOCK
    for _ in range(2):
        assert logits(model, token_ids).equal(expected)


def test_dispatched_after_loading(
    quantized: Path, expected: Tensor, token_ids: Tensor, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(quantized)
    dispatch_model(model, MAPS["one block on the disk"], offload_dir=tmp_path)
    assert len(on_meta(model)) == LINEARS_PER_BLOCK
    assert logits(model, token_ids).equal(expected)


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("shard_size", ["50GB", "40KB"])
def test_an_offloaded_model_is_saved_whole(
    quantized: Path, tmp_path: Path, name: str, shard_size: str
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(quantized)
    model = AutoModelForCausalLM.from_pretrained(
        quantized, device_map=MAPS[name], offload_folder=tmp_path / "offload"
    )
    model.save_pretrained(tmp_path / "again", max_shard_size=shard_size)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").state_dict()
    state = plain.state_dict()
    assert again.keys() == state.keys()
    assert all(again[key].equal(state[key]) for key in state)


def test_an_offloaded_model_is_not_dequantized(quantized: Path, tmp_path: Path) -> None:
    arguments = {"device_map": MAPS["one block on the disk"], "offload_folder": tmp_path}
    model = AutoModelForCausalLM.from_pretrained(quantized, **arguments)
    with pytest.raises(ValueError, match=r"model\.layers\.1\..* is offloaded"):
        model.dequantize()
    assert len(quantized_layers(model)) == BLOCKS * LINEARS_PER_BLOCK
    with pytest.raises(ValueError, match="without offload"):
        AutoModelForCausalLM.from_pretrained(
            quantized, **arguments, quantization_config=SqueezeLLMConfig(dequantize=True)
        )


def test_quantizing_to_disk_is_refused(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="device_map names 'disk'"):
        AutoModelForCausalLM.from_pretrained(
            checkpoint,
            device_map={"": "disk"},
            quantization_config=SqueezeLLMConfig(dataset=None),
        )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("elsewhere", ["cpu", "disk"])
def test_offload_beside_a_gpu(
    quantized: Path, token_ids: Tensor, tmp_path: Path, elsewhere: str
) -> None:
    """A block that lies elsewhere is computed on the GPU, as all others."""
    ids = token_ids.to("cuda")
    expected = logits(AutoModelForCausalLM.from_pretrained(quantized, device_map="cuda"), ids)
    device_map = dict.fromkeys(OUTSIDE, 0) | {"lm_head": 0}
    device_map |= {"model.layers.0": 0, "model.layers.1": elsewhere}
    model = AutoModelForCausalLM.from_pretrained(
        quantized, device_map=device_map, offload_folder=tmp_path
    )
    assert len(on_meta(model)) == LINEARS_PER_BLOCK
    for _ in range(2):
        assert logits(model, ids).equal(expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus(quantized: Path, token_ids: Tensor) -> None:
    ids = token_ids.to("cuda:0")
    expected = logits(AutoModelForCausalLM.from_pretrained(quantized, device_map="cuda:0"), ids)
    device_map = dict.fromkeys(OUTSIDE, 0) | {"lm_head": 1}
    device_map |= {"model.layers.0": 0, "model.layers.1": 1}
    model = AutoModelForCausalLM.from_pretrained(quantized, device_map=device_map)
    devices = {layer.qweight.device.index for layer in quantized_layers(model)}
    assert devices == {0, 1}
    assert logits(model, ids).to("cuda:0").equal(expected)
