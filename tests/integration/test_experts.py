"""Mixtures of experts, and GPT-2's Conv1D: quantized, saved, loaded and run."""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from examples import moe as moe_example
from squeezellm_hf import SqueezeLLMConfig, SqueezeLLMLinear, quantize_model
from squeezellm_hf.integration.expand import expand, fold, structure
from squeezellm_hf.nn import Experts
from squeezellm_hf.pipeline import siblings
from tests.mixtures import EXPANDED, EXPERTS, MIXTURES, VOCABULARY, tiny

PROMPT = {"max_new_tokens": 12, "do_sample": False}

# Loads every checkpoint of a folder and writes down what it computes.
FRESH_PROCESS = """
import sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM
ids = torch.load(Path(sys.argv[1]) / "ids.pt")
for family in sys.argv[2:]:
    path = Path(sys.argv[1]) / family
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        found = model(ids).logits, model.generate(ids[:1, :8], max_new_tokens=12, do_sample=False)
    torch.save(found, path / "fresh.pt")
"""


def settings(token_ids: Tensor | None, **changes: Any) -> SqueezeLLMConfig:
    return SqueezeLLMConfig(
        **{"dataset": token_ids, "n_samples": 4, "sequence_length": 32, **changes}
    )


def load(path: Path, **kwargs: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, **kwargs)


def quantized(model: nn.Module) -> dict[str, SqueezeLLMLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, SqueezeLLMLinear)}


def experts_of(model: nn.Module) -> list[Experts]:
    return [module for module in model.modules() if isinstance(module, Experts)]


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, token_ids: Tensor) -> Path:
    """The quantized checkpoint of each family, and what a fresh process computes with it."""
    root = tmp_path_factory.mktemp("quantized")
    torch.save(token_ids, root / "ids.pt")
    for family in EXPANDED:
        tiny(family).save_pretrained(root / "original" / family)
        model = load(root / "original" / family, quantization_config=settings(token_ids))
        model.save_pretrained(root / family, max_shard_size="60KB")
        with torch.no_grad():
            found = model(token_ids).logits, model.generate(token_ids[:1, :8], **PROMPT)
        torch.save(found, root / family / "here.pt")
    command = [sys.executable, "-c", FRESH_PROCESS, str(root), *EXPANDED]
    subprocess.run(command, check=True, capture_output=True)
    return root


@pytest.mark.parametrize("family", EXPANDED)
def test_expansion_is_exact(family: str, token_ids: Tensor) -> None:
    model = tiny(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        expected = model(token_ids).logits
        with structure(model):
            shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
            assert shapes != {name: tensor.shape for name, tensor in before.items()}
        expand(model)
        assert {name: tensor.shape for name, tensor in model.state_dict().items()} == shapes
        assert relative_error(model(token_ids).logits, expected) < 1e-6
        fold(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(tensor.equal(before[name]) for name, tensor in after.items())


@pytest.mark.parametrize("family", EXPANDED)
def test_nearly_every_weight_of_the_blocks_is_quantized(family: str, folder: Path) -> None:
    original = tiny(family)
    head = sum(p.numel() for p in original.get_output_embeddings().parameters())
    table = sum(
        module.weight.numel()
        for module in original.modules()
        if isinstance(module, nn.Embedding)
        and module.weight is not original.get_output_embeddings().weight
    )
    blocks = sum(p.numel() for p in original.parameters()) - head - table
    layers = quantized(load(folder / family))
    assert sum(m.in_features * m.out_features for m in layers.values()) >= 0.95 * blocks


@pytest.mark.parametrize("family", EXPANDED)
def test_a_fresh_process_computes_the_same(family: str, folder: Path) -> None:
    assert len(list((folder / family).glob("*.safetensors"))) > 1
    logits, text = torch.load(folder / family / "here.pt")
    again, same_text = torch.load(folder / family / "fresh.pt")
    assert again.equal(logits)
    assert same_text.equal(text)


@pytest.mark.parametrize("family", EXPANDED)
def test_saved_twice_is_the_same(family: str, folder: Path, tmp_path: Path) -> None:
    model = load(folder / family)
    model.save_pretrained(tmp_path)
    ours, theirs = model.state_dict(), load(tmp_path).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(tensor.equal(theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("family", EXPANDED)
def test_dequantize_gives_the_first_layout_back(
    family: str, folder: Path, token_ids: Tensor, tmp_path: Path
) -> None:
    model = load(folder / family)
    plain = load(folder / family, quantization_config=SqueezeLLMConfig(dequantize=True))
    original = tiny(family)
    assert {n: t.shape for n, t in plain.state_dict().items()} == {
        n: t.shape for n, t in original.state_dict().items()
    }
    expand(plain)
    for name, layer in quantized(model).items():
        assert plain.get_submodule(name).weight.equal(layer.dequantize(torch.float32)), name
    fold(plain)
    with torch.no_grad():
        expected = model(token_ids).logits
        assert relative_error(plain(token_ids).logits, expected) < 1e-5
        plain.save_pretrained(tmp_path)
        assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
        assert relative_error(load(tmp_path)(token_ids).logits, expected) < 1e-5


def test_in_memory_gives_the_same(folder: Path, token_ids: Tensor) -> None:
    model = quantize_model(tiny("gpt_oss"), None, settings(token_ids), progress=False)
    with torch.no_grad():
        assert model(token_ids).logits.equal(torch.load(folder / "gpt_oss" / "here.pt")[0])


@pytest.mark.parametrize("family", EXPANDED)
def test_eight_bits_are_near_the_original(family: str, token_ids: Tensor) -> None:
    # In bf16, and with all rows of the batch choosing among the same experts.
    original = tiny(family, torch.bfloat16)
    with torch.no_grad():
        expected = original(token_ids).logits.float()
        model = quantize_model(original, None, settings(token_ids, bits=8), progress=False)
        found = model(token_ids).logits.float()
    assert model.dtype == torch.bfloat16
    # A router near a tie chooses another expert for a few tokens.
    errors = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert float(errors.median()) < 0.03


@pytest.mark.parametrize("family", MIXTURES)
def test_only_chosen_experts_run(family: str, folder: Path) -> None:
    model = load(folder / family)
    calls: list[str] = []
    for name, layer in quantized(model).items():
        if ".experts." in name:
            layer.register_forward_hook(lambda *_, name=name: calls.append(name))
    with torch.no_grad():
        model(torch.tensor([[5]]))
    chosen = 2 * len(experts_of(model))
    assert len(calls) == 2 * chosen  # two layers an expert
    assert len(set(calls)) == len(calls)


@pytest.mark.parametrize("family", EXPANDED)
def test_batch_with_padding(family: str, folder: Path, token_ids: Tensor) -> None:
    model = load(folder / family)
    short = token_ids[:1, :10]
    padding = torch.zeros(1, 6, dtype=torch.int64)
    batch = torch.cat([torch.cat([padding, short], dim=1), token_ids[1:2, :16]])
    mask = torch.ones_like(batch)
    mask[0, :6] = 0
    alone = model.generate(short, **PROMPT, pad_token_id=0)
    together = model.generate(batch, attention_mask=mask, **PROMPT, pad_token_id=0)
    length = alone.shape[1] - 10
    assert together[0, 16 : 16 + length].equal(alone[0, 10:])


def test_parts_can_stay_as_they_are(token_ids: Tensor, tmp_path: Path) -> None:
    tiny("qwen3_moe").save_pretrained(tmp_path / "original")
    some = {"layers.0.mlp.experts.3": {"skip": True}, "re:.*layers.1.*down_proj": {"skip": True}}
    model = load(tmp_path / "original", quantization_config=settings(token_ids, overrides=some))
    first, second = experts_of(model)
    assert type(first[3]["gate_up_proj"]) is nn.Linear
    assert type(second[5]["down_proj"]) is nn.Linear
    model.save_pretrained(tmp_path / "some")
    with torch.no_grad():
        expected = model(token_ids).logits
        assert load(tmp_path / "some")(token_ids).logits.equal(expected)
    # A block without any quantized expert keeps them fused.
    none = settings(token_ids, modules_to_not_convert=["layers.0.mlp.experts"])
    model = load(tmp_path / "original", quantization_config=none)
    assert len(experts_of(model)) == 1
    assert model.model.layers[0].mlp.experts.gate_up_proj.dim() == 3
    model.save_pretrained(tmp_path / "none")
    again = load(tmp_path / "none")
    assert len(experts_of(again)) == 1
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(tensor.equal(theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("codebook", ["kmeans", "lnq", "guided"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts_that_calibration_did_not_reach(family: str, codebook: str) -> None:
    ids = torch.full((1, 16), 5)  # the same token everywhere chooses the same two experts
    model = tiny(family)
    config = SqueezeLLMConfig(
        dataset=ids, n_samples=1, sequence_length=16, codebook=codebook, bits=6
    )
    with pytest.warns(UserWarning, match=r"of them not a single one.*experts"):
        quantize_model(model, None, config, progress=False)
    assert sum(".experts." in name for name in quantized(model)) == 2 * 2 * EXPERTS
    others = torch.randint(3, VOCABULARY, (4, 32), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        errors = relative_error(model(others).logits, tiny(family)(others).logits)
    assert errors < 0.5


def test_unreached_experts_are_quantized_with_the_fisher_sums_of_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ids = torch.full((1, 16), 5)
    results = []
    for enough in (siblings.ENOUGH_TOKENS, 0):
        monkeypatch.setattr(siblings, "ENOUGH_TOKENS", enough)
        config = SqueezeLLMConfig(dataset=ids, n_samples=1, sequence_length=16)
        model = tiny("olmoe")
        with pytest.warns(UserWarning, match="tokens"):
            quantize_model(model, None, config, progress=False)
        results.append(quantized(model))
    with_siblings, without = results
    differ = {n for n, layer in with_siblings.items()
              if not layer.dequantize().equal(without[n].dequantize())}  # fmt: skip
    assert len(differ) == 2 * 2 * (EXPERTS - 2)  # two layers in two blocks; two are reached
    assert all(".experts." in name for name in differ)


def test_an_error_leaves_the_model_as_it_was(token_ids: Tensor) -> None:
    model = tiny("gpt_oss")
    names = list(model.state_dict())
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[3, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"experts\.3\.down_proj"):
        quantize_model(model, None, settings(token_ids), progress=False)
    assert list(model.state_dict()) == names


def test_routers_stay_as_they_are(token_ids: Tensor) -> None:
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=4, moe_intermediate_size=32, num_experts=4,
        shared_expert_intermediate_size=64, num_experts_per_tok=2, decoder_sparse_step=1,
    )  # fmt: skip
    model = quantize_model(Qwen2MoeForCausalLM(config), None, settings(token_ids), progress=False)
    mlp = model.model.layers[0].mlp
    assert type(mlp.shared_expert_gate) is nn.Linear
    assert isinstance(mlp.shared_expert.gate_proj, SqueezeLLMLinear)
    assert not any(name.endswith(".gate") for name in quantized(model))


def test_compiled_and_with_a_static_cache(folder: Path, token_ids: Tensor) -> None:
    model = load(folder / "mixtral")
    assert not model.hf_quantizer.is_compileable  # the graph breaks at the experts
    assert load(folder / "gpt2").hf_quantizer.is_compileable
    prompt = token_ids[:1, :8]
    expected = model.generate(prompt, **PROMPT)
    assert model.generate(prompt, **PROMPT, cache_implementation="static").equal(expected)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(prompt).logits, model(prompt).logits)


def test_experts_of_another_layout_are_named(token_ids: Tensor) -> None:
    config = transformers.DbrxConfig(
        d_model=64, n_heads=4, n_layers=1, max_seq_len=64, vocab_size=VOCABULARY,
        ffn_config={"ffn_hidden_size": 32, "moe_num_experts": 2, "moe_top_k": 1},
        attn_config={"kv_n_heads": 2, "rope_theta": 10000.0},
    )  # fmt: skip
    model = transformers.DbrxForCausalLM(config)
    with pytest.warns(UserWarning, match=r"DbrxExpertGLU .*blocks\.0.* stay as they are"):
        quantize_model(model, None, settings(None, n_samples=1), progress=False)
    assert quantized(model)


def test_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    moe_example.main()
    printed = capsys.readouterr().out
    used, total = map(int, re.search(r"used (\d+) of (\d+) experts", printed).groups())
    assert total == 2 * 16
    assert 2 * 4 <= used < total


def test_expansion_copies_no_weight_that_it_can_view() -> None:
    model = tiny("mixtral")
    fused = model.model.layers[0].mlp.experts.down_proj
    expand(model)
    layer = model.model.layers[0].mlp.experts[3]["down_proj"]
    assert layer.weight.data_ptr() == fused[3].data_ptr()
    assert layer.weight.is_contiguous()


@pytest.mark.parametrize("family", ["gpt_oss", "gpt2"])
def test_a_resumed_run_ends_in_the_same(family: str, token_ids: Tensor, tmp_path: Path) -> None:
    config = {"work_dir": str(tmp_path), "codebook": "guided", "guided_groups": 2}
    short = token_ids[:1, :16]  # reaches some experts barely
    results = []
    for unfinished in ("", "layer-*attn*", "layer-*1*"):
        for path in list(tmp_path.glob(unfinished)) if unfinished else []:
            path.unlink()
        run = settings(short, n_samples=1, sequence_length=16, **config)
        model = quantize_model(tiny(family), None, run, progress=False)
        results.append(model.state_dict())
    for other in results[1:]:
        assert all(tensor.equal(results[0][name]) for name, tensor in other.items())


def test_parallel_plans_leave_expanded_experts_alone(folder: Path) -> None:
    # They would cut parameters that are not there, and add up what each process has in full.
    assert any(".experts" in rule for rule in tiny("mixtral")._tp_plan)
    plan = load(folder / "mixtral")._tp_plan
    assert not any(".experts" in rule for rule in plan)
    assert any(".q_proj" in rule for rule in plan)
    assert any(".experts" in rule for rule in tiny("mixtral")._tp_plan)


@pytest.mark.parametrize("family", ["gpt_oss", "gpt2"])
def test_tables_are_distilled(family: str, token_ids: Tensor) -> None:
    texts = token_ids.repeat(4, 1)
    config = settings(
        token_ids, preset="fast", bits=3, distill_steps=4, distill_batch_size=4,
        distill_sequence_length=32, distill_dataset=texts,
    )  # fmt: skip
    quantize_model(tiny(family), None, config, progress=False)
    assert config.distilled is not None
    assert config.distilled["divergence_after"] < config.distilled["divergence_before"]


@pytest.mark.parametrize("change", [{"nnz": 0}, None])
def test_no_part_of_an_expert_is_passed_by(folder: Path, tmp_path: Path, change: Any) -> None:
    """Whatever name the tensors have in the files of this family."""
    damaged = tmp_path / "damaged"
    shutil.copytree(folder / "mixtral", damaged)
    config = json.loads((damaged / "config.json").read_text())
    modules = config["quantization_config"]["modules"]
    name = next(name for name, record in modules.items() if ".experts." in name and record["nnz"])
    modules[name] = modules.pop(name) | (change or {})
    if change is None:
        del modules[name]
    (damaged / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"of \d+ layers, but|in the checkpoint, but"):
        load(damaged)
