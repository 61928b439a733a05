"""What 50 steps of LoRA give a SmolLM2 of 3 bits back, on texts of the Brown corpus that were in
neither calibration nor training.

    python benchmarks/finetuning.py --json finetuning.json

The loss is measured of the original, of the quantized model, with the adapter, with the adapter
reloaded onto a reloaded model, and after merge_and_unload (in bf16). The original gets an adapter
of the same training too: what it gains comes from the new text, not from healing the quantization.
"""

import argparse
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from brown import split
from peft import PeftModel
from quality import _smollm2
from transformers import AutoModelForCausalLM, AutoTokenizer

from squeezellm_hf import SqueezeLLMConfig
from squeezellm_hf.calibration.datasets import token_batches
from squeezellm_hf.evaluation.environment import environment
from squeezellm_hf.evaluation.perplexity import perplexity
from squeezellm_hf.evaluation.report import Column, decimals, megabytes, print_table, write_json

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from examples.lora import BATCH, fine_tune

COLUMNS = (
    Column("model", "model"),
    Column("bytes", "MB", megabytes),
    Column("nll", "held-out loss", decimals(4)),
    Column("perplexity", "perplexity", decimals(3)),
)
CALIBRATION_LENGTH = 512


def main() -> None:
    """Quantize, fine-tune, reload, merge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="Hub id or folder (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--n-samples", type=int, default=32, help="calibration, x 512 tokens")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--length", type=int, default=256, help="tokens a sequence, 2 a step")
    parser.add_argument("--n-windows", type=int, default=24, help="held-out, x length tokens")
    parser.add_argument("--work-dir", type=Path, help="keep the checkpoints here, and reuse them")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work_dir = options.work_dir or Path(temporary)
        rows, facts = measure(options, options.model or _smollm2(), work_dir)
    title = f"Brown corpus, {options.steps} steps of {BATCH} x {options.length} tokens, bf16"
    print_table(rows, COLUMNS, title)
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    if options.json is not None:
        write_json(options.json, rows, **facts, environment=environment())


def measure(options: Any, name: str, work_dir: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the rows of the table, and what else was measured."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    training = token_batches(
        split("train"), tokenizer, n_samples=options.steps * BATCH, sequence_length=options.length
    )
    held_out = token_batches(
        split("test"), tokenizer, n_samples=options.n_windows, sequence_length=options.length
    )
    rows: list[dict[str, Any]] = []

    def evaluate(label: str, model: Any) -> None:
        result = asdict(perplexity(model, held_out, progress=True))
        rows.append({"model": label, "bytes": model.get_memory_footprint(), **result})

    original = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)
    evaluate("original", original)
    quantized = work_dir / f"{Path(name).name}-{options.bits}bit"
    if not quantized.is_dir():
        config = SqueezeLLMConfig(
            preset="fast",
            bits=options.bits,
            dataset=split("train"),
            n_samples=options.n_samples,
            sequence_length=CALIBRATION_LENGTH,
        )
        AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.bfloat16, quantization_config=config
        ).save_pretrained(quantized)
    label = f"{options.bits} bits"
    model = AutoModelForCausalLM.from_pretrained(quantized)
    evaluate(label, model)

    def train(model: Any, folder: Path) -> tuple[Any, float]:
        torch.manual_seed(0)
        start = time.monotonic()
        model = fine_tune(model, training, str(folder), steps=options.steps, lr=options.lr)
        return model, round(time.monotonic() - start, 1)

    adapter = work_dir / "adapter"
    model, seconds = train(model, adapter)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    evaluate(f"{label} + adapter", model)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(quantized), adapter)
    evaluate(f"{label} + adapter, reloaded", model)
    evaluate("merged", model.merge_and_unload())
    model, seconds_original = train(original, work_dir / "adapter-of-the-original")
    evaluate("original + adapter", model)
    facts = {
        "model": Path(name).name,
        "steps": options.steps,
        "seconds": seconds,
        "seconds_original": seconds_original,
        "trained_parameters": trained,
    }
    return rows, facts


if __name__ == "__main__":
    main()
