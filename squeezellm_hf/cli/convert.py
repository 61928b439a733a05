"""`squeezellm convert CHECKPOINT OUT`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tyro.conf import Positional

from squeezellm_hf.cli.loading import check_name
from squeezellm_hf.evaluation.footprint import model_footprint
from squeezellm_hf.evaluation.report import console

DESCRIPTION = """Convert a checkpoint of the public SqueezeLLM code.

  squeezellm convert sq-opt-1.3b-w4-s0.pt OUT --base-model facebook/opt-1.3b
  squeezellm convert FOLDER OUT
  squeezellm convert sq-llama-7b-w3-s45.pt OUT --base-model LLAMA --bits 3

What is read: a .pt file with 3 or 4 bits, with or without a sparse part and
full rows. It is never unpickled as Python: tensors and numbers are taken, and
a file that holds anything else is refused. config.json and the tokenizer come
from the file's folder if they are there, else from --base-model. Embeddings,
norms and the output head, which some files lack, are read from --base-model,
without its linear layers.

What comes out: an ordinary checkpoint, as of `squeezellm quantize`. Its
weights are exactly the file's: with 16-bit tables where these can hold the
file's 32-bit ones, else with 32-bit tables, which cost 0.03 to 0.06 bits a
weight more in rows of 4096. --table-dtype float16 rounds instead, and prints
the largest error. Memory: one layer at a time. Disk: the result twice, while
it is written."""

TableDtype = Literal["exact", "float16", "bfloat16", "float32"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass
class Command:
    """Convert a checkpoint of the public SqueezeLLM code."""

    checkpoint: Positional[Path]
    """The .pt file, or a folder that holds one."""
    out: Positional[Path]
    """Folder to write to. It is changed only when everything is done."""
    base_model: str | None = None
    """Hub id or folder of the model that was quantized: config.json, tokenizer and tensors that
    do not lie with the file are taken from it."""
    bits: int | None = None
    """Width of an index, 3 or 4, to check the file against; by default quant_config.json says it,
    or the tables do."""
    dtype: Dtype = "auto"
    """Dtype of what is not quantized; "auto": as it is stored."""
    table_dtype: TableDtype = "exact"
    """Dtype of lookup tables and sparse values; "exact": for each layer the first of float16,
    bfloat16 and float32 that holds its weights. The other choices round what they cannot hold."""
    max_shard_size: str = "5GB"
    """Split the safetensors files at this size."""
    overwrite: bool = False
    """Replace a checkpoint that is in OUT already."""
    revision: str | None = None
    """Branch, tag or commit of the base model on the Hub."""
    token: str | None = None
    """Hub access token; by default that of `hf auth login` or of HF_TOKEN."""
    trust_remote_code: bool = False
    """Run Python code that comes with the base model. Only for repositories whose code you have
    read."""

    def run(self) -> None:
        """Convert, save, and say what came out."""
        import torch

        from squeezellm_hf.integration.convert import convert_checkpoint

        if (self.out / "config.json").exists() and not self.overwrite:
            raise ValueError(f"OUT={str(self.out)!r} holds a checkpoint; --overwrite replaces it")
        if self.base_model is not None:
            check_name(self.base_model)
        start = time.monotonic()
        with _bar() as bar:
            task = bar.add_task("Converting", total=None, layer="")

            def progress(layer: str, number: int, total: int) -> None:
                bar.update(task, completed=number, total=total, layer=layer)

            conversion = convert_checkpoint(
                self.checkpoint,
                self.out,
                base_model=self.base_model,
                bits=self.bits,
                dtype=getattr(torch, self.dtype, None),
                table_dtype=getattr(torch, self.table_dtype, None),
                max_shard_size=self.max_shard_size,
                progress=progress,
                **self._hub,
            )
            bar.update(task, completed=bar.tasks[task].total or 0, layer="")
        tokenizer = self._tokenizer()
        if tokenizer is not None:
            tokenizer.save_pretrained(self.out)
        self._report(conversion, tokenizer is not None, time.monotonic() - start)

    @property
    def _hub(self) -> dict[str, Any]:
        return {
            "revision": self.revision,
            "token": self.token,
            "trust_remote_code": self.trust_remote_code,
        }

    def _tokenizer(self) -> Any:
        """The tokenizer beside the file, else the base model's; None where there is none."""
        from transformers import AutoTokenizer

        folder = self.checkpoint if self.checkpoint.is_dir() else self.checkpoint.parent
        places: list[tuple[str, dict[str, Any]]] = [(str(folder), {})]
        if self.base_model is not None:
            places.append((self.base_model, self._hub))
        for place, options in places:
            try:
                return AutoTokenizer.from_pretrained(place, **options)
            except Exception:  # whatever a tokenizer's own code raises: the model is saved already
                continue
        return None

    def _report(self, conversion: Any, has_tokenizer: bool, seconds: float) -> None:
        size = model_footprint(conversion.model)
        out = console()
        out.print(
            f"{size.n_quantized_weights:,} weights of {len(size.layers)} layers at "
            f"{size.bits_per_weight:.2f} bits a weight "
            f"({100 * size.sparse_fraction:.2f} % of them sparse), the whole model "
            f"{size.n_bytes / 1e6:,.1f} MB, in {seconds:.0f} s"
        )
        if conversion.from_base:
            out.print(f"{len(conversion.from_base)} tensors were read from {self.base_model}")
        if conversion.errors:
            worst = max(conversion.errors, key=conversion.errors.__getitem__)
            out.print(
                f"{len(conversion.errors)} layers are rounded, the largest error of a weight is "
                f"{conversion.errors[worst]:.2e} ({worst})"
            )
        else:
            out.print("All weights are exactly those of the file")
        if not has_tokenizer:
            out.print("No tokenizer was found; save one into the folder to use it with pipeline")
        out.print(f"Saved to {self.out}")


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[layer]}", markup=False),
        console=Console(stderr=True),
    )
