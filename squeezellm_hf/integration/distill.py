"""Distill a model that is quantized already."""

import os
import warnings
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from squeezellm_hf.calibration import datasets
from squeezellm_hf.distillation.data import Sequences, split_tokens, tokens_wanted
from squeezellm_hf.distillation.distill import (
    DistillationResult,
    distill_layers,
    teacher_states,
    uses_mixed_precision,
    work_directory,
)
from squeezellm_hf.distillation.settings import DistillationSettings
from squeezellm_hf.integration.config import SqueezeLLMConfig
from squeezellm_hf.integration.tokenizer import tokenizer_for

_SAMPLED_ROWS = 256


def distill(
    model: Any,
    original: Any,
    settings: DistillationSettings | None = None,
    *,
    dataset: Any = "builtin",
    dataset_split: str = "train",
    text_column: str | None = None,
    tokenizer: Any = None,
    work_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> DistillationResult:
    """Train the tables of a quantized model on KL(original || quantized), in place.

    Indices, and so the size and the speed of the model, stay. The original is run over the data
    once, first; only its last hidden states are kept, on disk, 2 * hidden_size bytes a token.

    Args:
        model: quantized, all of it in memory.
        original: the model before quantization, anywhere (also offloaded by accelerate); or its
            Hub id or folder: then it is loaded to the device of ``model`` and dropped when it has
            been read.
        settings: default: 300 steps of 8 x 512 tokens.
        dataset: text or token ids, see ``SqueezeLLMConfig.dataset``.
        dataset_split: split of a Hub or built-in data set.
        text_column: column that holds the text.
        tokenizer: tokenizer, or the name of one. Default: the one that lies with the model.
        work_dir: keeps the original's states and those of the run: a killed run that is started
            again goes on and ends in the same tensors.
        progress: show progress bars.

    Returns:
        What was reached. The model is changed only if it then predicts held-out text better.

    Raises:
        ValueError: if the model is not quantized, the two have different output heads, or the
            data does not suffice.
    """
    settings = DistillationSettings() if settings is None else settings
    config = getattr(model.config, "quantization_config", None)
    if not isinstance(config, SqueezeLLMConfig):
        raise ValueError(f"{type(model).__name__} is not quantized with SqueezeLLM")
    sequences = read_sequences(
        model,
        settings,
        dataset,
        tokenizer,
        dataset_split=dataset_split,
        text_column=text_column,
    )
    mixed = uses_mixed_precision(model)
    with work_directory(work_dir) as directory:
        if isinstance(original, (str, os.PathLike)):
            original = AutoModelForCausalLM.from_pretrained(original, dtype=model.dtype)
            original.to(model.device)
        check_same_head(model, original)
        states = teacher_states(
            original, sequences, settings, directory, mixed_precision=mixed, progress=progress
        )
        del original
        result = distill_layers(
            model,
            states,
            sequences,
            settings,
            mixed_precision=mixed,
            work_dir=directory,
            progress=progress,
        )
    config.distill_dataset = dataset
    config.distill_steps = settings.steps
    config.distill_lr = settings.lr
    config.distill_batch_size = settings.batch_size
    config.distill_micro_batch_size = settings.micro_batch_size
    config.distill_sequence_length = settings.sequence_length
    config.distill_norms = settings.train_norms
    config.distill_values = settings.train_values
    config.distill_indices = settings.train_indices
    record(config, result)
    return result


def record(config: SqueezeLLMConfig, result: DistillationResult) -> None:
    """Write what was reached into ``config``, and warn if it was nothing."""
    config.distilled = {
        "steps": result.best_step,
        "divergence_before": result.divergence_before,
        "divergence_after": result.divergence_after,
    }
    if not result.kept:
        warnings.warn(
            f"{result.steps} steps of distillation did not bring the model nearer to the original "
            f"on held-out text (KL {result.divergence_before:.4f} nats a token): the tables stay "
            "as they were. A lower distill_lr or more text may help",
            stacklevel=2,
        )


def texts(model: Any, config: SqueezeLLMConfig, tokenizer: Any) -> Sequences | None:
    """What a run with ``config`` distills on, or None without distillation."""
    settings = config.distillation
    if settings is None:
        return None
    dataset = config.dataset if config.distill_dataset is None else config.distill_dataset
    return read_sequences(
        model,
        settings,
        dataset,
        tokenizer,
        dataset_split=config.dataset_split,
        text_column=config.text_column,
    )


def read_sequences(
    model: Any,
    settings: DistillationSettings,
    dataset: Any,
    tokenizer: Any,
    *,
    dataset_split: str,
    text_column: str | None,
) -> Sequences:
    """Read as many tokens as the steps need, or all there are, and hold some out."""
    tokens = datasets.token_stream(
        dataset,
        tokenizer_for(dataset, tokenizer, model),
        split=dataset_split,
        text_column=text_column,
        max_tokens=tokens_wanted(settings),
        vocab_size=model.get_input_embeddings().num_embeddings,
    )
    return split_tokens(tokens, settings)


def check_same_head(model: Any, original: Any) -> None:
    """Raise ValueError unless the output heads are the same but for rounding."""
    ours, theirs = (m.get_output_embeddings().weight for m in (model, original))
    same = ours.shape == theirs.shape
    if same and not theirs.is_meta:
        step = max(1, len(ours) // _SAMPLED_ROWS)
        first, second = ours[::step].detach().cpu().float(), theirs[::step].detach().cpu().float()
        same = torch.allclose(first, second, rtol=2**-7, atol=2**-8 * float(second.abs().max()))
    if not same:
        raise ValueError(
            "original is not what the model was quantized from: their output heads differ "
            f"({list(theirs.shape)} and {list(ours.shape)})"
        )
