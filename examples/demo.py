"""Quantize a model to 4 and 3 bits, reload it, and compare: size, quality, speed, an answer.

    python examples/demo.py                  SmolLM2-135M-Instruct from a PyPI package, no Hub
    python examples/demo.py --model ID       a model of the Hub, or a local folder

Every step is a public command in a process of its own, printed before it runs. Results go to
.cache/demo.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from squeezellm_hf.evaluation.report import Column, decimals, megabytes, percent, print_table

HERE = Path(__file__).resolve().parent
QUESTION = "What is the capital of France?"
# What differs between the two: the width of an index. Both have the paper's sparse part.
WIDTHS = (4, 3)
WINDOW = 512
# The most accurate that a small machine finishes in minutes; "best" distills for an hour there.
PRESET = "balanced"

COLUMNS = (
    Column("name", "model"),
    Column("file_bytes", "disk, MB", megabytes),
    Column("memory_bytes", "memory, MB", megabytes),
    Column("bits_per_weight", "bits/weight", decimals(2)),
    Column("perplexity", "perplexity", decimals(2)),
    Column("ratio", "/ original", decimals(3)),
    Column("top1_agreement", "same top-1", percent(1)),
    Column("decode_tokens_per_s", "tokens/s", decimals(1)),
    Column("decode_speedup", "x original", decimals(2)),
)


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="Hub id or folder (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--out", type=Path, default=Path(".cache/demo"), help="folder to write to")
    parser.add_argument("--n-samples", type=int, default=64, help="calibration sequences")
    parser.add_argument("--max-tokens", type=int, default=8192, help="tokens of held-out text")
    options = parser.parse_args()
    start = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    model = options.model or _smollm2(options.out / "SmolLM2-135M-Instruct")
    dtype = ("--dtype", fastest_dtype())
    quantized = {bits: options.out / f"{Path(model).name}-{bits}bit" for bits in WIDTHS}
    for bits, out in quantized.items():
        # Both find the same calibration in the work directory: it is computed once.
        calibration = ("--n-samples", str(options.n_samples), "--sequence-length", str(WINDOW))
        calibration = (*calibration, "--preset", PRESET)
        work = ("--work-dir", str(options.out / "work"), "--overwrite")
        _squeezellm("quantize", model, out, "--bits", str(bits), *calibration, *dtype, *work)
    compared = (*quantized.values(), "--reference", model, *dtype)
    text = ("--sequence-length", str(WINDOW), "--max-tokens", str(options.max_tokens))
    quality = _measured("eval", *compared, *text, out=options.out / "quality.json")
    speed = _measured("bench", *compared, out=options.out / "speed.json")
    models = {"original": model} | {f"{bits} bits": out for bits, out in quantized.items()}
    answers = {name: _answer(path) for name, path in models.items()}
    rows = [
        {**quality_row, **speed_row, "name": name}
        for name, quality_row, speed_row in zip(models, quality, speed, strict=True)
    ]
    print()
    print_table(rows, COLUMNS, f"{Path(model).name}: original and SqueezeLLM, preset {PRESET!r}")
    print(QUESTION)
    for name, answer in answers.items():
        print(f"  {name:>8}: {' '.join(answer.split())}")
    print(f"\nDone in {time.monotonic() - start:.0f} s; the models are in {options.out}")


def _smollm2(out: Path) -> str:
    _run(sys.executable, HERE / "smollm2.py", out)
    return str(out)


def fastest_dtype() -> str:
    """Time a matrix product: bfloat16 wins only on a CPU that has instructions for it."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(512, 1024, dtype=dtype) for _ in range(2))
        a @ b.T
        start = time.perf_counter()
        for _ in range(5):
            a @ b.T
        seconds[dtype] = time.perf_counter() - start
    return str(min(seconds, key=seconds.__getitem__)).removeprefix("torch.")


def _squeezellm(*arguments: object, capture: bool = False) -> None:
    _run(Path(sys.executable).with_name("squeezellm"), *arguments, capture=capture)


def _measured(command: str, *arguments: object, out: Path) -> list[dict[str, Any]]:
    """Run a command that measures, and return its rows: the original, then the widths."""
    _squeezellm(command, *arguments, "--json", out, capture=True)
    return list(json.loads(out.read_text())["rows"])


def _answer(model: object) -> str:
    """Ask a model in a process that imports transformers alone."""
    return _run(sys.executable, HERE / "pipeline.py", model, QUESTION, capture=True)


def _run(*command: object, capture: bool = False) -> str:
    words = [str(word) for word in command]
    print("$", Path(words[0]).name, *words[1:], flush=True)
    stdout = subprocess.PIPE if capture else None
    result = subprocess.run(words, stdout=stdout, text=True, check=False)
    if result.returncode:
        sys.exit(result.returncode)
    return result.stdout or ""


if __name__ == "__main__":
    main()
