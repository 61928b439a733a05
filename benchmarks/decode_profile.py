"""Where the time of a decoding step on a CUDA device goes: by kernel, and idle for the host.

    python benchmarks/decode_profile.py 8b
    python benchmarks/decode_profile.py 32b --layers 8 --weights bf16 w4+ w3
    python benchmarks/decode_profile.py 8b --layers 8 --weights w4+ --grouping off on

A model with random weights through Transformers' compiled ``generate``, batch 1, static cache, as
in models.py. Wall time is the difference of two lengths of text without a profiler; the CUDA
graph's is that between events around its replay, a median; kernels are those that the profiler
counts more of in the longer text.
"""

import argparse
import itertools
import statistics
from collections import Counter
from unittest.mock import patch

import torch
from models import Generation, build
from torch.profiler import ProfilerActivity, profile

from squeezellm_hf.nn import grouping

PROMPT, SHORT, LONG = 512, 32, 96


def kernels(generation: Generation, tokens: int) -> tuple[Counter[str], Counter[str]]:
    """Microseconds and calls by kernel, of one text."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        generation.run(tokens)
    microseconds: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            microseconds[event.name] += event.device_time
            calls[event.name] += 1
    return microseconds, calls


def graph_microseconds(generation: Generation) -> float:
    """Of a token's CUDA graph: all that torch.compile made of the decoding step."""
    pairs = []
    replay = torch.cuda.CUDAGraph.replay

    def timed(graph: torch.cuda.CUDAGraph) -> None:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay(graph)
        end.record()
        pairs.append((start, end))

    with patch.object(torch.cuda.CUDAGraph, "replay", timed):
        generation.run(LONG)
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs) * 1e3


def report(name: str, weights: str, layers: int | None, rows: int, grouped: bool) -> None:
    """Print the kernels of a decoding step that take longest."""
    model = build(name, weights, layers, "cuda")
    (grouping.enable if grouped else grouping.disable)()
    generation = Generation(model, PROMPT, compiled=True)
    for tokens in (LONG, SHORT, LONG):
        generation.run(tokens)
    tokens = LONG - SHORT
    seconds = min(generation.seconds(LONG) for _ in range(3))
    seconds -= min(generation.seconds(SHORT) for _ in range(3))
    short, long = kernels(generation, SHORT), kernels(generation, LONG)
    microseconds = {k: (long[0][k] - short[0][k]) / tokens for k in long[0]}
    calls = {k: (long[1][k] - short[1][k]) / tokens for k in long[1]}
    print(
        f"{name}, {model.config.num_hidden_layers} blocks, {weights}"
        f"{'' if grouped else ', a call for each layer'}: "
        f"{seconds / tokens * 1e6:.0f} us a token, "
        f"{graph_microseconds(generation):.0f} of its CUDA graph, "
        f"the device busy for {sum(microseconds.values()):.0f} with "
        f"{sum(calls.values()):.0f} kernels"
    )
    for kernel in sorted(microseconds, key=lambda k: -microseconds[k])[:rows]:
        print(f"  {microseconds[kernel]:8.1f} us {calls[kernel]:6.1f} x {kernel[:100]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=["8b", "32b", "70b"])
    parser.add_argument("--weights", nargs="+", default=["bf16", "w4+", "w3"],
                        help="bf16, or w and the bits, with + for a sparse part")  # fmt: skip
    parser.add_argument("--layers", type=int, help="blocks; default: the model's own")
    parser.add_argument("--grouping", nargs="+", choices=["on", "off"], default=["on"],
                        help="whether layers of one input are one call, with norms")  # fmt: skip
    parser.add_argument("--rows", type=int, default=16, help="kernels to print")
    args = parser.parse_args()
    for weights, grouped in itertools.product(args.weights, args.grouping):
        if weights == "bf16" and grouped == "off" and "on" in args.grouping:
            continue
        torch.manual_seed(0)
        with torch.no_grad():
            report(args.model, weights, args.layers, args.rows, grouped == "on")
        torch._dynamo.reset()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
