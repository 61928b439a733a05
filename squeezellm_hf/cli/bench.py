"""`squeezellm bench MODEL...`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tyro.conf import Positional

from squeezellm_hf.cli.loading import Loading, files_size
from squeezellm_hf.evaluation.environment import environment
from squeezellm_hf.evaluation.footprint import model_footprint
from squeezellm_hf.evaluation.report import Column, decimals, megabytes, print_table, write_json
from squeezellm_hf.evaluation.throughput import throughput

DESCRIPTION = """Time text generation, and measure memory, quantized against original.

  squeezellm bench OUT4 OUT3 --reference MODEL
  squeezellm bench OUT --reference MODEL --batch-size 8 --prompt-tokens 512 --device-map cuda

Each model in turn generates greedily from a prompt of random tokens; the
table shows medians. Prefill is what happens before the first new token (bound
by arithmetic), decode what happens after it (bound by memory traffic: this is
where quantization helps). Close other programs: they cost more than
quantization gains."""

COLUMNS = (
    Column("model", "model"),
    Column("bits_per_weight", "bits/weight", decimals(2)),
    Column("file_bytes", "disk, MB", megabytes),
    Column("memory_bytes", "memory, MB", megabytes),
    Column("peak_memory_bytes", "peak, MB", megabytes),
    Column("prefill_tokens_per_s", "prefill, tokens/s", decimals(1)),
    Column("decode_tokens_per_s", "decode, tokens/s", decimals(1)),
    Column("decode_speedup", "decode, x original", decimals(2)),
)


@dataclass
class Command:
    """Time text generation."""

    models: Positional[tuple[str, ...]]
    """Hub ids or local folders, quantized or not."""
    reference: str | None = None
    """The original model: measured first, the others are compared with it."""
    batch_size: int = 1
    """Prompts at a time."""
    prompt_tokens: int = 128
    """Tokens a prompt."""
    new_tokens: int = 64
    """Tokens to generate behind each prompt, at least 2."""
    repeats: int = 3
    """Runs; the table shows their median."""
    threads: int | None = None
    """CPU threads; by default torch's own choice, one a core."""
    json: Path | None = None
    """Write the results to this file, with versions and hardware."""
    loading: Loading = field(default_factory=Loading)

    def run(self) -> None:
        """Measure one model after the other, and print one row for each."""
        names = ([self.reference] if self.reference is not None else []) + list(self.models)
        for name in ("batch_size", "prompt_tokens", "repeats", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} {value}: allowed are values >= 1")
        if self.new_tokens < 2:
            raise ValueError(f"--new-tokens {self.new_tokens}: allowed are values >= 2")
        if not names:
            raise ValueError("no MODEL was given")
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        rows: list[dict[str, Any]] = []
        for name in names:
            rows.append(self._measure(name))
            if self.reference is not None:
                rows[-1]["decode_speedup"] = (
                    rows[-1]["decode_tokens_per_s"] / rows[0]["decode_tokens_per_s"]
                )
        setting = (
            f"{self.batch_size} x {self.prompt_tokens} prompt tokens, {self.new_tokens} new, "
            f"{torch.get_num_threads()} threads"
        )
        print_table(rows, COLUMNS, setting)
        if self.json is not None:
            write_json(
                self.json,
                rows,
                batch_size=self.batch_size,
                prompt_tokens=self.prompt_tokens,
                new_tokens=self.new_tokens,
                environment=environment(),
            )

    def _measure(self, name: str) -> dict[str, Any]:
        model = self.loading.model(name)
        vocab_size = model.get_input_embeddings().num_embeddings
        prompts = torch.randint(
            vocab_size,
            (self.batch_size, self.prompt_tokens),
            generator=torch.Generator().manual_seed(0),
        )
        result = throughput(model, prompts, new_tokens=self.new_tokens, repeats=self.repeats)
        size = model_footprint(model)
        return {
            "model": name,
            "bits_per_weight": size.bits_per_weight if size.layers else None,
            "file_bytes": files_size(name),
            **asdict(result),
        }
