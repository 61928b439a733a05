"""One quantization run: prepared while the model may still be on meta, then carried out."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from squeezellm_hf.calibration.held_out import held_out
from squeezellm_hf.calibration.objectives import CausalLM, Objective, Sample
from squeezellm_hf.distillation.data import Sequences
from squeezellm_hf.distillation.distill import (
    distill_layers,
    teacher_states,
    uses_mixed_precision,
    work_directory,
)
from squeezellm_hf.integration import expand
from squeezellm_hf.integration.calibration import calibration_samples, objective_for
from squeezellm_hf.integration.config import SqueezeLLMConfig
from squeezellm_hf.integration.distill import record, texts
from squeezellm_hf.integration.output_head import untie_head
from squeezellm_hf.integration.record import hub_id, record_layers
from squeezellm_hf.integration.selection import modules_to_skip
from squeezellm_hf.nn import SqueezeLLMLinear
from squeezellm_hf.pipeline import Plan, make_plan, quantize_modules
from squeezellm_hf.pipeline.blockwise import fits
from squeezellm_hf.pipeline.budget import BitAllocator
from squeezellm_hf.pipeline.plan import check_calibration, overridden

# Sequences on which a budget's predictions are checked.
PROBE_SEQUENCES = 4


@dataclass
class Run:
    """What is to be done to a model.

    Attributes:
        config: gets the record of the result.
        plan: parameters by module name.
        sequences: token ids, int64 [n_samples, sequence_length], or arguments of the model's
            forward; None without calibration.
        texts: what to distill on, or None without distillation.
        objective: what calibration differentiates.
        allocator: chooses the layers' bits, or None without a budget.
    """

    config: SqueezeLLMConfig
    plan: Plan
    sequences: Tensor | list[Sample] | None
    texts: Sequences | None
    objective: Objective
    allocator: BitAllocator | None = None

    def blockwise(self, model: Any, device: torch.device) -> bool:
        """Whether ``model``, in CPU memory, is to be quantized block by block on ``device``."""
        if self.config.blockwise is not None:
            return self.config.blockwise
        if self.texts is not None or self.allocator is not None:
            return False
        with expand.structure(model):
            return not fits(model, self.plan, device)

    def quantize(
        self, model: Any, progress: bool = True, *, block_device: torch.device | None = None
    ) -> None:
        """Quantize ``model`` in place and record in ``config`` what a reload needs.

        Args:
            model: on its devices, or in CPU memory with a ``block_device``.
            progress: show progress bars.
            block_device: where to compute, one block at a time. Default: where the model is.
        """
        if self.config.quantize_lm_head:
            untie_head(model)
        expand.expand(model)
        try:
            if self.texts is None:
                layers = self._quantize(model, progress, block_device)
            else:
                layers = self._quantize_and_distill(model, self.texts, progress)
        finally:
            expand.fold(model)  # what no layer of the plan was in, or all of it after an error
        record_layers(self.config, layers)
        self.config.base_model = hub_id(model)

    def _quantize(
        self, model: Any, progress: bool, block_device: torch.device | None = None
    ) -> dict[str, SqueezeLLMLinear]:
        layers = quantize_modules(
            model,
            self.plan,
            self.sequences,
            objective=self.objective,
            work_dir=self.config.work_dir,
            progress=progress,
            device=block_device,
            allocator=self.allocator,
        )
        if self.allocator is not None and self.allocator.report is not None:
            self.config.budget = self.allocator.report.as_dict()
        return layers

    def _quantize_and_distill(
        self, model: Any, texts: Sequences, progress: bool
    ) -> dict[str, SqueezeLLMLinear]:
        settings = self.config.distillation
        assert settings is not None
        mixed = uses_mixed_precision(model)
        with work_directory(self.config.work_dir) as directory:
            # The original is in memory for the last time.
            states = teacher_states(
                model, texts, settings, directory, mixed_precision=mixed, progress=progress
            )
            layers = self._quantize(model, progress)
            result = distill_layers(
                model,
                states,
                texts,
                settings,
                mixed_precision=mixed,
                work_dir=directory,
                progress=progress,
            )
        record(self.config, result)
        return layers


def prepare(model: Any, config: SqueezeLLMConfig, tokenizer: Any = None) -> Run:
    """Choose the layers and read the calibration data; ``model`` may be on meta.

    Raises:
        ValueError: if the model has nothing to quantize, or the data does not suffice, or there is
            none and a codebook needs it.
    """
    expand.warn_of_unknown(model)
    plan = _plan(model, config)
    tokenizer = tokenizer if tokenizer is not None else config.tokenizer
    objective = objective_for(model, config, tokenizer)
    for name, value in (
        ("distill_steps", config.distill_steps or None),
        ("average_bits", config.average_bits),
        ("target_kl", config.target_kl),
    ):
        if value is not None and not isinstance(objective, CausalLM):
            raise ValueError(
                f"{name}={value} needs a causal language model, got {type(model).__name__}"
            )
    samples = calibration_samples(model, config, tokenizer)
    if samples is None and config.dataset is not None and config.codebook != "kmeans":
        config.codebook = "kmeans"  # the warning that there is no data for this model was given
        plan = _plan(model, config)
    check_calibration(plan, samples is not None)
    return Run(
        config,
        plan,
        samples,
        texts(model, config, tokenizer),
        objective,
        _allocator(model, config, tokenizer, plan, samples),
    )


def _plan(model: Any, config: SqueezeLLMConfig) -> Plan:
    with expand.structure(model):
        skip = [*modules_to_skip(model, config), *expand.routers(model)]
        return make_plan(model, config.parameters, skip=skip, overrides=config.overrides)


def _allocator(
    model: Any,
    config: SqueezeLLMConfig,
    tokenizer: Any,
    plan: Plan,
    samples: Tensor | list[Sample] | None,
) -> BitAllocator | None:
    if (config.average_bits is None and config.target_kl is None) or samples is None:
        return None
    name = "target_kl" if config.average_bits is None else "average_bits"
    if not isinstance(samples, Tensor):
        raise ValueError(f"{name} takes text or token ids as dataset, got a list of batches")
    # Other windows of the same part of the data, and of the calibration's own if there are none.
    others = calibration_samples(model, config, tokenizer, seed=(config.seed + 1) % 2**63)
    assert isinstance(others, Tensor)
    probes = held_out(others, samples, PROBE_SEQUENCES)
    if not len(probes):
        probes = samples[:: -(-len(samples) // PROBE_SEQUENCES)]
    return BitAllocator(
        config.average_bits, config.target_kl, probes, overridden(plan, config.overrides)
    )
