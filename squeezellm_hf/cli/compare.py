"""`squeezellm compare MODEL`."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from tyro.conf import Positional

from squeezellm_hf.calibration.datasets import describe, token_batches
from squeezellm_hf.cli.loading import Loading
from squeezellm_hf.evaluation.cases import DEFAULT_CASES, Case, parse_case
from squeezellm_hf.evaluation.compare import beaten_by, compare
from squeezellm_hf.evaluation.environment import environment
from squeezellm_hf.evaluation.plot import check_plot, plot
from squeezellm_hf.evaluation.report import (
    Column,
    console,
    decimals,
    markdown,
    percent,
    print_table,
    write_json,
)

DESCRIPTION = """Compare quantizers on a model: perplexity against bits per weight.

  squeezellm compare MODEL
  squeezellm compare MODEL --dataset calibration.jsonl --test-dataset held-out.jsonl
  squeezellm compare MODEL --cases squeezellm:bits=3,codebook=guided gptq:bits=3 nf4
  squeezellm compare MODEL --work-dir W --json out.json --markdown out.md --plot out.svg

A case is METHOD or METHOD:OPTION=VALUE,...:
  squeezellm  options of `squeezellm quantize`: bits, codebook, outlier_fraction, ...
  rtn         round to nearest in groups: bits, group_size
  gptq        GPTQ, our own fp32 implementation: bits, group_size, act_order, static_groups
  nf4         4-bit NormalFloat of bitsandbytes: block_size, double_quant
  hqq         half-quadratic quantization of the package hqq: bits, group_size, axis

What is not installed is left out, and said.

All quantize the same layers; those that use data are calibrated on the same.
Bits per weight are all that is stored for these layers: indices, tables,
scales, zero points, sparse values, permutations. "Beaten by" names the best of
the other side (us, them) that takes no more bits (0.02 count as equal)."""

COLUMNS = (
    Column("case", "case"),
    Column("bits_per_weight", "bits/weight", decimals(2)),
    Column("perplexity", "perplexity", decimals(2)),
    Column("ratio", "/ original", decimals(4)),
    Column("kl_mean", "KL, nats", decimals(4)),
    Column("kl_99", "KL 99 %", decimals(2)),
    Column("top1_agreement", "same top-1", percent(1)),
    Column("beaten_by", "beaten by"),
)


@dataclass
class Command:
    """Compare quantizers."""

    model: Positional[str]
    """Hub id or local folder of a causal language model that is not quantized."""
    cases: tuple[str, ...] = DEFAULT_CASES
    """What to compare."""
    dataset: str = "builtin"
    """Calibration data, as for `squeezellm quantize`."""
    dataset_split: str = "train"
    """Split of a Hub or built-in data set."""
    test_dataset: str = "builtin"
    """Text to predict, as for `squeezellm eval`. Not what is calibrated on."""
    test_split: str = "test"
    """Split of a Hub or built-in data set."""
    text_column: str | None = None
    """Column that holds the text, in both."""
    n_samples: int = 100
    """Calibration sequences."""
    n_windows: int = 24
    """Sequences of the text to predict."""
    sequence_length: int = 512
    """Tokens a sequence, in both."""
    work_dir: str | None = None
    """Keep finished work here: a killed comparison goes on where it was. By default a temporary
    folder, for the statistics that all cases share: 4 bytes a weight, and the Hessians."""
    json: Path | None = None
    """Write the results to this file, with versions and hardware."""
    markdown: Path | None = None
    """Write the table to this file."""
    plot: Path | None = None
    """Draw perplexity against bits per weight into this file (.svg, .png, ...)."""
    loading: Loading = field(default_factory=Loading)

    def run(self) -> None:
        """Run the cases that can be run, and print one row for each."""
        with tempfile.TemporaryDirectory() as temporary:
            self._run(self.work_dir or temporary)

    def _run(self, work_dir: str) -> None:
        cases, skipped = self._cases(work_dir)
        if self.plot is not None:
            check_plot(self.plot)
        for case, reason in skipped.items():
            console().print(f"{case} is left out: {reason}")
        calibration = self._tokens(self.dataset, self.dataset_split, self.n_samples)
        text = self._tokens(self.test_dataset, self.test_split, self.n_windows)
        rows = list(
            compare(
                lambda: self.loading.model(self.model),
                cases,
                calibration,
                text,
                work_dir=work_dir,
                progress=True,
            )
        )
        rows = [{**row, "beaten_by": beaten_by(row, rows)} for row in rows]
        rows[1:] = sorted(rows[1:], key=lambda row: row["bits_per_weight"])
        self._report(rows, skipped)

    def _cases(self, work_dir: str) -> tuple[list[Case], dict[str, str]]:
        """Return what can be run, and the others with a reason."""
        cases = [parse_case(text, work_dir) for text in self.cases]
        skipped = {case.text: case.missing for case in cases if case.missing is not None}
        cases = [case for case in cases if case.missing is None]
        if not cases:
            raise ValueError(f"none of the cases can be run: {skipped or 'none was given'}")
        return cases, skipped

    def _tokens(self, dataset: str, split: str, n_samples: int) -> Tensor:
        return token_batches(
            dataset,
            self.loading.tokenizer(self.model),
            n_samples=n_samples,
            sequence_length=self.sequence_length,
            split=split,
            text_column=self.text_column,
        )

    def _report(self, rows: list[dict[str, Any]], skipped: Mapping[str, str]) -> None:
        name = Path(self.model).name
        title = f"{name}, {self.n_windows} x {self.sequence_length} tokens"
        print_table(rows, COLUMNS, title)
        if self.markdown is not None:
            self.markdown.write_text(markdown(rows, COLUMNS))
        if self.plot is not None:
            plot(self.plot, rows, title)
        if self.json is not None:
            write_json(
                self.json,
                rows,
                model=name,
                dataset=describe(self.dataset),
                test_dataset=describe(self.test_dataset),
                n_samples=self.n_samples,
                n_windows=self.n_windows,
                sequence_length=self.sequence_length,
                skipped=dict(skipped),
                environment=environment(),
            )
