"""What codebook distillation gives and costs on SmolLM2, on texts of the Brown corpus.

    python benchmarks/distill.py --write-data brown.safetensors
    python benchmarks/distill.py --data brown.safetensors bits=3,steps=300 bits=3,steps=1200 \\
        --device cuda --json distill.json

A case is ``bits=B,steps=N`` and, wanted or not, ``dense``, ``norms``, ``values``, ``indices``,
``lr=X``, ``batch=N``; any other ``name=value`` is a field of ``SqueezeLLMConfig``. The first
command tokenizes: the second then needs no network and no tokenizer.

Calibration: 128 x 512 tokens of 450 texts; distillation: all of these texts; perplexity: 24 x 512
tokens of the 50 others, and of Python's help texts.
"""

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from brown import split
from quality import _smollm2
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from squeezellm_hf import DistillationSettings, SqueezeLLMConfig, distill, quantize_model
from squeezellm_hf.calibration.datasets import token_batches, token_stream
from squeezellm_hf.evaluation.environment import environment
from squeezellm_hf.evaluation.evaluate import evaluate
from squeezellm_hf.evaluation.footprint import model_footprint
from squeezellm_hf.evaluation.report import Column, decimals, percent, print_table, write_json
from squeezellm_hf.ops import native

LENGTH = 512
N_CALIBRATION = 128
N_TEST = 24
DENSE: dict[str, Any] = {"outlier_fraction": 0.0, "sensitive_fraction": 0.0}
# Names in a case, and the settings that they stand for.
DISTILLATION = {
    "steps": "steps",
    "lr": "lr",
    "batch": "batch_size",
    "norms": "train_norms",
    "values": "train_values",
    "indices": "train_indices",
    "index_lr": "index_lr",
}
QUALITY = (
    Column("bits_per_weight", "bits/weight", decimals(2)),
    Column("perplexity", "perplexity", decimals(3)),
    Column("ratio", "/ original", decimals(4)),
    Column("other_ratio", "other text", decimals(4)),
    Column("kl_mean", "KL, nats", decimals(4)),
    Column("top1_agreement", "same top-1", percent(2)),
)
COLUMNS = (
    Column("model", "model"),
    *QUALITY,
    Column("steps", "steps"),
    Column("step_ms", "ms a step", decimals(0)),
    Column("seconds", "took, s", decimals(0)),
    Column("peak_gb", "peak GB", decimals(2)),
)


def write_data(path: Path, model: str) -> None:
    """Tokenize the texts: calibration and test sequences, and one long text to distill on."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    train, test = split("train"), split("test")
    size = {"sequence_length": LENGTH}
    data = {
        "calibration": token_batches(train, tokenizer, n_samples=N_CALIBRATION, **size),
        "distill": token_stream(train, tokenizer),
        "test": token_batches(test, tokenizer, n_samples=N_TEST, **size),
        "other": token_batches("builtin", tokenizer, n_samples=N_TEST, split="test", **size),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: ids.to(torch.int32) for name, ids in data.items()}, path)


def parse(case: str) -> dict[str, Any]:
    """ "bits=3,solver=exact,dense" -> {"bits": 3, "solver": "exact", "dense": True}"""

    def read(value: str) -> Any:
        try:
            return json.loads(value)
        except ValueError:
            return value

    items = (item.partition("=") for item in case.split(","))
    return {key: read(value) if equals else True for key, equals, value in items}


def main() -> None:
    """Quantize, distill, evaluate, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", default=["bits=3,steps=300"])
    parser.add_argument("--model", help="Hub id or folder (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--data", type=Path, help="what --write-data wrote")
    parser.add_argument("--write-data", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--micro-batch", type=int)
    parser.add_argument("--sequence-length", type=int, default=LENGTH)
    parser.add_argument("--n-test", type=int, default=N_TEST)
    parser.add_argument("--work-dir", type=Path, help="keep finished work here, and resume")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    name = options.model or _smollm2()
    if options.write_data is not None:
        write_data(options.write_data, name)
        return
    with tempfile.TemporaryDirectory() as temporary:
        path = options.data or Path(temporary) / "data.safetensors"
        if not path.is_file():
            write_data(path, name)
        data = {key: ids.to(torch.int64) for key, ids in load_file(path).items()}
        rows: list[Any] = []
        for row in measure(options, name, data, options.work_dir or Path(temporary)):
            print_table([row], COLUMNS)
            rows.append(row)
            if options.json is not None:
                write_json(options.json, rows, model=Path(name).name, environment=environment())
    print_table(rows, COLUMNS, f"Brown corpus, {options.device}, {options.dtype}")


def measure(options: Any, name: str, data: dict[str, Tensor], work_dir: Path) -> Iterator[Any]:
    """One row for every quantized model, and for every distilled one."""

    def load() -> Any:
        dtype = getattr(torch, options.dtype)
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(options.device)

    original = load()
    quantized: dict[str, Any] = {}
    for case in options.cases:
        given = parse(case)
        wanted = {name: given.pop(name) for name in DISTILLATION if name in given}
        label = ",".join(f"{name}={value}" for name, value in given.items())
        if label not in quantized:
            sparse = DENSE if given.pop("dense", False) else {}
            config = SqueezeLLMConfig(
                dataset=data["calibration"],
                n_samples=len(data["calibration"]),
                sequence_length=data["calibration"].shape[1],
                work_dir=str(work_dir),
                **{"preset": "fast", **sparse, **given},
            )
            start = time.monotonic()
            quantized[label] = quantize_model(load(), None, config)
            seconds = time.monotonic() - start
            row = evaluated(label, quantized[label], original, data, options)
            yield row | {"seconds": seconds}
        if "steps" not in wanted:
            continue
        model = copy.deepcopy(quantized[label])
        settings = DistillationSettings(
            sequence_length=options.sequence_length,
            micro_batch_size=options.micro_batch,
            **{DISTILLATION[name]: value for name, value in wanted.items()},
        )
        accelerator = torch.device(options.device).type != "cpu"
        if accelerator:
            torch.accelerator.reset_peak_memory_stats()
        # Cases share what is read of the original; its time belongs to the first alone.
        was_read = bool(list(work_dir.glob("teacher-*.bin")))
        start = time.monotonic()
        result = distill(model, original, settings, dataset=data["distill"], work_dir=work_dir)
        seconds = time.monotonic() - start
        row = evaluated(case, model, original, data, options)
        row |= {**asdict(result), "settings": asdict(settings), "seconds": seconds}
        row["step_ms"] = 1e3 * seconds / result.steps if was_read else None
        if accelerator:
            row["peak_gb"] = torch.accelerator.max_memory_allocated() / 1e9
        yield row


def _as_evaluated(model: Any) -> Any:
    """A plain model on a GPU without compiled kernels: their reference is slow."""
    on_cpu = model.device.type == "cpu"
    return model if on_cpu or native.status().cuda_loaded else copy.deepcopy(model).dequantize()


def evaluated(label: str, model: Any, original: Any, data: dict[str, Tensor], options: Any) -> Any:
    run = _as_evaluated(model)
    result = evaluate(run, data["test"][: options.n_test], original=original)
    other = evaluate(run, data["other"][: options.n_test], original=original)
    assert result.original_perplexity is not None
    assert other.original_perplexity is not None
    assert result.divergence is not None
    return {
        "model": label,
        "bits_per_weight": model_footprint(model).bits_per_weight,
        **asdict(result.perplexity),
        "original_perplexity": result.original_perplexity.perplexity,
        "ratio": result.perplexity.perplexity / result.original_perplexity.perplexity,
        "other_ratio": other.perplexity.perplexity / other.original_perplexity.perplexity,
        **asdict(result.divergence),
    }


if __name__ == "__main__":
    main()
