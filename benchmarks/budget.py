"""A bit budget against the same bits for every layer, at equal bits a weight as stored.

    python benchmarks/budget.py --codebook kmeans --work-dir W --json budget.json
    python benchmarks/budget.py --codebook guided --uniform 3:1 --average-bits 3.3 --work-dir W

Model, calibration and text are those of benchmarks/quality.py. First the uniform models,
"bits:part", with a sparse part of so many times 0.45 %; then for each a budget of the bits that it
really took, and those of --average-bits and --target-kl.
"""

import argparse
import sys
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
from squeezellm_hf.evaluation.allocation import ALLOCATION_COLUMNS, allocation_rows
from squeezellm_hf.evaluation.environment import environment
from squeezellm_hf.evaluation.evaluate import evaluate
from squeezellm_hf.evaluation.footprint import model_footprint
from squeezellm_hf.evaluation.perplexity import perplexity
from squeezellm_hf.evaluation.report import Column, decimals, percent, print_table, write_json

SPARSE = {"outlier_fraction": 0.004, "sensitive_fraction": 0.0005}
LENGTH = 512
COLUMNS = (
    Column("model", "model"),
    Column("bits_per_weight", "bits/weight", decimals(4)),
    Column("sparse_fraction", "sparse", percent(3)),
    Column("perplexity", "perplexity", decimals(3)),
    Column("ratio", "/ original", decimals(4)),
    Column("kl_mean", "KL, nats", decimals(4)),
    Column("predicted_kl", "predicted", decimals(4)),
    Column("top1_agreement", "same top-1", percent(2)),
    Column("seconds", "quantized in, s", decimals(0)),
)


def main() -> None:
    """Quantize, evaluate, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="Hub id or folder (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--codebook", default="kmeans", choices=("kmeans", "lnq", "guided"))
    parser.add_argument("--uniform", nargs="*", default=["3:1"])
    parser.add_argument("--not-matched", action="store_true", help="no budgets of their bits")
    parser.add_argument("--average-bits", type=float, nargs="*", default=[])
    parser.add_argument("--target-kl", type=float, nargs="*", default=[])
    parser.add_argument("--n-samples", type=int, default=128)
    parser.add_argument("--n-windows", type=int, default=24)
    parser.add_argument("--work-dir", type=Path, help="keep what is calibrated here, and resume")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    name = options.model or _smollm2()
    tokenizer = AutoTokenizer.from_pretrained(name)
    text = token_batches(
        split("test"), tokenizer, n_samples=options.n_windows, sequence_length=LENGTH
    )
    original = _load(name)
    before = perplexity(original, text, progress=True)
    rows: list[dict[str, Any]] = [{"model": "original", **asdict(before)}]
    with tempfile.TemporaryDirectory() as temporary:
        work_dir = str(options.work_dir or temporary)

        def measure(label: str, **fields: Any) -> dict[str, Any]:
            start = time.monotonic()
            config = SqueezeLLMConfig(
                preset="fast",
                codebook=options.codebook,
                dataset=split("train"),
                n_samples=options.n_samples,
                sequence_length=LENGTH,
                work_dir=work_dir,
                **fields,
            )
            model = quantize_model(_load(name), tokenizer, config)
            seconds = time.monotonic() - start
            size = model_footprint(model)
            if config.budget is not None:
                print_table(allocation_rows(size), ALLOCATION_COLUMNS, label)
                print(config.budget)
            result = evaluate(model, text, original=original, progress=True)
            rows.append(
                {
                    "model": label,
                    "sparse_fraction": size.sparse_fraction,
                    **asdict(result.perplexity),
                    "ratio": result.perplexity.perplexity / before.perplexity,
                    **(asdict(result.divergence) if result.divergence else {}),
                    **(config.budget or {}),
                    # The footprint's, not the budget's own count.
                    "bits_per_weight": size.bits_per_weight,
                    "seconds": seconds,
                }
            )
            return rows[-1]

        budgets = list(options.average_bits)
        for case in options.uniform:
            bits, part = case.split(":")
            sparse = {name: float(part) * value for name, value in SPARSE.items()}
            row = measure(f"uniform, {bits} bits + {part} x 0.45 %", bits=int(bits), **sparse)
            if not options.not_matched:
                budgets.append(row["bits_per_weight"])
        for average in budgets:
            measure(f"average_bits={average:.4f}", average_bits=average)
        for target in options.target_kl:
            measure(f"target_kl={target:g}", target_kl=target)
    print_table(rows, COLUMNS, f"{options.codebook}, {options.n_windows} x {LENGTH} tokens")
    if options.json is not None:
        write_json(
            options.json,
            rows,
            model=Path(name).name,
            codebook=options.codebook,
            environment=environment(),
        )


def _load(name: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)


def _smollm2() -> str:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
    from smollm2 import build

    return str(build(CACHE / "SmolLM2-135M-Instruct"))


if __name__ == "__main__":
    main()
