"""Time what the host spends on a call, for a layer too small to cost anything itself.

    python benchmarks/overhead.py --device cuda --json overhead.json

All contenders take turns of a few hundred calls; the figure is the median turn, in microseconds a
call. On a CUDA device a turn is timed up to the last launch, not to the end of the kernels.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import hardware
import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from squeezellm_hf.nn import SqueezeLLMLinear
from squeezellm_hf.ops import lut_linear

IN_FEATURES, OUT_FEATURES = 64, 32
BITS = 4
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MODES = {"no_grad": torch.no_grad, "grad": torch.enable_grad, "inference": torch.inference_mode}
CALLS = 300  # fewer than a CUDA device's queue of launches takes without waiting


def contenders(device: str, dtype: torch.dtype, batch: int) -> dict[str, Callable[[], object]]:
    """Calls to compare; the functions against each other, and the modules."""
    with torch.device(device):
        x = torch.randn(batch, IN_FEATURES, dtype=dtype)
        plain = torch.nn.Linear(IN_FEATURES, OUT_FEATURES, bias=False, dtype=dtype)
        plain.requires_grad_(False)  # as in a frozen model
        dense = SqueezeLLMLinear(IN_FEATURES, OUT_FEATURES, BITS)
        sparse = SqueezeLLMLinear(IN_FEATURES, OUT_FEATURES, BITS, nnz=OUT_FEATURES)
    sparse.crow_indices.copy_(torch.arange(OUT_FEATURES + 1))
    tensors = {name: parameter.data for name, parameter in sparse.named_parameters()}
    weight = plain.weight.data
    return {
        "F.linear": lambda: F.linear(x, weight),
        "lut_linear, sparse part": lambda: lut_linear(x, bits=BITS, **tensors),
        "nn.Linear": lambda: plain(x),
        "SqueezeLLMLinear": lambda: dense(x),
        "SqueezeLLMLinear, sparse part": lambda: sparse(x),
    }


def measure(calls: dict[str, Callable[[], object]], device: str, turns: int) -> dict[str, float]:
    """Median microseconds a call."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(turns + 2):
        for name, call in calls.items():
            synchronize()
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            seconds = time.perf_counter() - start
            if turn >= 2:
                times[name].append(seconds / CALLS * 1e6)
    synchronize()
    return {name: statistics.median(turn) for name, turn in times.items()}


def print_table(results: dict[str, dict[str, float]], device: str) -> None:
    """Microseconds a call by grad mode; behind each, what it takes more than torch's own."""
    table = Table(title=f"host us a call on {device} (more than torch's own)")
    table.add_column("")
    for mode in results:
        table.add_column(mode, justify="right")
    for name in next(iter(results.values())):
        baseline = "nn.Linear" if name.startswith("SqueezeLLM") else "F.linear"
        cells = [
            f"{us[name]:.2f}"
            if name in ("F.linear", "nn.Linear")
            else f"{us[name]:.2f} ({us[name] - us[baseline]:+.2f})"
            for us in results.values()
        ]
        table.add_row(name, *cells)
    Console(width=100).print(table)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=list(DTYPES),
                        help="of activations (default: fp32 on the CPU, else bf16)")  # fmt: skip
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--turns", type=int, default=50)
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(arguments)

    torch.set_num_threads(1)  # no thread is woken for so little
    dtype = args.dtype or ("bf16" if args.device == "cuda" else "fp32")
    calls = contenders(args.device, DTYPES[dtype], args.batch)
    results = {}
    for mode in args.modes:
        with MODES[mode]():
            results[mode] = measure(calls, args.device, args.turns)
    print_table(results, args.device)
    if args.json is not None:
        document = {
            "hardware": hardware.stamp(args.device),
            "device": args.device,
            "dtype": dtype,
            "batch": args.batch,
            "us": results,
        }
        args.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
