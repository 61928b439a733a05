"""Quantizers side by side: the same model, calibration data and text, bits counted the same way.

Bits per weight are all bits that are stored for the quantized weights (indices, tables, scales,
zero points, permutations, sparse values and their positions), divided by the number of these
weights. Every method quantizes the same layers: those that SqueezeLLM quantizes by default.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.quantizers import HfQuantizer

from squeezellm_hf.evaluation.cases import OURS, Case
from squeezellm_hf.evaluation.evaluate import evaluate
from squeezellm_hf.evaluation.remembered import RememberedModel
from squeezellm_hf.evaluation.report import Row, write_json
from squeezellm_hf.methods.squeezellm import SqueezeLLMParameters
from squeezellm_hf.pipeline import make_plan
from squeezellm_hf.pipeline.work_dir import fingerprint

ORIGINAL = "original"


def compare(
    load: Callable[[], Any],
    cases: Sequence[Case],
    calibration: Tensor,
    text: Tensor,
    *,
    work_dir: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Iterator[dict[str, Any]]:
    """Quantize, measure and forget one model after the other.

    Args:
        load: Loads the original causal language model of transformers.
        cases: What to compare; all of them must be installed.
        calibration: Token ids, int64 [n_samples, sequence_length].
        text: What to predict, int64 [n_windows, length].
        work_dir: Keeps the row of every finished case; a comparison that is started again with
            the same model and data takes them from there.
        progress: Show progress bars.

    Yields:
        First the original's row, then one a case: "case", "method", "bits_per_weight", "bytes" of
        the whole model, "perplexity", "ratio" to the original's, "kl_mean", "kl_99",
        "top1_agreement", "n_tokens" and "seconds" of quantization.
    """
    original = load().eval()
    layers = layer_names(original)
    weights = [original.get_submodule(name).weight for name in layers]
    n_weights = sum(weight.numel() for weight in weights)
    n_bytes = original.get_memory_footprint()
    others = n_bytes - sum(weight.numel() * weight.element_size() for weight in weights)
    run = f"{fingerprint(original, calibration)} {text.numpy().tobytes().hex()}"
    remembered = RememberedModel(original)
    start = evaluate(remembered, text, progress=progress).perplexity
    yield {
        "case": ORIGINAL,
        "method": ORIGINAL,
        "bits_per_weight": 8 * (n_bytes - others) / n_weights,
        "bytes": n_bytes,
        **asdict(start),
        "ratio": 1.0,
    }
    for case in cases:
        kept = _row_path(work_dir, run, case)
        if kept is not None and kept.is_file():
            yield json.loads(kept.read_text())["rows"][0]
            continue
        model = load().eval()
        begin = time.monotonic()
        n_bits = case.peer.quantize(model, layers, calibration, progress=progress)
        seconds = time.monotonic() - begin
        result = evaluate(model, text, original=remembered, progress=progress)
        row = {
            "case": case.text,
            "method": case.method,
            "bits_per_weight": n_bits / n_weights,
            "bytes": others + n_bits // 8,
            **asdict(result.perplexity),
            "ratio": result.perplexity.perplexity / start.perplexity,
            **(asdict(result.divergence) if result.divergence else {}),
            "seconds": seconds,
        }
        del model
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_json(kept, [row])
        yield row


def layer_names(model: Any) -> list[str]:
    """Return the linear layers that are quantized by default."""
    skip = HfQuantizer.get_modules_to_not_convert(
        model, [], getattr(model, "_keep_in_fp32_modules", None), add_default_skips=True
    )
    return list(make_plan(model, SqueezeLLMParameters(), skip=skip))


def beaten_by(row: Row, rows: Sequence[Row], tolerance: float = 0.02) -> str | None:
    """Return the best other method that takes no more bits and is no worse.

    Args:
        row: One of `rows`.
        rows: Of a comparison.
        tolerance: Bits per weight that count as equal.

    Returns:
        Its case, or None if there is none.
    """
    better = [
        other
        for other in rows
        if (other["method"] == OURS) != (row["method"] == OURS)
        and other["bits_per_weight"] <= row["bits_per_weight"] + tolerance
        and other["perplexity"] <= row["perplexity"]
    ]
    return min(better, key=lambda other: other["perplexity"])["case"] if better else None


def _row_path(work_dir: str | os.PathLike[str] | None, run: str, case: Case) -> Path | None:
    if work_dir is None:
        return None
    key = hashlib.sha256(f"{run} {case.text}".encode()).hexdigest()[:16]
    return Path(work_dir) / f"compared-{key}.json"
