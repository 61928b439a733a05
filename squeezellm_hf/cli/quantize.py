"""`squeezellm quantize MODEL OUT`."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from squeezellm_hf.cli.loading import Loading
from squeezellm_hf.cli.options import Flags, config_from
from squeezellm_hf.evaluation.allocation import (
    ALLOCATION_COLUMNS,
    allocation_rows,
    allocation_summary,
)
from squeezellm_hf.evaluation.footprint import model_footprint
from squeezellm_hf.evaluation.report import console, print_table
from squeezellm_hf.integration.config import SqueezeLLMConfig

DESCRIPTION = """Quantize a model and save it as an ordinary checkpoint.

  squeezellm quantize HuggingFaceTB/SmolLM2-135M-Instruct OUT
  squeezellm quantize MODEL OUT --bits 3 --dataset wikitext2 --device-map cuda
  squeezellm quantize MODEL OUT --dataset texts.jsonl --text-column body --n-samples 32
  squeezellm quantize MODEL OUT --overrides '{"re:.*down_proj": {"bits": 4}}' --bits 3
  squeezellm quantize MODEL OUT --bits 3 --preset best --dataset c4 --device-map cuda
  squeezellm quantize MODEL OUT --average-bits 3.3
  squeezellm quantize MODEL OUT --resume --push-to-hub you/model-4bit

What it costs. Time: a forward and a backward pass of each calibration
sequence, then k-means of every weight. Memory: the model, 4 bytes more for
every weight that is quantized, and the activations of one sequence. With the
preset "balanced", which is the default, Hessians come on top: about three
times the time; --preset fast leaves them out, --preset best distills as well.
Fewer --n-samples or a shorter --sequence-length save time, and cost little
quality down to about 10 samples.

What it gives. The size is about bits + 16 x 2^bits / in_features + 32 x
(outlier_fraction + sensitive_fraction) bits a weight; `squeezellm inspect
OUT` counts it exactly. --average-bits chooses bits and sparse part of each
layer for a given size, --target-kl for a given nearness to the original."""


@dataclass
class Command:
    """Quantize a model."""

    model: Positional[str]
    """Hub id or local folder of a model that is not quantized."""
    out: Positional[Path]
    """Folder to write to. It is changed only when everything is done."""
    overwrite: bool = False
    """Replace a checkpoint that is in OUT already."""
    push_to_hub: str | None = None
    """Upload the result to this Hub repository as well; it is made if it does not exist."""
    private: bool = False
    """Make that repository a private one."""
    resume: bool = False
    """Keep finished work in OUT.work (4 bytes a weight, removed at the end), and go on from what
    is there. The result is the same as without an interruption."""
    quantization: Flags = field(default_factory=Flags)
    loading: Loading = field(default_factory=Loading)

    def run(self) -> None:
        """Quantize, save, push, and say what came out."""
        config = config_from(self.quantization)
        self._check_out()
        _check_not_quantized(self.model, self.loading.config(self.model))
        tokenizer = self._tokenizer(config)
        config.tokenizer = tokenizer
        work_dir = self.out.with_name(f"{self.out.name}.work") if self.resume else None
        if work_dir is not None and config.work_dir is None:
            config.work_dir = str(work_dir)
        if self.push_to_hub is not None:
            _make_repository(self.push_to_hub, self.loading.token, self.private)
        start = time.monotonic()
        model = self.loading.model(self.model, any_kind=True, quantization_config=config)
        model.save_pretrained(self.out)
        tokenizer.save_pretrained(self.out)
        if self.push_to_hub is not None:
            model.push_to_hub(self.push_to_hub, token=self.loading.token)
            tokenizer.push_to_hub(self.push_to_hub, token=self.loading.token)
        if work_dir is not None and config.work_dir == str(work_dir):
            shutil.rmtree(work_dir, ignore_errors=True)
        self._report(model, time.monotonic() - start)

    def _check_out(self) -> None:
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"OUT={str(self.out)!r} is a file; a folder is needed")
        if (self.out / "config.json").exists() and not self.overwrite:
            raise ValueError(f"OUT={str(self.out)!r} holds a checkpoint; --overwrite replaces it")

    def _tokenizer(self, config: SqueezeLLMConfig) -> Any:
        """Load the tokenizer before the model: without one there is nothing to begin."""
        if config.tokenizer is not None:
            # Another repository: it has not the revisions of the model's.
            return replace(self.loading, revision=None).tokenizer(config.tokenizer)
        return self.loading.tokenizer(self.model)

    def _report(self, model: Any, seconds: float) -> None:
        size = model_footprint(model)
        out = console()
        out.print(
            f"{size.n_quantized_weights:,} weights of {len(size.layers)} layers at "
            f"{size.bits_per_weight:.2f} bits a weight "
            f"({100 * size.sparse_fraction:.2f} % of them sparse), the whole model "
            f"{size.n_bytes / 1e6:,.1f} MB, in {seconds:.0f} s"
        )
        budget = model.config.quantization_config.budget
        if budget is not None:
            print_table(allocation_rows(size), ALLOCATION_COLUMNS, "Bits, by kind of layer")
            out.print(allocation_summary(budget))
        distilled = model.config.quantization_config.distilled
        if distilled is not None:
            out.print(
                f"Distilled: KL to the original on held-out text "
                f"{distilled['divergence_before']:.4f} -> {distilled['divergence_after']:.4f} "
                f"nats a token, after {distilled['steps']:.0f} steps"
            )
        out.print(f"Saved to {self.out}")
        if self.push_to_hub is not None:
            out.print(f"Pushed to https://huggingface.co/{self.push_to_hub}")


def _check_not_quantized(name: str, config: Any) -> None:
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        method = (
            quantization.get("quant_method")
            if isinstance(quantization, dict)
            else getattr(quantization, "quant_method", None)
        )
        raise ValueError(
            f"{name!r} is quantized already ({getattr(method, 'value', method)}); "
            "quantize the original"
        )


def _make_repository(name: str, token: str | None, private: bool) -> None:
    """Make the repository first: a missing permission must not show after hours of work."""
    from huggingface_hub import HfApi

    HfApi(token=token).create_repo(name, private=private or None, exist_ok=True)
