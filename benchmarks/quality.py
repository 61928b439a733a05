"""What quantization costs SmolLM2 in perplexity, on texts of the Brown corpus that it was not
calibrated on.

    python benchmarks/quality.py --json quality.json
    python benchmarks/quality.py --codebook guided --work-dir W

Calibration: 128 x 512 tokens of 450 texts; perplexity: 24 x 512 tokens of the 50 others.
"""

import argparse
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from brown import CACHE, split
from transformers import AutoModelForCausalLM, AutoTokenizer

from squeezellm_hf import SqueezeLLMConfig, quantize_model
from squeezellm_hf.calibration.datasets import token_batches
from squeezellm_hf.evaluation.environment import environment
from squeezellm_hf.evaluation.evaluate import evaluate
from squeezellm_hf.evaluation.footprint import model_footprint
from squeezellm_hf.evaluation.perplexity import perplexity
from squeezellm_hf.evaluation.report import (
    Column,
    decimals,
    megabytes,
    percent,
    print_table,
    write_json,
)

SPARSE = {"outlier_fraction": 0.004, "sensitive_fraction": 0.0005}
DENSE = {"outlier_fraction": 0.0, "sensitive_fraction": 0.0}
# The last number is the ratio to the original's perplexity that must not be exceeded, by codebook.
CASES: tuple[tuple[str, dict[str, Any], dict[str, float]], ...] = (
    ("4 bits, 0.45 % sparse", {"bits": 4, **SPARSE}, {"kmeans": 1.16, "guided": 1.07}),
    ("3 bits, 0.45 % sparse", {"bits": 3, **SPARSE}, {"kmeans": 1.65, "guided": 1.26}),
    ("2 bits, 0.45 % sparse", {"bits": 2, **SPARSE}, {"guided": 3.0}),
    ("4 bits, dense", {"bits": 4, **DENSE}, {"kmeans": 1.52}),
    ("3 bits, dense", {"bits": 3, **DENSE}, {}),
)
COLUMNS = (
    Column("model", "model"),
    Column("bits_per_weight", "bits/weight", decimals(2)),
    Column("bytes", "MB", megabytes),
    Column("perplexity", "perplexity", decimals(3)),
    Column("ratio", "/ original", decimals(4)),
    Column("target", "target", decimals(2)),
    Column("kl_mean", "KL, nats", decimals(4)),
    Column("top1_agreement", "same top-1", percent(2)),
    Column("seconds", "quantized in, s", decimals(0)),
)
LENGTH = 512


def main() -> None:
    """Quantize, evaluate, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="Hub id or folder (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--codebook", default="kmeans", choices=("kmeans", "lnq", "guided"))
    parser.add_argument("--bits", type=int, nargs="+", default=(4, 3, 2))
    parser.add_argument("--kinds", nargs="+", default=("sparse", "dense"))
    parser.add_argument("--n-samples", type=int, default=128)
    parser.add_argument("--n-windows", type=int, default=24)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--work-dir", type=Path, help="keep the calibration here, and resume")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    name = options.model or _smollm2()
    tokenizer = AutoTokenizer.from_pretrained(name)
    sequences = token_batches(
        split("train"), tokenizer, n_samples=options.n_samples, sequence_length=LENGTH
    )
    text = token_batches(
        split("test"), tokenizer, n_samples=options.n_windows, sequence_length=LENGTH
    )

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, options.dtype))

    original = load()
    before = perplexity(original, text, progress=True)
    rows = [
        {"model": "original", "bytes": original.get_memory_footprint(), **asdict(before)},
    ]
    with tempfile.TemporaryDirectory() as temporary:
        work_dir = str(options.work_dir or temporary)
        for label, fields, targets in CASES:
            if fields["bits"] not in options.bits or label.split()[-1] not in options.kinds:
                continue
            start = time.monotonic()
            config = SqueezeLLMConfig(
                dataset=sequences,
                n_samples=options.n_samples,
                sequence_length=LENGTH,
                work_dir=work_dir,
                codebook=options.codebook,
                **fields,
            )
            model = quantize_model(load(), tokenizer, config)
            seconds = time.monotonic() - start
            result = evaluate(model, text, original=original, progress=True)
            size = model_footprint(model)
            rows.append(
                {
                    "model": label,
                    "bits_per_weight": size.bits_per_weight,
                    "bytes": size.n_bytes,
                    **asdict(result.perplexity),
                    "ratio": result.perplexity.perplexity / before.perplexity,
                    "target": targets.get(options.codebook),
                    **(asdict(result.divergence) if result.divergence else {}),
                    "seconds": seconds,
                }
            )
    title = f"Brown corpus: calibrated on {options.n_samples}, tested on {options.n_windows}"
    print_table(rows, COLUMNS, f"{options.codebook}, {title} x {LENGTH} tokens, {options.dtype}")
    if options.json is not None:
        write_json(options.json, rows, model=Path(name).name, environment=environment())


def _smollm2() -> str:
    import sys

    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
    from smollm2 import build

    return str(build(CACHE / "SmolLM2-135M-Instruct"))


if __name__ == "__main__":
    main()
