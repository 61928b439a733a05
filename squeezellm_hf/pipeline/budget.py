"""Bits and sparse part of every layer, chosen together for a size or a divergence.

The divergence that quantizing layer l in way c brings is predicted as

    KL_lc = s * T / (2 N) * sum_i F_i (w_i - w'_i)^2

F is the sum over N sequences of the squared gradient of the mean loss of T tokens, so that T F / N
is the Fisher information of one prediction if gradients of different tokens are independent, and
half of it times a squared change is the divergence to second order. w' is the layer with the
tables of k-means. The scale s (1 if all that were exact) is measured: some layers are quantized,
one at a time, and the divergence of the model is taken on sequences that calibration did not see.
Any change, however small, also changes how a 16-bit model rounds: what that amounts to is measured
with the change that is predicted to matter least, and subtracted.

All layers together do more than the sum of each alone. Where that matters, for a divergence that is
asked for, the first choice is tried: all of its layers are quantized, s is corrected by the
divergence that they have together, and the choice is made anew.
"""

import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from squeezellm_hf.calibration.divergence import ReferenceLogits
from squeezellm_hf.methods.squeezellm import SqueezeLLMParameters, fisher_errors, stored_bytes
from squeezellm_hf.pipeline.allocation import Allocation, allocate
from squeezellm_hf.pipeline.plan import Plan
from squeezellm_hf.pipeline.probes import (
    Statistics,
    calibrate,
    measure_probes,
    measure_together,
    probe_cases,
)
from squeezellm_hf.pipeline.work_dir import WorkDir

LEAST_BITS = 2
# The sparse part, relative to the one asked for.
SPARSE_MULTIPLES = (0.0, 0.5, 1.0, 2.0, 4.0)


@dataclass
class BudgetReport:
    """What a budget came to.

    Attributes:
        bits_per_weight: of all layers of the plan, as stored.
        predicted_kl: sum of the predicted divergences of all layers, in nats a token.
        measured_kl: divergence of the quantized model on the sequences of the probes, in nats a
            token; None until it is quantized.
        gap: how much of predicted_kl (with average_bits) or of the bytes (with target_kl) a better
            allocation could save at most; 0: it is the optimum.
        scale: s, the geometric mean of measured over predicted divergence of the probes; with
            target_kl, corrected by the trial.
        correlation: of the logarithms of both, over the probes; None for fewer than 3.
        probes: layers whose divergence was measured, and is not lost in rounding.
        rounding_kl: divergence that rounding alone brings, in nats a token.
    """

    bits_per_weight: float
    predicted_kl: float
    measured_kl: float | None
    gap: float
    scale: float
    correlation: float | None
    probes: int
    rounding_kl: float

    def as_dict(self) -> dict[str, float | None]:
        """For config.json."""
        return asdict(self)


@dataclass
class BitAllocator:
    """Chooses the parameters of the layers of a plan. Give one of the two limits.

    Args:
        average_bits: of all layers of the plan, as stored: tables and sparse part included.
        target_kl: the model's divergence from the original, in nats a token.
        held_out: token ids for the probes, int64 [n, length], n at least 1.
        fixed: by layer, the names of parameters that are not to be chosen.
        report: what came of it, after :meth:`choose`.
    """

    average_bits: float | None
    target_kl: float | None
    held_out: Tensor
    fixed: Mapping[str, frozenset[str]] = field(default_factory=dict)
    report: BudgetReport | None = field(default=None, init=False)
    _reference: ReferenceLogits | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        check_limits(self.average_bits, self.target_kl)

    def choose(
        self,
        model: nn.Module,
        plan: Plan,
        sequences: Tensor,
        statistics: Statistics,
        *,
        run: WorkDir | None = None,
        progress: bool = True,
    ) -> Plan:
        """The plan with bits and fractions chosen; ``model`` is left as it was.

        Args:
            model: the original.
            plan: parameters by module name: their bits are the most that a layer may get, their
                fractions those that are varied.
            sequences: of the calibration, int64 [N, T].
            statistics: gives Fisher sums of all layers and the Hessians of some, which are used
                for their probes; only called if something is not in ``run``.
            run: keeps what was measured: a run that was killed goes on from there.
            progress: show progress bars.

        Raises:
            ValueError: if no candidates of the layers fit the limit.
        """
        linears: dict[str, Any] = {name: model.get_submodule(name) for name in plan}
        options = {
            name: candidates(parameters, self.fixed.get(name, frozenset()))
            for name, parameters in plan.items()
        }
        factor = sequences.shape[1] / (2 * sequences.shape[0])
        errors = {
            name: [factor * error for error in found]
            for name, found in self._errors(linears, options, statistics, run, progress).items()
        }
        self._reference = ReferenceLogits(model, self.held_out)
        probes = probe_cases(errors, options)
        measured = measure_probes(
            model, linears, probes, self._reference, statistics, run, progress=progress
        )
        predicted = [errors[name][options[name].index(each)] for name, each in probes]
        found = calibrate(predicted, measured)
        sizes = {}
        for name, linear in linears.items():
            out_features, in_features = linear.weight.shape
            found_sizes = (stored_bytes(out_features, in_features, each) for each in options[name])
            sizes[name] = [float(size) for size in found_sizes]
        weights = sum(linear.weight.numel() for linear in linears.values())
        scale = found.scale
        chosen, gap = self._choose(sizes, errors, scale, weights)
        if self.target_kl is not None:
            trial = {name: options[name][c] for name, c in chosen.items()}
            kl = measure_together(
                model, linears, trial, self._reference, statistics, run, progress=progress
            )
            if kl > 2 * measured[0]:
                scale = (kl - measured[0]) / math.fsum(errors[n][c] for n, c in chosen.items())
                chosen, gap = self._choose(sizes, errors, scale, weights)
        self.report = BudgetReport(
            bits_per_weight=8 * sum(sizes[name][c] for name, c in chosen.items()) / weights,
            predicted_kl=math.fsum(scale * errors[name][c] for name, c in chosen.items()),
            measured_kl=None,
            gap=gap,
            scale=scale,
            correlation=found.correlation,
            probes=found.count,
            rounding_kl=measured[0],
        )
        return {name: options[name][c] for name, c in chosen.items()}

    def measure(self, model: nn.Module) -> None:
        """Take the divergence of the quantized model, and warn if it is above the target."""
        if self.report is None or self._reference is None:
            raise RuntimeError("the bits were not chosen yet")
        kl = self.report.measured_kl = self._reference.divergence(model)
        self._reference = None
        if self.target_kl is not None and kl > self.target_kl:
            warnings.warn(
                f"target_kl={self.target_kl:g} was not reached: the quantized model has a "
                f"divergence of {kl:.4g} nats a token, {self.report.predicted_kl:.4g} were "
                "predicted. A lower target_kl gives it more bits",
                stacklevel=2,
            )

    def _choose(
        self,
        sizes: dict[str, list[float]],
        errors: dict[str, list[float]],
        scale: float,
        weights: int,
    ) -> tuple[dict[str, int], float]:
        """Which candidate each layer takes, and the gap."""
        kl = {name: [scale * error for error in each] for name, each in errors.items()}
        allocation = self._allocate(list(sizes.values()), list(kl.values()), weights)
        return dict(zip(sizes, allocation.choices, strict=True)), allocation.gap

    def _allocate(
        self, sizes: list[list[float]], kl: list[list[float]], weights: int
    ) -> Allocation:
        if self.average_bits is not None:
            least = 8 * sum(min(size) for size in sizes) / weights
            if least > self.average_bits:
                raise ValueError(
                    f"average_bits={self.average_bits:g} cannot be reached: the least that the "
                    f"layers can take, with tables, is {least:.3f} bits a weight"
                )
            return allocate(sizes, kl, math.floor(self.average_bits * weights / 8))
        assert self.target_kl is not None
        lowest = math.fsum(min(values) for values in kl)
        if lowest > self.target_kl:
            raise ValueError(
                f"target_kl={self.target_kl:g} cannot be reached: with the most bits for every "
                f"layer {lowest:.4g} nats a token are predicted; raise target_kl or bits"
            )
        return allocate(kl, sizes, self.target_kl)

    def _errors(
        self,
        linears: dict[str, Any],
        options: dict[str, list[SqueezeLLMParameters]],
        statistics: Statistics,
        run: WorkDir | None,
        progress: bool,
    ) -> dict[str, list[float]]:
        errors = {}
        for name in tqdm(options, desc="Sensitivities", unit="layer", disable=not progress):
            kept = run.load_layer(name, options[name], "errors") if run else None
            if kept is None:
                fisher, _ = statistics()
                found = fisher_errors(
                    linears[name].weight.detach(), fisher[name], options[name], name=name
                )
                kept = {"errors": torch.tensor(found, dtype=torch.float64)}
                if run is not None:
                    run.save_layer(name, options[name], kept, "errors")
            errors[name] = kept["errors"].tolist()
        return errors


def check_limits(average_bits: Any, target_kl: Any) -> None:
    """Raise ValueError unless at most one limit is given, and that is a positive number."""
    for name, value in (("average_bits", average_bits), ("target_kl", target_kl)):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (number and 0 < value < math.inf):
            raise ValueError(f"{name} must be a number above 0, got {value!r}")
    if average_bits is not None and target_kl is not None:
        raise ValueError(
            f"average_bits={average_bits} and target_kl={target_kl} exclude each other: give one"
        )


def candidates(
    parameters: SqueezeLLMParameters, fixed: frozenset[str] = frozenset()
) -> list[SqueezeLLMParameters]:
    """What a layer may become: 2 bits to those of ``parameters``, 0 to 4 times its sparse part.

    Args:
        parameters: of the layer.
        fixed: names of parameters that keep their value.
    """
    widths = [parameters.bits]
    if "bits" not in fixed:
        widths = list(range(min(LEAST_BITS, parameters.bits), parameters.bits + 1))
    found: dict[SqueezeLLMParameters, None] = {}
    for bits in widths:
        for multiple in SPARSE_MULTIPLES:
            fractions = {
                name: min(multiple * getattr(parameters, name), 0.499)
                for name in ("outlier_fraction", "sensitive_fraction")
                if name not in fixed
            }
            found[replace(parameters, bits=bits, **fractions)] = None
    return list(found)
