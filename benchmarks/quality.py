"""What quantization costs SmolLM2 in perplexity, on texts of the Brown corpus that it was not
calibrated on: `squeezellm compare` of our own cases, with the ratios that are not to be exceeded.

    python benchmarks/quality.py --json quality.json
    python benchmarks/quality.py --codebook guided --work-dir W

Calibration: 128 x 512 tokens of 450 texts; perplexity: 24 x 512 tokens of the 50 others. Against
other quantizers: `python benchmarks/brown.py FOLDER` writes these texts for `squeezellm compare`.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from brown import CACHE, split
from transformers import AutoModelForCausalLM, AutoTokenizer

from squeezellm_hf.calibration.datasets import token_batches
from squeezellm_hf.evaluation.cases import parse_case
from squeezellm_hf.evaluation.compare import compare
from squeezellm_hf.evaluation.environment import environment
from squeezellm_hf.evaluation.report import (
    Column,
    decimals,
    megabytes,
    percent,
    print_table,
    write_json,
)

DENSE = ",outlier_fraction=0,sensitive_fraction=0"
# The last number is the ratio to the original's perplexity that must not be exceeded, by codebook.
CASES: tuple[tuple[int, str, str, dict[str, float]], ...] = (
    (4, "sparse", "", {"kmeans": 1.16, "guided": 1.07}),
    (3, "sparse", "", {"kmeans": 1.65, "guided": 1.26}),
    (2, "sparse", "", {"guided": 3.0}),
    (4, "dense", DENSE, {"kmeans": 1.52}),
    (3, "dense", DENSE, {}),
)
COLUMNS = (
    Column("case", "case"),
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
    parser.add_argument("--work-dir", type=Path, help="keep finished work here, and resume")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    name = options.model or _smollm2()
    tokenizer = AutoTokenizer.from_pretrained(name)
    sequences, text = (
        token_batches(split(part), tokenizer, n_samples=count, sequence_length=LENGTH)
        for part, count in (("train", options.n_samples), ("test", options.n_windows))
    )
    with tempfile.TemporaryDirectory() as temporary:
        work_dir = str(options.work_dir or temporary)
        targets = {
            f"squeezellm:bits={bits},codebook={options.codebook}{fields}": by_codebook
            for bits, kind, fields, by_codebook in CASES
            if bits in options.bits and kind in options.kinds
        }
        rows = [
            {**row, "target": targets.get(row["case"], {}).get(options.codebook)}
            for row in compare(
                lambda: AutoModelForCausalLM.from_pretrained(
                    name, dtype=getattr(torch, options.dtype)
                ),
                [parse_case(case, work_dir) for case in targets],
                sequences,
                text,
                work_dir=work_dir,
                progress=True,
            )
        ]
    title = f"Brown corpus: calibrated on {options.n_samples}, tested on {options.n_windows}"
    print_table(rows, COLUMNS, f"{title} x {LENGTH} tokens, {options.dtype}")
    if options.json is not None:
        write_json(options.json, rows, model=Path(name).name, environment=environment())


def _smollm2() -> str:
    import sys

    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
    from smollm2 import build

    return str(build(CACHE / "SmolLM2-135M-Instruct"))


if __name__ == "__main__":
    main()
