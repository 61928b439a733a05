"""Flags of tasks of the LM Evaluation Harness, and running them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from squeezellm_hf.cli.loading import Loading
from squeezellm_hf.evaluation.harness import check_installed, evaluate_tasks
from squeezellm_hf.evaluation.report import Column, decimals

COLUMNS = (
    Column("model", "model"),
    Column("task", "task"),
    Column("metric", "metric"),
    Column("n_fewshot", "shots", decimals(0)),
    Column("value", "value", decimals(4)),
    Column("stderr", "+-", decimals(4)),
    Column("n_samples", "questions", decimals(0)),
)


@dataclass
class Tasks:
    """Tasks of the LM Evaluation Harness, in place of perplexity."""

    tasks: str | None = None
    """Tasks of lm-eval by name, with commas between them: hellaswag,arc_easy. Needs the package
    (pip install 'squeezellm-hf[eval]')."""
    task_folder: Path | None = None
    """Folder with YAML files of more tasks."""
    n_fewshot: int | None = None
    """Examples before each question; by default what the task says."""
    limit: int | None = None
    """Use only so many questions of a task."""
    batch_size: int = 1
    """Sequences of a task that pass through the model together."""

    def rows(self, models: tuple[str, ...], loading: Loading) -> list[dict[str, Any]]:
        """Run the tasks on one model after the other; one row a model, task and metric."""
        names = [name.strip() for name in (self.tasks or "").split(",") if name.strip()]
        if not names:
            raise ValueError(f"--tasks {self.tasks!r} names no task")
        check_installed()
        return [
            {"model": name, **row}
            for name in models
            for row in evaluate_tasks(
                loading.model(name),
                loading.tokenizer(name),
                names,
                task_folder=self.task_folder,
                n_fewshot=self.n_fewshot,
                limit=self.limit,
                batch_size=self.batch_size,
            )
        ]
