"""Time one block's experts: fused in bf16 as transformers runs them, and quantized.

    python benchmarks/experts.py --json experts.json
    python benchmarks/experts.py --device cuda --tokens 1 8 64 512

Shapes of Qwen3-30B-A3B: 128 experts of 2048 -> 768 -> 2048, of which 8 are chosen a token, at
random here. All contenders take turns on the same tokens, which differ from turn to turn, so that
weights come from memory; medians.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import hardware
import torch
from kernels_cuda import quantized_weight
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from squeezellm_hf.integration.expand.experts import ExpandedExperts
from squeezellm_hf.nn import SqueezeLLMLinear

CHOSEN = 8


def quantized(fused: nn.Module, bits: int, device: str) -> nn.Module:
    """Experts of the same shapes with random tables, indices and 0.45 % of sparse values."""
    expanded = ExpandedExperts(fused, "meta")
    for expert in expanded:
        for name, linear in list(expert.items()):
            shape = (linear.out_features, linear.in_features)
            tensors = quantized_weight(*shape, bits, sparse=True, device=device)
            expert[name] = SqueezeLLMLinear.from_tensors(tensors, bits=bits, in_features=shape[1])
    return expanded


def contenders(
    shape: list[int], device: str, bits: list[int]
) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Functions of tokens and chosen experts; shape: experts, hidden size, width of an expert."""
    count, hidden, width = shape
    config = Qwen3MoeConfig(num_experts=count, hidden_size=hidden, moe_intermediate_size=width)
    with torch.device("meta"):
        fused = Qwen3MoeExperts(config).bfloat16()
    fused.to_empty(device=device)
    for parameter in fused.parameters():
        nn.init.normal_(parameter, std=0.02)
    modules = {f"{width} bits": quantized(fused, width, device) for width in bits}

    def call(module: nn.Module, kind: str | None = None) -> Callable[[Tensor, Tensor], Tensor]:
        def run(x: Tensor, index: Tensor) -> Tensor:
            if kind is not None:
                module.config._experts_implementation = kind
            weight = torch.full(index.shape, 1 / CHOSEN, dtype=x.dtype, device=x.device)
            result: Tensor = module(x, index, weight)
            return result

        return run

    plain = {f"bf16, {kind}": call(fused, kind) for kind in ("grouped_mm", "batched_mm", "eager")}
    return plain | {name: call(module) for name, module in modules.items()}


@torch.inference_mode()
def measure(
    calls: dict[str, Callable[[Tensor, Tensor], Tensor]],
    shape: list[int],
    tokens: int,
    device: str,
    turns: int,
) -> dict[str, float]:
    """Median milliseconds a call."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(turns + 2):
        x = torch.randn(tokens, shape[1], dtype=torch.bfloat16, device=device)
        index = torch.rand(tokens, shape[0], device=device).topk(CHOSEN).indices
        for name, call in calls.items():
            if name.endswith("batched_mm") and tokens > 64:
                continue  # it copies the weights of every expert for every token
            synchronize()
            start = time.perf_counter()
            call(x, index)
            synchronize()
            if turn > 1:
                times[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(t) for name, t in times.items() if t}


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--bits", nargs="+", type=int, default=[3, 4])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 16, 128])
    parser.add_argument("--shape", nargs=3, type=int, default=[128, 2048, 768],
                        metavar=("EXPERTS", "HIDDEN", "WIDTH"))  # fmt: skip
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    calls = contenders(args.shape, args.device, args.bits)
    table = Table("tokens", *calls)
    rows = []
    for tokens in args.tokens:
        times = measure(calls, args.shape, tokens, args.device, args.turns)
        rows.append({"tokens": tokens, "milliseconds": times})
        table.add_row(str(tokens), *(f"{times[n]:.2f}" if n in times else "" for n in calls))
    Console().print(table)
    if args.json is not None:
        document = {"hardware": hardware.stamp(args.device), "rows": rows}
        args.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
