"""Bits chosen for the layers of a tiny model."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from squeezellm_hf.calibration.accumulate import accumulate
from squeezellm_hf.calibration.divergence import ReferenceLogits
from squeezellm_hf.calibration.fisher import FisherDiagonal
from squeezellm_hf.calibration.held_out import held_out
from squeezellm_hf.evaluation.divergence import DivergenceMeter
from squeezellm_hf.evaluation.footprint import model_footprint
from squeezellm_hf.methods.squeezellm import SqueezeLLMParameters
from squeezellm_hf.pipeline import make_plan, quantize_modules
from squeezellm_hf.pipeline.budget import BitAllocator, candidates, check_limits
from squeezellm_hf.pipeline.plan import overridden
from squeezellm_hf.pipeline.probes import calibrate, measure_together, probe_cases
from squeezellm_hf.pipeline.work_dir import WorkDir
from tests.conftest import tiny_llama

PARAMETERS = SqueezeLLMParameters(bits=4, outlier_fraction=0.01, sensitive_fraction=0.002)


def quantized(
    token_ids: Tensor, overrides: dict | None = None, **limits: float
) -> tuple[LlamaForCausalLM, BitAllocator]:
    model = tiny_llama()
    plan = make_plan(model, PARAMETERS, skip=["lm_head"], overrides=overrides)
    limit = {"average_bits": None, "target_kl": None, **limits}
    allocator = BitAllocator(**limit, held_out=token_ids[:2], fixed=overridden(plan, overrides))
    quantize_modules(model, plan, token_ids, progress=False, allocator=allocator)
    assert allocator.report is not None
    return model, allocator


@pytest.mark.parametrize("average_bits", [4.2, 4.7, 5.5, 12.0])
def test_average_bits_are_kept_and_used(average_bits: float, token_ids: Tensor) -> None:
    model, allocator = quantized(token_ids, average_bits=average_bits)
    size = model_footprint(model)
    report = allocator.report
    assert size.bits_per_weight <= average_bits
    assert size.bits_per_weight == pytest.approx(report.bits_per_weight, abs=1e-12)
    assert report.gap == 0
    if average_bits < 6:  # Steps of one layer of 14 are no finer than this.
        assert size.bits_per_weight > average_bits - 0.1
    else:
        assert {layer.bits for layer in size.layers} == {4}


def test_more_bits_never_predict_more_divergence(token_ids: Tensor) -> None:
    reports = [quantized(token_ids, average_bits=bits)[1].report for bits in (4.2, 4.6, 5.4)]
    predicted = [report.predicted_kl for report in reports]
    assert predicted == sorted(predicted, reverse=True)
    assert reports[0].measured_kl > reports[2].measured_kl


def test_layers_differ_and_the_sensitive_ones_get_more(token_ids: Tensor) -> None:
    model = tiny_llama()
    with torch.no_grad():  # What this layer does hardly reaches the output.
        model.model.layers[0].mlp.down_proj.weight.mul_(1e-3)
    plan = make_plan(model, PARAMETERS, skip=["lm_head"])
    allocator = BitAllocator(4.8, None, token_ids[:2])
    layers = quantize_modules(model, plan, token_ids, progress=False, allocator=allocator)
    assert len({layer.bits for layer in layers.values()}) > 1
    assert layers["model.layers.0.mlp.down_proj"].bits == 2


def test_several_passes_choose_the_same(token_ids: Tensor) -> None:
    def run(hessian_bytes: int) -> dict[str, Tensor]:
        model = tiny_llama()
        guided = replace(PARAMETERS, codebook="guided", guided_groups=2)
        plan = make_plan(model, guided, skip=["lm_head"])
        quantize_modules(
            model,
            plan,
            token_ids,
            progress=False,
            hessian_budgets={torch.device("cpu"): hessian_bytes},
            allocator=BitAllocator(4.8, None, token_ids[:2]),
        )
        return model.state_dict()

    whole, cut = run(1 << 30), run(200_000)
    assert whole.keys() == cut.keys()
    assert all(whole[name].equal(cut[name]) for name in whole)


def test_target_kl(token_ids: Tensor) -> None:
    tight, loose = (quantized(token_ids, target_kl=kl) for kl in (0.05, 0.1))
    for (_, allocator), target in ((tight, 0.05), (loose, 0.1)):
        assert allocator.report.predicted_kl <= target
        assert allocator.report.measured_kl == pytest.approx(target, rel=0.2)
    sizes = [model_footprint(model).bits_per_weight for model, _ in (tight, loose)]
    assert sizes[0] > sizes[1]


def test_the_trial_is_the_quantized_model(token_ids: Tensor, tmp_path: Path) -> None:
    model = tiny_llama()
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    plan = make_plan(model, PARAMETERS, skip=["lm_head"])
    fisher = FisherDiagonal({name: linears[name] for name in plan})
    accumulate(model, list(token_ids), [fisher])
    reference = ReferenceLogits(model, token_ids[:2])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run = WorkDir(tmp_path, "a run")

    def statistics() -> tuple[dict[str, Tensor], None]:
        return fisher.sums, None

    kl = measure_together(model, linears, plan, reference, statistics, run, progress=False)
    assert all(before[name].equal(tensor) for name, tensor in model.state_dict().items())
    # Kept: statistics are not asked for again.
    again = measure_together(model, linears, plan, reference, None, run, progress=False)
    assert again == kl
    quantize_modules(model, plan, token_ids, progress=False)
    assert kl == pytest.approx(reference.divergence(model), rel=1e-4)


def test_a_target_that_is_missed_is_said(token_ids: Tensor) -> None:
    model = tiny_llama()
    plan = make_plan(model, PARAMETERS, skip=["lm_head"])
    allocator = BitAllocator(None, 0.2, token_ids[:2])
    layers = quantize_modules(model, plan, token_ids, progress=False, allocator=allocator)
    allocator.target_kl = 1e-9
    allocator._reference = ReferenceLogits(tiny_llama(), token_ids[:2])
    with pytest.warns(UserWarning, match=r"target_kl=1e-09 was not reached"):
        allocator.measure(model)
    assert len(layers) == 14


def test_overrides_are_kept(token_ids: Tensor) -> None:
    overrides = {
        "q_proj": {"bits": 4, "outlier_fraction": 0.03, "sensitive_fraction": 0.0},
        "mlp.up_proj": {"bits": 5},
        "layers.1.mlp.down_proj": {"skip": True},
        "layers.1.self_attn.o_proj": {"skip": True},
    }
    model, allocator = quantized(token_ids, overrides, average_bits=8.0)
    size = model_footprint(model)
    layers = {layer.name: layer for layer in size.layers}
    assert len(layers) == 12
    for name, layer in layers.items():
        if name.endswith("q_proj"):
            assert layer.bits == 4
            assert layer.nnz == round(0.03 * layer.n_weights)
        elif name.endswith("up_proj"):
            assert layer.bits == 5
        else:
            assert layer.bits <= 4
    assert size.bits_per_weight <= 8.0
    assert allocator.report.probes <= len(layers)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"average_bits": 2.0}, r"average_bits=2 cannot be reached: .* is \d\.\d+ bits a weight"),
        ({"target_kl": 1e-9}, r"target_kl=1e-09 cannot be reached"),
    ],
)
def test_what_cannot_be_reached(limits: dict, message: str, token_ids: Tensor) -> None:
    with pytest.raises(ValueError, match=message):
        quantized(token_ids, **limits)


def test_without_data_there_is_no_budget() -> None:
    model = tiny_llama()
    plan = make_plan(model, PARAMETERS, skip=["lm_head"])
    allocator = BitAllocator(4.0, None, torch.zeros(1, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match="needs calibration data"):
        quantize_modules(model, plan, None, progress=False, allocator=allocator)


def test_candidates() -> None:
    found = candidates(PARAMETERS)
    assert len(found) == 15
    assert {each.bits for each in found} == {2, 3, 4}
    assert {each.outlier_fraction for each in found} == {0.0, 0.005, 0.01, 0.02, 0.04}
    dense = replace(PARAMETERS, outlier_fraction=0.0, sensitive_fraction=0.0)
    assert [each.bits for each in candidates(dense)] == [2, 3, 4]
    assert candidates(replace(PARAMETERS, bits=1))[0].bits == 1
    fixed = frozenset({"bits", "outlier_fraction", "sensitive_fraction"})
    assert candidates(PARAMETERS, fixed) == [PARAMETERS]
    wide = candidates(replace(PARAMETERS, outlier_fraction=0.4), frozenset({"bits"}))
    assert max(each.outlier_fraction for each in wide) < 0.5


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, "3", True])
@pytest.mark.parametrize("name", ["average_bits", "target_kl"])
def test_bad_limits(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a number above 0"):
        check_limits(**{"average_bits": None, "target_kl": None, name: value})


def test_two_limits() -> None:
    with pytest.raises(ValueError, match=r"average_bits=3\.3 and target_kl=0\.1 exclude"):
        check_limits(3.3, 0.1)


def test_the_scale_is_the_geometric_mean_without_rounding() -> None:
    found = calibrate([1e-9, 1.0, 2.0, 4.0, 1e-6], [0.01, 0.51, 1.01, 2.01, 0.012])
    assert found.scale == pytest.approx(0.5)
    assert found.correlation == pytest.approx(1.0)
    assert found.count == 3
    assert calibrate([1.0, 1.0], [1.0, 0.5]).scale == 1.0


def test_probes_are_of_the_more_sensitive_half() -> None:
    options = {f"l{i:02}": candidates(PARAMETERS) for i in range(20)}
    errors = {name: [float(i + 1)] * 15 for i, name in enumerate(options)}
    first, *others = probe_cases(errors, options)
    assert first[0] == "l00"
    assert others[0][0] == "l10"
    assert others[-1][0] == "l19"
    assert len({name for name, _ in others}) == len(others) == 8
    assert {(each.bits, each.outlier_fraction) for _, each in others} == {(3, 0.01)}


def test_divergence_is_that_of_the_evaluation(token_ids: Tensor) -> None:
    original, changed = tiny_llama(), tiny_llama()
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight.mul_(1.3)
    reference = ReferenceLogits(original, token_ids[:3])
    assert reference.divergence(original) < 1e-6
    meter = DivergenceMeter()
    with torch.no_grad():
        for ids in token_ids[:3]:
            meter.update(original(ids[None]).logits[0], changed(ids[None]).logits[0])
    assert reference.divergence(changed) == pytest.approx(meter.result().kl_mean, rel=1e-4)


def test_a_model_without_logits_is_named(token_ids: Tensor) -> None:
    with pytest.raises(ValueError, match="LlamaModel gives no logits of every token"):
        ReferenceLogits(tiny_llama().model, token_ids[:1])


def test_held_out_sequences_share_no_text() -> None:
    stream = torch.randperm(4000)
    sequences = stream[:1024].view(16, 64)
    others = torch.cat([stream[40:1000].view(15, 64), stream[1024:2048].view(16, 64)])
    found = held_out(others, sequences, 4)
    assert found.equal(others[[15, 20, 25, 30]])
    assert not len(held_out(sequences, sequences, 4))
    assert len(held_out(others, sequences, 100)) == 16
