"""Two processes, each with a part of every layer, give what one process gives."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from squeezellm_hf import SqueezeLLMConfig, SqueezeLLMLinear, quantize_model
from tests.conftest import VOCABULARY, tiny_llama

WORKER = Path(__file__).with_name("tensor_parallel_worker.py")
PROCESSES = 2
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}


def llama() -> LlamaForCausalLM:
    """Its 75 hidden features make parts of 38 and 37: down_proj cannot be cut at words."""
    return tiny_llama(intermediate_size=75)


def qwen2() -> nn.Module:
    """With biases that matter, also where a sum of parts gets one (o_proj has none by itself)."""
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES))
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.normal_(module.bias)
    return model


def biased() -> LlamaForCausalLM:
    """Biases also in the layers whose outputs are summed."""
    model = tiny_llama(attention_bias=True, mlp_bias=True)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.normal_(module.bias)
    return model


def phi3() -> nn.Module:
    """Its fused layers are gathered before they are split."""
    return Phi3ForCausalLM(Phi3Config(**SIZES))


MODELS = {"Llama": llama, "Qwen2": qwen2, "Phi-3": phi3, "biased": biased}
CHANGES: dict[str, dict[str, object]] = {
    "Qwen2": {"overrides": {"layers.1.mlp.down_proj": {"skip": True}}},
    "Phi-3": {"outlier_fraction": 0.0, "sensitive_fraction": 0.0},
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, token_ids: Tensor) -> Path:
    directory = tmp_path_factory.mktemp("parallel")
    for name, make in MODELS.items():
        torch.manual_seed(0)
        changes = {"bits": 3, "outlier_fraction": 0.01, **CHANGES.get(name, {})}
        config = SqueezeLLMConfig(dataset=token_ids, n_samples=4, sequence_length=32, **changes)
        model = quantize_model(make().eval(), None, config, progress=False)
        model.save_pretrained(directory / name)
    damage(directory / "Llama", directory / "damaged.d")
    torch.save(token_ids, directory / "token_ids.pt")
    return directory


def damage(source: Path, target: Path) -> None:
    """Take the last word of each row from indices that cannot be cut while they are read."""
    shutil.copytree(source, target)
    file = target / "model.safetensors"
    tensors = load_file(file)
    key = "model.layers.1.mlp.down_proj.qweight"
    tensors[key] = tensors[key][:, :-1].contiguous()
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.fixture(
    scope="module",
    params=[
        "cpu",
        pytest.param(
            "cuda",
            marks=pytest.mark.skipif(
                torch.cuda.device_count() < PROCESSES, reason="needs a CUDA device for each process"
            ),
        ),
    ],
)
def parts(
    checkpoints: Path, checkpoint: Path, request: pytest.FixtureRequest
) -> list[dict[str, dict[str, object]]]:
    """What each process found."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if request.param == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(PROCESSES)]
    command += ["--master_port", "0", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    run = subprocess.run(
        [*command, str(WORKER), str(checkpoints), str(checkpoint)],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    return [torch.load(checkpoints / f"rank{rank}.pt") for rank in range(PROCESSES)]


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def whole(checkpoints: Path, name: str) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(checkpoints / name)


def layers(model: nn.Module) -> dict[str, SqueezeLLMLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, SqueezeLLMLinear)}


def test_same_logits_as_one_process(checkpoints: Path, parts: list, name: str, token_ids) -> None:
    with torch.no_grad():
        expected = whole(checkpoints, name)(token_ids).logits
    for part in parts:
        torch.testing.assert_close(part[name]["logits"], expected, atol=1e-4, rtol=1e-4)


def test_same_text_with_both_kinds_of_cache(
    checkpoints: Path, parts: list, name: str, token_ids
) -> None:
    expected = whole(checkpoints, name).generate(
        token_ids[:1, :8], max_new_tokens=8, do_sample=False
    )
    for part in parts:
        for text in part[name]["texts"]:
            assert text.equal(expected)


def test_compiles_without_a_graph_break(parts: list, name: str) -> None:
    for part in parts:
        assert part[name]["compiled"]


def test_same_gradient(checkpoints: Path, parts: list, name: str, token_ids) -> None:
    model = whole(checkpoints, name)
    embeddings = model.get_input_embeddings()(token_ids).detach().requires_grad_()
    model(inputs_embeds=embeddings).logits.square().mean().backward()
    scale = float(embeddings.grad.abs().max())
    for part in parts:
        torch.testing.assert_close(
            part[name]["gradient"], embeddings.grad, atol=1e-4 * scale, rtol=1e-3
        )


def test_each_process_holds_its_share(checkpoints: Path, parts: list, name: str) -> None:
    for layer_name, layer in layers(whole(checkpoints, name)).items():
        sizes = [part[name]["sizes"][layer_name] for part in parts]
        first, second = (rows * columns for rows, columns, _ in sizes)
        assert first + second == layer.out_features * layer.in_features
        assert 0 <= first - second <= max(layer.out_features, layer.in_features)
        assert sum(nnz for *_, nnz in sizes) == layer.nnz
        # Tables are needed whole where columns are cut.
        limit = 0.52 * layer.weight_bytes + layer.lookup_table.nbytes + 4 * layer.out_features + 64
        for part in parts:
            assert part[name]["bytes"][layer_name] <= limit


def test_a_sum_gets_its_bias_once(parts: list) -> None:
    for layer_name, first in parts[0]["biased"]["biases"].items():
        summed = layer_name.endswith(("o_proj", "down_proj"))
        assert first
        assert parts[1]["biased"]["biases"][layer_name] != summed


def test_what_needs_all_parts_says_so(parts: list, name: str) -> None:
    for part in parts:
        assert "holds a part of each layer" in part[name]["save"]
        assert "cannot be dequantized" in part[name]["dequantize"]
        adapter = part[name]["adapter"]
        assert adapter is None or "cannot have adapters" in adapter
        assert not any("squeezellm" in style for style in part[name]["plan"])


def test_what_cannot_be_is_refused(parts: list) -> None:
    for part in parts:
        refusals = part["refusals"]
        assert "q_proj.qweight was cut by a style" in refusals["plan"]
        assert "squeezellm_colwise" in refusals["plan"]
        assert "needs a model that is quantized already" in refusals["quantize"]
        assert "layers.1.mlp.down_proj.qweight must be int32" in refusals["damaged"]
        assert "dequantize=True cannot be used with tp_plan" in refusals["dequantize"]
