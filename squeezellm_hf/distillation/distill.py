"""Distill a quantized model: train, verify, keep or put back."""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from squeezellm_hf.distillation import objective
from squeezellm_hf.distillation.causal_lm import CausalLM
from squeezellm_hf.distillation.checkpoint import STATE_VERSION, Checkpoint
from squeezellm_hf.distillation.data import Sequences
from squeezellm_hf.distillation.settings import DistillationSettings
from squeezellm_hf.distillation.student import Student, training
from squeezellm_hf.distillation.teacher import TeacherStates, record_teacher
from squeezellm_hf.distillation.trainer import Trainer
from squeezellm_hf.nn import SqueezeLLMLinear
from squeezellm_hf.pipeline.work_dir import fingerprint


@dataclass(frozen=True)
class DistillationResult:
    """What came of a distillation.

    Attributes:
        kept: whether the model was changed: only if it predicts the held-out text better.
        steps: updates made; fewer than asked for where training stopped early.
        best_step: the update whose tables were kept.
        divergence_before: mean KL(original || quantized) a held-out token in nats, of the layers
            as they are stored and run.
        divergence_after: the same of the model as it is now.
        held_out: (step, divergence) as measured during training.
    """

    kept: bool
    steps: int
    best_step: int
    divergence_before: float
    divergence_after: float
    held_out: list[tuple[int, float]]


def uses_mixed_precision(model: Any) -> bool:
    """bf16 products, except for an fp32 model on a CPU."""
    device = model.get_input_embeddings().weight.device.type
    return device not in ("cpu", "meta") or model.dtype != torch.float32


@contextmanager
def work_directory(work_dir: str | os.PathLike[str] | None) -> Iterator[Path]:
    """``work_dir``, made if it is not there, or a temporary directory."""
    if work_dir is not None:
        path = Path(work_dir)
        path.mkdir(parents=True, exist_ok=True)
        yield path
    else:
        with tempfile.TemporaryDirectory(prefix="squeezellm-distill-") as temporary:
            yield Path(temporary)


def teacher_states(
    original: Any,
    sequences: Sequences,
    settings: DistillationSettings,
    directory: Path,
    *,
    mixed_precision: bool,
    progress: bool = True,
) -> TeacherStates:
    """The original's last hidden states of all sequences, in a file of ``directory``.

    Args:
        original: before quantization (or another model with the same output head).
        sequences: training and held-out token ids.
        settings: for the size of a batch.
        directory: must exist.
        mixed_precision: as for the quantized model.
        progress: show a progress bar.
    """
    model = CausalLM(original, mixed_precision=mixed_precision)
    batch = settings.micro_batch
    key = _key(fingerprint(original, sequences.all), model.dtype, batch)
    return record_teacher(
        model,
        sequences.all,
        directory / f"teacher-{key}.bin",
        batch_size=batch,
        progress=progress,
    )


def distill_layers(
    model: Any,
    states: TeacherStates,
    sequences: Sequences,
    settings: DistillationSettings,
    *,
    mixed_precision: bool,
    work_dir: Path | None = None,
    progress: bool = True,
) -> DistillationResult:
    """Train the tables of the quantized layers of ``model`` in place; indices stay.

    Memory on the model's device, beside the quantized model: one byte a quantized weight for its
    index, 16 bytes for a table entry, the activations of ``micro_batch`` sequences, one weight
    matrix and its gradient.

    Args:
        model: a causal language model with :class:`~squeezellm_hf.nn.SqueezeLLMLinear` layers.
        states: the original's, of ``sequences.all`` (:func:`teacher_states`).
        sequences: token ids.
        settings: of the run.
        mixed_precision: bf16 matrix products.
        work_dir: keeps the state of the run; a killed one goes on and ends in the same tensors.
        progress: show a progress bar.

    Returns:
        What was reached. Where the held-out divergence of the finished layers is not below that
        of the layers before, every tensor is what it was.

    Raises:
        ValueError: if nothing is quantized, or the model cannot be cut into two halves.
    """
    _check(model, states, sequences)
    key = _key(STATE_VERSION, fingerprint(model, sequences.all), settings, mixed_precision)
    checkpoint = Checkpoint(None if work_dir is None else work_dir / f"distill-{key}.pt")
    before = _divergence(model, states, sequences, settings)
    student = Student(model, settings)
    with training(model, student):
        trainer = Trainer(
            CausalLM(model, mixed_precision=mixed_precision),
            student,
            sequences,
            states,
            settings,
            checkpoint,
        )
        run = trainer.run(progress)
    after = before
    if run.best_step:
        undo = _store(model, student)
        after = _divergence(model, states, sequences, settings)
        # Not `after >= before`: it may not be a number.
        if not after < before:
            undo()
            after = before
    return DistillationResult(
        kept=after < before,
        steps=run.step,
        best_step=run.best_step if after < before else 0,
        divergence_before=before,
        divergence_after=after,
        held_out=run.held_out,
    )


def _check(model: Any, states: TeacherStates, sequences: Sequences) -> None:
    rows = len(sequences.train) + len(sequences.held_out)
    expected = (rows, sequences.train.shape[1])
    if states.shape[:2] != expected:
        raise ValueError(
            f"the teacher's states are of {list(states.shape[:2])} tokens, the data of "
            f"{list(expected)}"
        )


def _divergence(
    model: Any, states: TeacherStates, sequences: Sequences, settings: DistillationSettings
) -> float:
    """Mean held-out KL a token of the model as users run it."""
    was_training = model.training
    model.eval()
    try:
        lm = CausalLM(model)
        held_out, first = sequences.held_out, len(sequences.train)
        total = sum(
            objective.divergence(lm, held_out[some], states.batch(first + some).to(lm.device))
            for some in torch.arange(len(held_out)).split(settings.micro_batch)
        )
    finally:
        model.train(was_training)
    return float(total) / held_out.numel()


def _store(model: nn.Module, student: Student) -> Any:
    """Write what was trained into the layers of the model; returns what undoes it."""
    old: list[tuple[nn.Parameter, Tensor]] = []
    for name, trained in student.layers.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, SqueezeLLMLinear)
        for key, tensor in trained.tensors().items():
            parameter = getattr(layer, key)
            old.append((parameter, parameter.data))
            parameter.data = tensor
    for norm in student.norms.values():
        old.extend((p, p.data.clone()) for p in norm.stored)
        norm.store()

    def undo() -> None:
        for parameter, data in old:
            parameter.data = data

    return undo


def _key(*parts: Any) -> str:
    return hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()[:16]
