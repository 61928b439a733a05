"""`squeezellm eval MODEL...`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from tyro.conf import Positional

from squeezellm_hf.calibration.datasets import describe, token_stream
from squeezellm_hf.cli import tasks as harness
from squeezellm_hf.cli.loading import Loading
from squeezellm_hf.evaluation.environment import environment
from squeezellm_hf.evaluation.evaluate import Evaluation, evaluate
from squeezellm_hf.evaluation.footprint import model_footprint
from squeezellm_hf.evaluation.remembered import RememberedModel
from squeezellm_hf.evaluation.report import (
    Column,
    decimals,
    megabytes,
    percent,
    print_table,
    write_json,
)
from squeezellm_hf.integration.card_results import write_results

DESCRIPTION = """Measure perplexity on a text, and how far predictions are from the original's.

  squeezellm eval OUT
  squeezellm eval OUT4 OUT3 --reference MODEL --json results.json
  squeezellm eval OUT --dataset wikitext2 --sequence-length 2048
  squeezellm eval OUT --tasks hellaswag,arc_easy --batch-size 8
  squeezellm eval OUT --reference MODEL --card

Perplexity is exp of the mean cross entropy of a token, given those before it
in its window; lower is better. With --reference also, in nats and token by
token, KL(original || quantized): its mean and 99th percentile, and how often
both models find the same token the likeliest. The reference and one model are
in memory at once. With --tasks the LM Evaluation Harness runs instead."""

COLUMNS = (
    Column("model", "model"),
    Column("bits_per_weight", "bits/weight", decimals(2)),
    Column("bytes", "MB", megabytes),
    Column("perplexity", "perplexity", decimals(3)),
    Column("ratio", "/ original", decimals(4)),
    Column("kl_mean", "KL, nats", decimals(4)),
    Column("kl_99", "KL 99 %", decimals(3)),
    Column("top1_agreement", "same top-1", percent(2)),
    Column("n_tokens", "tokens", decimals(0)),
)


@dataclass
class Command:
    """Measure perplexity."""

    models: Positional[tuple[str, ...]]
    """Hub ids or local folders, quantized or not."""
    dataset: str = "builtin"
    """Text to predict: "builtin" (held-out Python help texts, 21,000 tokens or so), "wikitext2",
    "c4", a Hub data set ("id" or "id:config"), or a local .txt, .jsonl or .parquet file. Not what
    the model was calibrated on."""
    split: str = "test"
    """Split of a Hub or built-in data set."""
    text_column: str | None = None
    """Column that holds the text; by default "text", or the only one of strings."""
    reference: str | None = None
    """The original model, to compare with token by token."""
    sequence_length: int = 2048
    """Tokens a window. Published perplexities mostly use 2048; longer windows predict better."""
    stride: int | None = None
    """Tokens from one window to the next; by default windows adjoin. A smaller stride gives every
    token more context and costs sequence_length / stride times the time."""
    max_tokens: int | None = None
    """Use only so many tokens of the text."""
    json: Path | None = None
    """Write the results to this file, with versions and hardware."""
    card: bool = False
    """Put the results into the model card of each MODEL too; these must be local folders."""
    tasks: harness.Tasks = field(default_factory=harness.Tasks)
    loading: Loading = field(default_factory=Loading)

    def run(self) -> None:
        """Evaluate one model after the other, and print one row for each."""
        if not self.models:
            raise ValueError("no MODEL was given")
        if self.tasks.tasks is not None:
            if self.card:
                raise ValueError("--card takes perplexities, not --tasks")
            self._run_tasks()
            return
        text = self._tokens(self.reference or self.models[0])
        for name in self.models:
            self._check_context(name)
            if self.card and not (Path(name) / "README.md").is_file():
                raise ValueError(f"--card: {name!r} is no local folder with a model card")
        original = self.loading.model(self.reference) if self.reference is not None else None
        several = original is not None and len(self.models) > 1
        compared = RememberedModel(original) if several else original
        rows: list[dict[str, Any]] = []
        for name in self.models:
            if name != (self.reference or self.models[0]):
                _check_same_tokens(text, self._tokens(name), name)
            model = self.loading.model(name)
            result = evaluate(
                model,
                text,
                original=compared,
                sequence_length=self.sequence_length,
                stride=self.stride,
                progress=True,
            )
            if original is not None and result.original_perplexity is not None and not rows:
                perplexity = asdict(result.original_perplexity)
                rows.append(
                    {**_size_row(self.reference or "", original), **perplexity, "ratio": 1.0}
                )
            rows.append(_row(name, model, result))
            if self.card:
                self._write_card(name, [*rows[: self.reference is not None], rows[-1]])
            del model
        print_table(rows, COLUMNS, f"{self.dataset}, windows of {self.sequence_length} tokens")
        if self.json is not None:
            write_json(
                self.json,
                rows,
                dataset=describe(self.dataset),
                split=self.split,
                sequence_length=self.sequence_length,
                stride=self.stride or self.sequence_length,
                environment=environment(),
            )

    def _write_card(self, name: str, rows: list[dict[str, Any]]) -> None:
        write_results(
            name,
            rows,
            dataset=str(describe(self.dataset)),
            split=self.split,
            sequence_length=self.sequence_length,
        )

    def _run_tasks(self) -> None:
        models = self.models if self.reference is None else (self.reference, *self.models)
        rows = self.tasks.rows(models, self.loading)
        print_table(rows, harness.COLUMNS, "LM Evaluation Harness")
        if self.json is not None:
            write_json(self.json, rows, limit=self.tasks.limit, environment=environment())

    def _tokens(self, name: str) -> Tensor:
        return token_stream(
            self.dataset,
            self.loading.tokenizer(name),
            split=self.split,
            text_column=self.text_column,
            max_tokens=self.max_tokens,
        )

    def _check_context(self, name: str) -> None:
        context = getattr(self.loading.config(name), "max_position_embeddings", None)
        if context is not None and self.sequence_length > context:
            raise ValueError(
                f"--sequence-length {self.sequence_length} is more than the context of {name!r}, "
                f"{context} tokens"
            )


def _check_same_tokens(text: Tensor, other: Tensor, name: str) -> None:
    """Perplexities of different tokens cannot be compared."""
    if not text.equal(other):
        raise ValueError(
            f"{name!r} has another tokenizer than the first model or the reference: perplexities "
            "a token are not comparable. Evaluate it by itself"
        )


def _size_row(name: str, model: Any) -> dict[str, Any]:
    size = model_footprint(model)
    return {
        "model": name,
        "bits_per_weight": size.bits_per_weight if size.layers else None,
        "bytes": size.n_bytes,
    }


def _row(name: str, model: Any, result: Evaluation) -> dict[str, Any]:
    row = {**_size_row(name, model), **asdict(result.perplexity)}
    if result.original_perplexity is not None and result.divergence is not None:
        row["ratio"] = result.perplexity.perplexity / result.original_perplexity.perplexity
        row.update(asdict(result.divergence))
    return row
