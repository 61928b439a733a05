"""The true divergence of a model with one layer quantized, for some layers; and with all."""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from squeezellm_hf.calibration.divergence import ReferenceLogits
from squeezellm_hf.calibration.hessian import Hessians
from squeezellm_hf.methods.squeezellm import SqueezeLLMParameters, WeightMatrix, quantize_weights
from squeezellm_hf.nn import SqueezeLLMLinear
from squeezellm_hf.pipeline.passes import parts_of
from squeezellm_hf.pipeline.plan import Plan
from squeezellm_hf.pipeline.work_dir import WorkDir

# Layers that are measured.
PROBES = 8

Probe = tuple[str, SqueezeLLMParameters]
Statistics = Callable[[], tuple[dict[str, Tensor], Hessians | None]]


def measure_probes(
    model: nn.Module,
    linears: Mapping[str, Any],
    probes: list[Probe],
    reference: ReferenceLogits,
    statistics: Statistics,
    run: WorkDir | None,
    *,
    progress: bool = True,
) -> list[float]:
    """The model's divergence with one layer quantized, for each probe.

    Args:
        model: the original; left as it was.
        linears: its layers by name.
        probes: see :func:`probe_cases`.
        reference: the original's predictions.
        statistics: gives Fisher sums and Hessians. Codebooks that need a Hessian which there is
            not give way to k-means.
        run: keeps what was measured.
        progress: show a progress bar.
    """

    def measure(changes: Plan) -> float:
        with _Quantized(linears, *statistics()) as quantized:
            quantized.change(changes)
            return reference.divergence(model)

    measured = []
    for name, parameters in tqdm(probes, desc="Probing", unit="layer", disable=not progress):
        probe = partial(measure, {name: parameters})
        measured.append(_measured_once(run, name, parameters, reference, probe))
    return measured


def measure_together(
    model: nn.Module,
    linears: Mapping[str, Any],
    plan: Plan,
    reference: ReferenceLogits,
    statistics: Statistics,
    run: WorkDir | None,
    *,
    progress: bool = True,
) -> float:
    """The model's divergence with all layers of ``plan`` quantized.

    Arguments as for :func:`measure_probes`. The original weights wait in CPU memory meanwhile.
    """

    def measure() -> float:
        title = {"desc": "Trial", "unit": "layer", "disable": not progress, "total": len(plan)}
        with _Quantized(linears, *statistics()) as quantized, tqdm(**title) as bar:
            for part in parts_of(plan, plan, linears):
                quantized.change({name: plan[name] for name in part})
                bar.update(len(part))
            return reference.divergence(model)

    return _measured_once(run, "all", list(plan.items()), reference, measure)


def _measured_once(
    run: WorkDir | None,
    name: str,
    parameters: Any,
    reference: ReferenceLogits,
    measure: Callable[[], float],
) -> float:
    """What ``measure`` gives, or gave in an earlier run with the same parameters and sequences."""
    key = parameters, hashlib.sha256(reference.sequences.numpy().tobytes()).hexdigest()
    kept = run.load_layer(name, key, "divergence") if run else None
    if kept is None:
        kept = {"divergence": torch.tensor(measure(), dtype=torch.float64)}
        if run is not None:
            run.save_layer(name, key, kept, "divergence")
    return float(kept["divergence"])


class _Quantized:
    """While it lasts, weights of layers are what quantization would make of them."""

    def __init__(
        self, linears: Mapping[str, Any], fisher: Mapping[str, Tensor], hessians: Hessians | None
    ) -> None:
        self._linears, self._fisher, self._hessians = linears, fisher, hessians
        self._original: dict[str, Tensor] = {}

    def change(self, plan: Plan) -> None:
        """Quantize some more layers, side by side; without a Hessian that they need, by k-means."""
        hessians = self._hessians.of_each(plan) if self._hessians is not None else {}
        matrices = []
        for name, asked in plan.items():
            found = hessians.get(name)
            parameters = asked if found is not None else replace(asked, codebook="kmeans")
            weight = self._linears[name].weight.data
            matrices.append(WeightMatrix(weight, self._fisher[name], parameters, found, name))
        for (name, parameters), tensors in zip(
            plan.items(), quantize_weights(matrices), strict=True
        ):
            linear = self._linears[name]
            layer = SqueezeLLMLinear.from_tensors(
                tensors, bits=parameters.bits, in_features=linear.weight.shape[1]
            )
            changed = layer.dequantize(linear.weight.dtype)
            self._original[name] = linear.weight.data.cpu()
            linear.weight.data = changed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for name, weight in self._original.items():
            self._linears[name].weight.data = weight.to(self._linears[name].weight.device)


def probe_cases(
    errors: Mapping[str, list[float]],
    options: Mapping[str, list[SqueezeLLMParameters]],
    count: int = PROBES,
) -> list[Probe]:
    """What to measure: first what matters least, then layers of the more sensitive half.

    Those at equal distances in rank, with the middle width and the middle sparse part.
    """
    ranked = sorted(errors, key=lambda name: (max(errors[name]), name))
    least = ranked[0]
    cases = [(least, options[least][errors[least].index(min(errors[least]))])]
    half = ranked[len(ranked) // 2 :]
    for place in torch.linspace(0, len(half) - 1, min(count, len(half))).round().long().tolist():
        each = options[half[place]]
        widths = sorted({candidate.bits for candidate in each})
        middle = [candidate for candidate in each if candidate.bits == widths[len(widths) // 2]]
        cases.append((half[place], middle[len(middle) // 2]))
    return cases


@dataclass(frozen=True)
class Calibrated:
    """What the probes tell: see :class:`~squeezellm_hf.pipeline.budget.BudgetReport`."""

    scale: float
    correlation: float | None
    count: int


def calibrate(predicted: list[float], measured: list[float]) -> Calibrated:
    """Compare predictions with measurements.

    Args:
        predicted: divergences of the probes, s = 1.
        measured: the same, measured. The first is taken to be rounding alone: it is subtracted
            from the others, and those that it makes up most of do not count.
    """
    rounding = measured[0]
    pairs = [
        (math.log(p), math.log(m - rounding))
        for p, m in zip(predicted[1:], measured[1:], strict=True)
        if p > 0 and m > 2 * rounding
    ]
    if not pairs:
        return Calibrated(1.0, None, 0)
    logs = torch.tensor(pairs, dtype=torch.float64)
    scale = math.exp(float((logs[:, 1] - logs[:, 0]).mean()))
    correlation = float(torch.corrcoef(logs.t())[0, 1]) if len(pairs) > 2 else math.nan
    return Calibrated(scale, correlation if math.isfinite(correlation) else None, len(pairs))
