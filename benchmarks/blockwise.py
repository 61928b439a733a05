"""Quantize a model with random weights block by block, and look at the device's memory.

    python benchmarks/blockwise.py --model 8b --layers 4 --json blockwise.json
    python benchmarks/blockwise.py --model tiny --device cpu

The model is in CPU memory. The device's peak does not depend on the number of blocks
(``--layers``), the time does. The limit is 0.4 x the bf16 size of the whole model + 8 GB.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import hardware
import torch
from random_models import config, plain_model, skeleton

from squeezellm_hf import SqueezeLLMConfig, quantize_model


@dataclass(frozen=True)
class Result:
    """Sizes in bytes; ``limit_bytes`` for a model with all its blocks."""

    model: str
    layers: int
    codebook: str
    tokens: int
    seconds: float
    peak_bytes: int | None
    limit_bytes: int
    model_bytes: int


def measure(args: argparse.Namespace, codebook: str) -> Result:
    made = config(args.model, args.layers)
    # Random weights come faster from the device, block by block as they are made.
    model = plain_model(made, args.device).cpu()
    ids = torch.randint(made.vocab_size, (args.n_samples, args.sequence_length))
    asked = SqueezeLLMConfig(
        bits=3, codebook=codebook, dataset=ids, blockwise=True,
        n_samples=args.n_samples, sequence_length=args.sequence_length,
    )  # fmt: skip
    on_gpu = args.device == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    quantize_model(model, None, asked)
    seconds = time.perf_counter() - start
    whole = sum(2 * p.numel() for p in skeleton(config(args.model)).parameters())
    return Result(
        args.model, made.num_hidden_layers, codebook, ids.numel(), seconds,
        torch.cuda.max_memory_allocated() if on_gpu else None, int(0.4 * whole + 8e9), whole,
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="8b", choices=["tiny", "8b", "32b", "70b"])
    parser.add_argument("--layers", type=int, help="blocks; default: the model's own")
    parser.add_argument("--codebooks", nargs="+", default=["kmeans", "guided"],
                        choices=["kmeans", "lnq", "guided"])  # fmt: skip
    parser.add_argument("--n-samples", type=int, default=32)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    results = []
    for codebook in args.codebooks:
        result = measure(args, codebook)
        results.append(asdict(result))
        peak = "" if result.peak_bytes is None else f"{result.peak_bytes / 1e9:.1f} GB at most, "
        print(
            f"{result.model}, {result.layers} blocks, {codebook}, {result.tokens} tokens: {peak}"
            f"limit {result.limit_bytes / 1e9:.1f} GB; {result.seconds:.0f} s",
            flush=True,
        )
        if args.json is not None:
            document = {"hardware": hardware.stamp(args.device), "results": results}
            args.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
