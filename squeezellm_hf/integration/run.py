"""One quantization run: prepared while the model may still be on meta, then carried out."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.quantizers.base import HfQuantizer

from squeezellm_hf.calibration import datasets
from squeezellm_hf.calibration.held_out import held_out
from squeezellm_hf.distillation.data import Sequences
from squeezellm_hf.distillation.distill import (
    distill_layers,
    teacher_states,
    uses_mixed_precision,
    work_directory,
)
from squeezellm_hf.integration.config import SqueezeLLMConfig
from squeezellm_hf.integration.distill import record, texts
from squeezellm_hf.integration.record import record_layers
from squeezellm_hf.integration.tokenizer import tokenizer_for
from squeezellm_hf.nn import SqueezeLLMLinear
from squeezellm_hf.pipeline import Plan, make_plan, quantize_modules
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
        sequences: token ids, int64 [n_samples, sequence_length], or None without calibration.
        texts: what to distill on, or None without distillation.
        allocator: chooses the layers' bits, or None without a budget.
    """

    config: SqueezeLLMConfig
    plan: Plan
    sequences: Tensor | None
    texts: Sequences | None
    allocator: BitAllocator | None = None

    def quantize(self, model: Any, progress: bool = True) -> None:
        """Quantize ``model`` in place and record in ``config`` what a reload needs."""
        if self.texts is None:
            layers = self._quantize(model, progress)
        else:
            layers = self._quantize_and_distill(model, self.texts, progress)
        record_layers(self.config, layers)

    def _quantize(self, model: Any, progress: bool) -> dict[str, SqueezeLLMLinear]:
        work_dir = self.config.work_dir
        layers = quantize_modules(
            model,
            self.plan,
            self.sequences,
            work_dir=work_dir,
            progress=progress,
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
    skip = HfQuantizer.get_modules_to_not_convert(
        model,
        list(config.modules_to_not_convert or []),
        getattr(model, "_keep_in_fp32_modules", None),
        add_default_skips=True,
    )
    plan = make_plan(model, config.parameters, skip=skip, overrides=config.overrides)
    check_calibration(plan, config.dataset is not None)
    tokenizer = tokenizer if tokenizer is not None else config.tokenizer
    sequences = _sequences(model, config, tokenizer)
    return Run(
        config,
        plan,
        sequences,
        texts(model, config, tokenizer),
        _allocator(model, config, tokenizer, plan, sequences),
    )


def _allocator(
    model: Any, config: SqueezeLLMConfig, tokenizer: Any, plan: Plan, sequences: Tensor | None
) -> BitAllocator | None:
    if (config.average_bits is None and config.target_kl is None) or sequences is None:
        return None
    # Other windows of the same part of the data, and of the calibration's own if there are none.
    others = _sequences(model, config, tokenizer, seed=(config.seed + 1) % 2**63)
    assert others is not None
    probes = held_out(others, sequences, PROBE_SEQUENCES)
    if not len(probes):
        probes = sequences[:: -(-len(sequences) // PROBE_SEQUENCES)]
    return BitAllocator(
        config.average_bits, config.target_kl, probes, overridden(plan, config.overrides)
    )


def _sequences(
    model: Any, config: SqueezeLLMConfig, tokenizer: Any, seed: int | None = None
) -> Tensor | None:
    if config.dataset is None:
        return None
    tokenizer = tokenizer_for(config.dataset, tokenizer, model)
    sequences = datasets.token_batches(
        config.dataset,
        tokenizer,
        n_samples=config.n_samples,
        sequence_length=config.sequence_length,
        seed=config.seed if seed is None else seed,
        split=config.dataset_split,
        text_column=config.text_column,
        vocab_size=model.get_input_embeddings().num_embeddings,
    )
    return torch.as_tensor(sequences)
