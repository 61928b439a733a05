"""LoRA on a quantized model through PEFT and Trainer, on a tiny Llama."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from squeezellm_hf import SqueezeLLMConfig, SqueezeLLMLinear, quantize_model
from tests.conftest import BLOCKS, LINEARS_PER_BLOCK, tiny_llama

peft = pytest.importorskip("peft")
from examples import lora as lora_example  # noqa: E402
from squeezellm_hf.integration.peft import SqueezeLLMLoraLinear  # noqa: E402

DTYPES = (torch.float32, torch.bfloat16)
EVERY_LAYER = BLOCKS * LINEARS_PER_BLOCK
# A logit of the tiny Llama is a sum of 64 products; bf16 has 8 bits.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("peft") / "quantized"
    config = SqueezeLLMConfig(bits=3, dataset=None, overrides={"re:.*k_proj": {"bits": 4}})
    quantize_model(tiny_llama(attention_bias=True), None, config, progress=False).save_pretrained(
        path
    )
    return path


@pytest.fixture
def quantized(repository: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(repository)


def lora(**changes: object) -> Any:
    fields = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **changes}
    return peft.LoraConfig(**fields)


def with_adapter(model: Any, adapter: str = "default", seed: int = 0, **changes: object) -> Any:
    """``model`` with an adapter that changes its output: PEFT begins with B = 0."""
    torch.manual_seed(seed)
    wrapped = peft.get_peft_model(model, lora(**changes), adapter_name=adapter)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if f"lora_B.{adapter}" in name:
                parameter.normal_(0, 0.05)
    return wrapped.eval()


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def adapted(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, SqueezeLLMLoraLinear)]


def assert_close(actual: Tensor, expected: Tensor) -> None:
    error = (actual - expected).float().norm() / expected.float().norm()
    assert error < TOLERANCE[expected.dtype]


@pytest.mark.parametrize(
    ("target_modules", "count"),
    [
        ("all-linear", EVERY_LAYER),
        (["q_proj", "down_proj"], 2 * BLOCKS),
        (r".*\.0\.mlp\..*_proj", 3),
    ],
)
def test_adapters_attach(quantized: Any, target_modules: Any, count: int) -> None:
    model = peft.get_peft_model(quantized, lora(target_modules=target_modules))
    assert len(adapted(model)) == count
    assert type(model.get_base_model().lm_head) is nn.Linear
    layers = [m for m in model.modules() if isinstance(m, SqueezeLLMLinear)]
    assert len(layers) == EVERY_LAYER
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 2 * count
    assert all(".lora_A." in name or ".lora_B." in name for name in trainable)


def test_all_linear_means_plain_layers_too_and_never_the_head(token_ids: Tensor) -> None:
    config = SqueezeLLMConfig(dataset=None, modules_to_not_convert=["q_proj"])
    model = quantize_model(tiny_llama(), None, config, progress=False)
    model = with_adapter(model)
    model.add_adapter("second", lora())
    for adapter in ("default", "second"):
        targets = model.peft_config[adapter].target_modules
        assert len(targets) == EVERY_LAYER, adapter
        assert "lm_head" not in targets
    assert len(adapted(model)) == EVERY_LAYER - BLOCKS
    assert logits(model, token_ids).isfinite().all()


def test_models_that_are_not_quantized_are_left_to_peft() -> None:
    model = peft.get_peft_model(tiny_llama(), lora())
    assert len(model.peft_config["default"].target_modules) == EVERY_LAYER
    assert not adapted(model)
    assert type(model.merge_and_unload().model.layers[0].mlp.up_proj) is nn.Linear
    model = peft.prepare_model_for_kbit_training(tiny_llama().bfloat16())
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_the_output_is_base_plus_low_rank(quantized: Any, token_ids: Tensor) -> None:
    """One layer against its definition in fp64."""
    model = with_adapter(quantized, lora_alpha=6, use_rslora=True)
    layer = model.get_submodule(adapted(model)[0])
    base = layer.base_layer
    x = torch.randn(3, base.in_features, generator=torch.Generator().manual_seed(2))
    weight = base.dequantize(torch.float32).double()
    down, up = (m["default"].weight.double() for m in (layer.lora_A, layer.lora_B))
    expected = x.double() @ (weight + 6 / 4**0.5 * up @ down).T + base.bias.double()
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_disabled_it_is_the_base(repository: Path, token_ids: Tensor, dtype: torch.dtype) -> None:
    model = AutoModelForCausalLM.from_pretrained(repository, dtype=dtype)
    before = logits(model, token_ids)
    model = with_adapter(model)
    assert not logits(model, token_ids).equal(before)
    with model.disable_adapter():
        assert logits(model, token_ids).equal(before)
    assert model.unload() is model.base_model.model
    assert logits(model.base_model.model, token_ids).equal(before)
    assert model.base_model.model.is_quantized


def train(model: Any, ids: Tensor, steps: int = 10) -> list[float]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


@pytest.mark.parametrize("dtype", DTYPES)
def test_training_changes_the_adapter_alone(
    repository: Path, token_ids: Tensor, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(repository, dtype=dtype)
    model = peft.get_peft_model(model, lora(lora_dropout=0.05))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    losses = train(model, token_ids)
    assert losses[-1] < 0.8 * losses[0]
    for name, tensor in model.state_dict().items():
        assert tensor.equal(before[name]) != (".lora_" in name), name


RELOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
from peft import AutoPeftModelForCausalLM, PeftModel
base, adapter, ids = sys.argv[1], sys.argv[2], torch.load(sys.argv[3])
models = (
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter),
    AutoPeftModelForCausalLM.from_pretrained(adapter),
    AutoModelForCausalLM.from_pretrained(adapter),
)
with torch.no_grad():
    torch.save([model(ids, use_cache=False).logits for model in models], sys.argv[4])
"""


def test_reload_in_a_fresh_process(
    repository: Path, quantized: Any, token_ids: Tensor, tmp_path: Path
) -> None:
    """Through each of the three doors, and without a word about squeezellm_hf."""
    model = peft.get_peft_model(quantized, lora())
    train(model, token_ids, steps=2)
    model.save_pretrained(tmp_path / "adapter")
    files = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    torch.save(token_ids, tmp_path / "ids.pt")
    names = (repository, tmp_path / "adapter", tmp_path / "ids.pt", tmp_path / "logits.pt")
    subprocess.run(
        [sys.executable, "-c", RELOAD, *map(str, names)], check=True, cwd=tmp_path, env=os.environ
    )
    expected = logits(model, token_ids)
    for actual in torch.load(tmp_path / "logits.pt"):
        assert actual.equal(expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merge_gives_a_plain_model(
    repository: Path, token_ids: Tensor, tmp_path: Path, dtype: torch.dtype, safe_merge: bool
) -> None:
    model = AutoModelForCausalLM.from_pretrained(repository, dtype=dtype)
    model = with_adapter(model, lora_bias=False)
    expected = logits(model, token_ids)
    merged = model.merge_and_unload(safe_merge=safe_merge)
    assert not any(isinstance(m, SqueezeLLMLinear) for m in merged.modules())
    assert {p.dtype for p in merged.parameters()} == {dtype}
    assert_close(logits(merged, token_ids), expected)
    assert not merged.is_quantized
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not hasattr(again.config, "quantization_config")
    assert logits(again, token_ids).equal(logits(merged, token_ids))
    merged.to(torch.float64)  # refused for quantized models


def test_merge_of_some_layers_leaves_the_others_quantized(
    quantized: Any, token_ids: Tensor, tmp_path: Path
) -> None:
    model = with_adapter(quantized, target_modules=["q_proj"], bias="none")
    expected = logits(model, token_ids)
    merged = model.merge_and_unload()
    assert merged.is_quantized
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    for each in (merged, again):
        assert type(each.model.layers[0].self_attn.q_proj) is nn.Linear
        count = sum(isinstance(m, SqueezeLLMLinear) for m in each.modules())
        assert count == EVERY_LAYER - BLOCKS
        assert_close(logits(each, token_ids), expected)


def test_several_adapters(quantized: Any, token_ids: Tensor) -> None:
    base = logits(quantized, token_ids)
    model = with_adapter(quantized, "first", seed=1)
    first = logits(model, token_ids)
    model.add_adapter("second", lora(r=2, lora_bias=True, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B.second" in name:
                parameter.normal_(0, 0.05)
    assert logits(model, token_ids).equal(first)
    model.set_adapter("second")
    second = logits(model, token_ids)
    names = ["__base__", "first", "second", "first"]
    with torch.no_grad():
        mixed = model(input_ids=token_ids, adapter_names=names, use_cache=False).logits
    for row, expected in zip(mixed, (base[0], first[1], second[2], first[3]), strict=True):
        assert_close(row, expected)
    merged = model.merge_and_unload(adapter_names=["second"])
    assert_close(logits(merged, token_ids), second)
    quantized_layers = sum(isinstance(m, SqueezeLLMLinear) for m in merged.modules())
    assert quantized_layers == EVERY_LAYER - 2 * BLOCKS


def test_a_quantized_weight_refuses_a_merge(quantized: Any, token_ids: Tensor) -> None:
    model = with_adapter(quantized)
    before = logits(model, token_ids)
    with pytest.raises(ValueError, match=r"merge_and_unload\(\)"):
        model.merge_adapter()
    assert logits(model, token_ids).equal(before)


def test_a_merge_that_cannot_be_is_refused(token_ids: Tensor) -> None:
    config = SqueezeLLMConfig(dataset=None)
    without_bias = quantize_model(tiny_llama(), None, config, progress=False)
    with pytest.warns(UserWarning, match="has no bias"):
        model = with_adapter(without_bias, lora_bias=True)
    with pytest.raises(ValueError, match="lora_bias=True on a layer without bias"):
        model.merge_and_unload()


def test_a_broken_adapter_is_found_by_a_safe_merge(quantized: Any) -> None:
    model = with_adapter(quantized)
    layer = model.get_submodule(adapted(model)[3])
    with torch.no_grad():
        layer.lora_B["default"].weight[1, 2] = torch.nan
    with pytest.raises(ValueError, match="'default' gives values that are not finite"):
        model.merge_and_unload(safe_merge=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora=True is not supported on SqueezeLLM layers"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' is not supported"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora' is not supported"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        (
            {"target_modules": [], "target_parameters": ["mlp.up_proj.lookup_table"]},
            "name the layer in target_modules",
        ),
    ],
)
def test_variants_are_refused(quantized: Any, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        peft.get_peft_model(quantized, lora(**changes))


@pytest.mark.parametrize(
    "config",
    [
        peft.LoHaConfig(target_modules="all-linear"),
        peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10),
    ],
    ids=lambda config: str(config.peft_type),
)
def test_other_tuners_are_refused(quantized: Any, config: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"SqueezeLLMLinear.* (is )?not supported"):
        peft.get_peft_model(quantized, config)


def test_after_dequantize_all_is_possible(quantized: Any, token_ids: Tensor) -> None:
    model = peft.get_peft_model(quantized.dequantize(), lora(use_dora=True))
    losses = train(model, token_ids)
    assert losses[-1] < 0.8 * losses[0]


def arguments(path: Path, **changes: object) -> TrainingArguments:
    fields = {
        "output_dir": str(path),
        "max_steps": 8,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_steps": 4,
    }
    return TrainingArguments(**{**fields, **changes})


def examples(ids: Tensor) -> list[dict[str, Tensor]]:
    return [{"input_ids": row, "labels": row} for row in ids]


def test_trainer(repository: Path, quantized: Any, token_ids: Tensor, tmp_path: Path) -> None:
    """It trains, goes on from a checkpoint, and refuses a quantized model without adapters."""
    data = examples(token_ids)
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(model=quantized, args=arguments(tmp_path), train_dataset=data)
    model = peft.get_peft_model(quantized, lora())
    trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]

    again = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(repository), lora())
    trainer = Trainer(model=again, args=arguments(tmp_path), train_dataset=data)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_close(logits(again.eval(), token_ids), logits(model.eval(), token_ids))


@pytest.mark.parametrize("dtype", DTYPES)
def test_trainer_with_autocast(
    repository: Path, token_ids: Tensor, tmp_path: Path, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(repository, dtype=dtype)
    settings = arguments(tmp_path, bf16=True, save_strategy="no")
    trainer = Trainer(
        model=peft.get_peft_model(model, lora()),
        args=settings,
        train_dataset=examples(token_ids),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_trainer_with_gradient_checkpointing(
    repository: Path, token_ids: Tensor, tmp_path: Path, use_reentrant: bool
) -> None:
    losses = []
    for changes in (
        {},
        {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant},
        },
    ):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(repository)
        model = peft.get_peft_model(model, lora())
        settings = arguments(tmp_path, max_steps=3, save_strategy="no", **changes)
        trainer = Trainer(model=model, args=settings, train_dataset=examples(token_ids))
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0][-1] < losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(
    repository: Path, token_ids: Tensor, use_reentrant: bool, dtype: torch.dtype
) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = AutoModelForCausalLM.from_pretrained(repository, dtype=dtype)
        kept = {name: (p.dtype, p.clone()) for name, p in model.named_parameters()}
        model = peft.prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": use_reentrant},
        )
        assert model.is_gradient_checkpointing == checkpointing
        for name, parameter in model.named_parameters():
            assert not parameter.requires_grad
            assert parameter.dtype == kept[name][0]
            assert parameter.equal(kept[name][1])
        model = with_adapter(model).train()
        model(input_ids=token_ids, labels=token_ids, use_cache=False).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    plain, checkpointed = gradients
    assert len(plain) == 2 * EVERY_LAYER
    for name, gradient in plain.items():
        assert gradient.norm() > 0
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-5, atol=1e-6)


def test_adapters_of_transformers_itself(
    repository: Path, quantized: Any, token_ids: Tensor, tmp_path: Path
) -> None:
    """``add_adapter`` and ``save_pretrained`` write an adapter, and nothing over the base."""
    quantized.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    quantized.add_adapter(lora())
    train(quantized, token_ids, steps=2)
    quantized.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert (tmp_path / "model.safetensors").read_bytes() == before
    again = AutoModelForCausalLM.from_pretrained(repository)
    again.load_adapter(str(tmp_path))
    assert logits(again, token_ids).equal(logits(quantized, token_ids))


def test_example(
    repository: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def tokenize(text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % 128 for letter in text]}

    monkeypatch.setattr(lora_example.AutoTokenizer, "from_pretrained", lambda _: tokenize)
    options = "--steps 10 --sequence-length 64 --lr 1e-2"
    lora_example.main([str(repository), str(tmp_path / "adapter"), *options.split()])
    printed = re.findall(r"^(held-out|reloaded).*: +([\d.]+)$", capsys.readouterr().out, re.M)
    before, after, reloaded = [float(loss) for _, loss in printed]
    assert after < 0.9 * before
    assert reloaded == after


@pytest.mark.parametrize(
    ("code", "autoload"),
    [
        ("import peft, squeezellm_hf", "0"),
        ("import squeezellm_hf.integration.peft", "0"),
        ("import squeezellm_hf.integration.quantizer, peft", "1"),
        ("import peft", "1"),
    ],
)
def test_any_order_of_imports(code: str, autoload: str) -> None:
    check = """
import peft, peft.utils.other, squeezellm_hf.integration.peft as ours
assert peft.LoraModel._create_new_module is ours._create_new_module
assert peft.prepare_model_for_kbit_training is ours.prepare_model_for_kbit_training
assert peft.utils.other.prepare_model_for_kbit_training is ours.prepare_model_for_kbit_training
"""
    result = subprocess.run(
        [sys.executable, "-c", f"{code}\n{check}"],
        capture_output=True,
        text=True,
        env={**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": autoload},
    )
    assert result.returncode == 0, result.stderr
    assert "could not register" not in result.stderr


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("up_proj", "names a SqueezeLLMLinear that is quantized"),
        ("mlp", "names a LlamaMLP whose 'gate_proj' is quantized"),
    ],
)
def test_modules_to_save_that_are_quantized(quantized: Any, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"modules_to_save {message} and cannot be trained"):
        peft.get_peft_model(quantized, lora(target_modules=["q_proj"], modules_to_save=[name]))


def test_modules_to_save_that_are_plain(quantized: Any) -> None:
    model = peft.get_peft_model(
        quantized, lora(target_modules=["q_proj"], modules_to_save=["lm_head"])
    )
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("lm_head.modules_to_save" in name for name in trained)
