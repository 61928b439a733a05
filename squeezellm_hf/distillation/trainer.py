"""The loop: Adam, one cycle of the learning rate, the best tables by held-out divergence."""

import contextlib
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from squeezellm_hf.distillation import objective
from squeezellm_hf.distillation.causal_lm import CausalLM
from squeezellm_hf.distillation.checkpoint import Checkpoint
from squeezellm_hf.distillation.data import Sequences, batch_rows
from squeezellm_hf.distillation.graph import GraphedBackward
from squeezellm_hf.distillation.settings import DistillationSettings
from squeezellm_hf.distillation.student import State, Student
from squeezellm_hf.distillation.teacher import TeacherStates

# Share of the steps in which the learning rate rises.
WARM_UP = 0.1
# The loss is read from an accelerator so often only: reading waits for all that is under way.
_STEPS_PER_READING = 10


@dataclass
class Progress:
    """Where a run stands.

    Attributes:
        step: updates done.
        best_step: the update after which the held-out divergence was least.
        best: the masters then.
        held_out: (step, mean KL a held-out token in nats) of every measurement.
    """

    step: int = 0
    best_step: int = 0
    best: State = field(default_factory=dict)
    held_out: list[tuple[int, float]] = field(default_factory=list)

    @property
    def best_divergence(self) -> float:
        """The least held-out divergence so far, in nats a token."""
        return min((d for _, d in self.held_out if not math.isnan(d)), default=math.inf)

    def is_hopeless(self, patience: int) -> bool:
        """Whether the last ``patience`` measurements, or a broken one, brought nothing."""
        if self.held_out and not math.isfinite(self.held_out[-1][1]):
            return True
        later = [step for step, _ in self.held_out if step > self.best_step]
        return len(later) >= patience


class Trainer:
    """Trains a student, which must be in its model's place (:func:`student.training`).

    Args:
        model: the student.
        student: its trainable modules.
        sequences: token ids.
        states: the original's, of ``sequences.all``.
        settings: of the run.
        checkpoint: where the run's state is kept.
    """

    def __init__(
        self,
        model: CausalLM,
        student: Student,
        sequences: Sequences,
        states: TeacherStates,
        settings: DistillationSettings,
        checkpoint: Checkpoint,
    ) -> None:
        self.model = model
        self.student = student
        self.sequences = sequences
        self.states = states
        self.settings = settings
        self.checkpoint = checkpoint
        self.progress = Progress()
        self._graphs: dict[int, GraphedBackward] = {}
        for group in student.groups(settings):
            for parameter in group["params"]:
                # A graph writes to one place: gradients are set to zero, never to None.
                parameter.grad = torch.zeros_like(parameter)
        self.optimizer = torch.optim.Adam(student.groups(settings), fused=True)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer,
            [group["lr"] for group in self.optimizer.param_groups],
            # The schedule is asked once more than there are steps.
            total_steps=settings.steps + 1,
            pct_start=WARM_UP,
            cycle_momentum=False,
        )

    def run(self, progress: bool = True) -> Progress:
        """Train to the end, or until nothing is gained, and leave the best in the student."""
        self._resume()
        with _deterministic(self.model.device):
            self._train(progress)
        self._graphs.clear()
        self._save()
        self.student.load(self.progress.best)
        return self.progress

    def _train(self, progress: bool) -> None:
        settings = self.settings
        self._graphs = self._capture()
        if not self.progress.held_out:
            self._measure()
        with tqdm(
            total=settings.steps,
            initial=self.progress.step,
            desc="Distilling",
            unit="step",
            disable=not progress,
        ) as bar:
            loss = None
            while self.progress.step < settings.steps and not self._hopeless:
                loss = self._step()
                self.progress.step += 1
                bar.update()
                step = self.progress.step
                if step % settings.evaluation_interval == 0 or step == settings.steps:
                    self._measure()
                if step % _STEPS_PER_READING == 0 or self.model.device.type == "cpu":
                    bar.set_postfix(
                        KL=f"{float(loss):.4f}",
                        held_out=f"{self.progress.held_out[-1][1]:.4f}",
                        refresh=False,
                    )
                if self.checkpoint.is_due:
                    self._save()

    @property
    def _hopeless(self) -> bool:
        return self.progress.is_hopeless(self.settings.patience)

    def _step(self) -> Tensor:
        """One update; the mean KL a token of its batch, fp32 scalar."""
        settings, train = self.settings, self.sequences.train
        rows = batch_rows(self.progress.step, len(train), self._batch, settings.seed)
        self.optimizer.zero_grad(set_to_none=False)
        losses = [
            self._backward(train[some], self._teacher(some))
            for some in rows.split(settings.micro_batch)
        ]
        self.optimizer.step()
        self.schedule.step()
        return torch.stack(losses).sum()

    def _backward(self, input_ids: Tensor, states: Tensor) -> Tensor:
        """Add the gradient of a part of an update; the part's share of the mean KL a token."""
        graph = self._graphs.get(len(input_ids))
        if graph is not None:
            return graph(input_ids, states)
        return objective.backward(self.model, input_ids, states, self._scale)

    @property
    def _batch(self) -> int:
        return min(self.settings.batch_size, len(self.sequences.train))

    @property
    def _scale(self) -> float:
        return 1.0 / (self._batch * self.sequences.train.shape[1])

    def _capture(self) -> dict[int, GraphedBackward]:
        """A graph for every number of sequences that pass through the model together."""
        if self.model.device.type != "cuda" or self.progress.step == self.settings.steps:
            return {}
        parts = torch.arange(self._batch).split(self.settings.micro_batch)
        length = self.sequences.train.shape[1]
        try:
            return {
                size: GraphedBackward(self.model, (size, length), self._scale)
                for size in {len(part) for part in parts}
            }
        except RuntimeError as error:
            warnings.warn(f"no CUDA graph of this model, steps are slower: {error}", stacklevel=2)
            return {}

    def _teacher(self, rows: Tensor) -> Tensor:
        return self.states.batch(rows).to(self.model.device, non_blocking=True)

    def _measure(self) -> None:
        """Held-out divergence; the masters are kept if it is the least so far."""
        held_out = self.sequences.held_out
        first = len(self.sequences.train)
        total = sum(
            objective.divergence(self.model, held_out[some], self._teacher(first + some))
            for some in torch.arange(len(held_out)).split(self.settings.micro_batch)
        )
        divergence = float(total) / held_out.numel()
        if divergence < self.progress.best_divergence or not self.progress.best:
            self.progress.best = self.student.state()
            self.progress.best_step = self.progress.step
        self.progress.held_out.append((self.progress.step, divergence))

    def _save(self) -> None:
        self.checkpoint.save(
            {
                "masters": self.student.state(),
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "progress": vars(self.progress),
            }
        )

    def _resume(self) -> None:
        saved: dict[str, Any] | None = self.checkpoint.load(self.model.device)
        if saved is not None:
            self.student.load(saved["masters"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.schedule.load_state_dict(saved["schedule"])
            self.progress = Progress(**saved["progress"])


@contextlib.contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """While it lasts, what has a deterministic variant on an accelerator takes it: the backward
    pass of attention above all. A resumed run could not end in the same tensors otherwise."""
    if device.type == "cpu":
        yield
        return
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        with warnings.catch_warnings():
            # cuBLAS asks for CUBLAS_WORKSPACE_CONFIG, which matters with several streams alone.
            warnings.filterwarnings("ignore", message=".*[Dd]eterministic")
            yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
