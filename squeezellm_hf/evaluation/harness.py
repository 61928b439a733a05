"""Tasks of the LM Evaluation Harness (package lm-eval, extra `eval`), run on a loaded model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from typing import Any

_STDERR = "_stderr"


def check_installed() -> None:
    """Raise ValueError unless lm-eval can be imported."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"tasks need the package lm-eval: pip install 'squeezellm-hf[eval]' ({error})"
        ) from error


def evaluate_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    task_folder: str | os.PathLike[str] | None = None,
    n_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 1,
) -> list[dict[str, Any]]:
    """Run tasks through lm-eval's own class for models of transformers.

    The figures are those of `lm_eval --model hf --model_args pretrained=FOLDER`.

    Args:
        model: A causal language model of transformers, quantized or not, in evaluation mode.
        tokenizer: Its tokenizer.
        tasks: Names or patterns ("hellaswag", "mmlu_*").
        task_folder: YAML files of more tasks.
        n_fewshot: Examples before each question; default: what the task says.
        limit: Use only so many questions of a task. Not for figures to be published.
        batch_size: Sequences that pass through the model together.

    Returns:
        One row a task and metric: "task", "metric", "n_fewshot", "value", "stderr" (None if there
        is none) and "n_samples".

    Raises:
        ValueError: lm-eval is not installed, no task fits a name, or a number is out of range.
    """
    check_installed()
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    for name, number in (("limit", limit), ("batch_size", batch_size)):
        if number is not None and number < 1:
            raise ValueError(f"{name}={number} is not >= 1")
    manager = _task_manager(None if task_folder is None else os.fspath(task_folder))
    for task in tasks:
        if not manager.match_tasks([task]):
            raise ValueError(
                f"task {task!r} is not one of the {len(manager.all_tasks)} that lm-eval knows; "
                "`lm-eval ls tasks` lists them"
            )

    found = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
        tasks=manager.match_tasks(list(tasks)),
        task_manager=manager,
        num_fewshot=n_fewshot,
        limit=limit,
        log_samples=False,
    )
    assert found is not None  # only on other ranks than the first
    return [
        row
        for task, results in found["results"].items()
        for row in _rows(
            task,
            results,
            found["n-shot"].get(task),
            found.get("n-samples", {}).get(task, {}).get("effective"),
        )
    ]


@cache
def _task_manager(folder: str | None) -> Any:
    """Index thousands of YAML files, which takes seconds, only once."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder)


def _rows(
    task: str, results: dict[str, Any], n_fewshot: Any, n_samples: int | None
) -> list[dict[str, Any]]:
    rows = []
    for key, value in results.items():
        metric, _, by = key.partition(",")
        if not by or metric.endswith(_STDERR):
            continue
        error = results.get(f"{metric}{_STDERR},{by}")
        rows.append(
            {
                "task": task,
                "metric": metric if by == "none" else f"{metric} ({by})",
                "n_fewshot": n_fewshot,
                "value": value,
                "stderr": error if isinstance(error, float) else None,
                "n_samples": n_samples,
            }
        )
    return rows
