"""The codebook solvers through the front door: quantize while loading, save, load again."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from squeezellm_hf import SqueezeLLMConfig, SqueezeLLMLinear, quantize_model
from squeezellm_hf.calibration.accumulate import accumulate
from squeezellm_hf.calibration.hessian import Hessians
from squeezellm_hf.methods.squeezellm import quadratic_error
from tests.conftest import tiny_llama


def config(token_ids: Tensor, codebook: str, **changes: object) -> SqueezeLLMConfig:
    return SqueezeLLMConfig(
        **{
            "dataset": token_ids,
            "n_samples": 4,
            "sequence_length": 32,
            "bits": 3,
            "codebook": codebook,
            "guided_groups": 2,
            **changes,
        }
    )


def load(path: Path, **kwargs: object):
    return AutoModelForCausalLM.from_pretrained(path, **kwargs)


def errors(model: nn.Module, token_ids: Tensor, groups: int) -> dict[str, float]:
    """By layer, the sum of its objective with the original model's Hessians."""
    original = tiny_llama()
    linears = {
        name: original.get_submodule(name)
        for name, module in model.named_modules()
        if isinstance(module, SqueezeLLMLinear)
    }
    hessians = Hessians(linears, dict.fromkeys(linears, groups))
    accumulate(original, list(token_ids), [hessians])
    return {
        name: float(
            quadratic_error(
                linear.weight.detach(),
                model.get_submodule(name).to_linear(torch.float32).weight.detach(),
                hessians.of(name),
            ).sum()
        )
        for name, linear in linears.items()
    }


@pytest.mark.parametrize(("codebook", "groups"), [("lnq", 0), ("guided", 2)])
def test_every_layer_changes_its_outputs_less_than_with_k_means(
    codebook: str, groups: int, checkpoint: Path, token_ids: Tensor, tmp_path: Path
) -> None:
    model = load(checkpoint, quantization_config=config(token_ids, codebook))
    plain = load(checkpoint, quantization_config=config(token_ids, "kmeans"))
    ours, theirs = (errors(m, token_ids, groups) for m in (model, plain))
    assert len(ours) == 14
    assert all(ours[name] < 0.8 * theirs[name] for name in ours)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again(token_ids).logits.equal(model(token_ids).logits)
    assert (
        codebook
        in json.loads((tmp_path / "config.json").read_text())["quantization_config"]["codebook"]
    )


def test_in_memory_gives_the_same(checkpoint: Path, token_ids: Tensor) -> None:
    one = load(checkpoint, quantization_config=config(token_ids, "guided"))
    other = quantize_model(load(checkpoint), None, config(token_ids, "guided"), progress=False)
    ours, theirs = one.state_dict(), other.state_dict()
    assert all(ours[name].equal(theirs[name]) for name in ours)


def test_codebooks_may_differ_by_layer(checkpoint: Path, token_ids: Tensor) -> None:
    overrides = {"re:.*down_proj": {"codebook": "guided"}, "k_proj": {"codebook": "lnq"}}
    mixed = load(checkpoint, quantization_config=config(token_ids, "kmeans", overrides=overrides))
    whole = {
        codebook: load(checkpoint, quantization_config=config(token_ids, codebook))
        for codebook in ("kmeans", "lnq", "guided")
    }
    for name, codebook in [("mlp.down_proj", "guided"), ("self_attn.k_proj", "lnq"),
                           ("mlp.up_proj", "kmeans")]:  # fmt: skip
        ours = mixed.get_submodule(f"model.layers.1.{name}").state_dict()
        theirs = whole[codebook].get_submodule(f"model.layers.1.{name}").state_dict()
        assert all(ours[key].equal(theirs[key]) for key in ours)


def test_checkpoints_from_before_the_option_load(
    checkpoint: Path, token_ids: Tensor, tmp_path: Path
) -> None:
    model = load(checkpoint, quantization_config=config(token_ids, "kmeans"))
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    record = json.loads(path.read_text())
    for name in ("codebook", "guided_groups", "lnq_rounds", "lnq_sweeps"):
        del record["quantization_config"][name]
    path.write_text(json.dumps(record))
    again = load(tmp_path)
    assert again(token_ids).logits.equal(model(token_ids).logits)
    assert again.config.quantization_config.codebook == "kmeans"


def test_without_data_there_is_nothing_to_guide(checkpoint: Path) -> None:
    settings = SqueezeLLMConfig(dataset=None, codebook="guided")
    with pytest.raises(ValueError, match=r"codebook='guided' .* needs calibration data"):
        load(checkpoint, quantization_config=settings)
    settings = SqueezeLLMConfig(dataset=None, overrides={"mlp": {"codebook": "lnq"}})
    with pytest.raises(ValueError, match=r"codebook='lnq' of .*mlp"):
        quantize_model(load(checkpoint), None, settings)
