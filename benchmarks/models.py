"""Time whole models with random weights through Transformers' own ``generate``.

    python benchmarks/models.py --models 8b 32b --json models.json
    python benchmarks/models.py --models 8b 70b --together 6    # compile all of them side by side
    python benchmarks/models.py --models 8b --layers 4 --weights bf16 w4    # a quick look

Batch 1, bf16 activations. Weights are ``bf16``, or ``w`` and the bits, with ``+`` for 0.45 % of
sparse values; embeddings and output head stay bf16. Two ways of generating: with a static cache,
for which ``generate`` compiles the decoding step itself (fullgraph, mode "reduce-overhead"), and
eager, as it does by default. Prefill is never compiled by ``generate``.

Decoding is timed between two lengths of text, so that prefill, the capture of the CUDA graph and
whatever else happens once per call cancel. Figures are medians. Peak memory is what torch's
allocator held at most while the compiled model generated, the weights included. Each model is a
process of its own; of those that are built and compiled side by side, one at a time is timed.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing.synchronize import Barrier, Lock
from pathlib import Path
from typing import Any

import hardware
import torch
import transformers
from random_models import config, plain_model, quantized_model, skeleton
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import CompileConfig

from squeezellm_hf.nn import SqueezeLLMLinear

START = 32  # tokens of the shorter text: compilation and capture are over by then
EAGER_START = 4
COMPILED, EAGER = "compiled", "eager"


@dataclass(frozen=True)
class Speed:
    """Tokens a second of one way of generating."""

    prefill: float
    decode: float


@dataclass(frozen=True)
class Result:
    """One model with one kind of weight. Sizes in bytes; ratios above 1 mean faster than bf16."""

    model: str
    weights: str
    layers: int
    linear_bytes: int
    other_bytes: int
    peak_bytes: int | None
    compiled: Speed | None
    eager: Speed | None
    cudagraph_skips: int
    decode_over_bf16: float | None = None
    eager_decode_over_bf16: float | None = None
    peak_over_bf16: float | None = None


class Generation:
    """Greedy generation of any number of tokens from a fixed prompt."""

    def __init__(self, model: Any, prompt_tokens: int, compiled: bool) -> None:
        device = model.device
        generator = torch.Generator().manual_seed(0)
        vocabulary = model.config.vocab_size
        ids = torch.randint(vocabulary, (1, prompt_tokens), generator=generator)
        self._model = model
        self._ids = ids.to(device)
        self._mask = torch.ones_like(self._ids)
        self._options: dict[str, Any] = {"do_sample": False, "pad_token_id": 0}
        if compiled:
            self._options["cache_implementation"] = "static"
            compile_config = CompileConfig(fullgraph=True, mode="reduce-overhead")
            compile_config._compile_all_devices = True  # on a CPU, too
            self._options["compile_config"] = compile_config
        else:
            self._options["disable_compile"] = True
        # Random weights must not end the text.
        model.generation_config.eos_token_id = None

    def run(self, tokens: int) -> Tensor:
        """The prompt and ``tokens`` more."""
        return self._model.generate(
            self._ids, attention_mask=self._mask, max_new_tokens=tokens, **self._options
        )

    def seconds(self, tokens: int) -> float:
        """Of one call."""
        synchronize(self._ids.device)
        start = time.perf_counter()
        text = self.run(tokens)
        synchronize(self._ids.device)
        seconds = time.perf_counter() - start
        if text.shape[1] != self._ids.shape[1] + tokens:
            raise AssertionError(f"{text.shape[1]} tokens came out of generate")
        return seconds

    def speed(self, start: int, tokens: int, repeats: int) -> Speed:
        """Of prefill, and of decoding ``tokens`` tokens behind the first ``start``."""
        prefill, decode = [], []
        for _ in range(repeats):
            prefill.append(self.seconds(1))
            decode.append(self.seconds(start + tokens) - self.seconds(start))
        return Speed(
            prefill=self._ids.shape[1] / statistics.median(prefill),
            decode=tokens / statistics.median(decode),
        )


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def bytes_of(model: nn.Module) -> tuple[int, int]:
    """Of the linear layers in the blocks, and of all else."""
    head = model.get_output_embeddings()
    linear = sum(
        parameter.nbytes
        for module in model.modules()
        if isinstance(module, nn.Linear | SqueezeLLMLinear) and module is not head
        for parameter in module.parameters(recurse=False)
    )
    return linear, sum(parameter.nbytes for parameter in model.parameters()) - linear


def build(name: str, weights: str, layers: int | None, device: str) -> nn.Module:
    made = config(name, layers)
    if weights == "bf16":
        return plain_model(made, device)
    return quantized_model(made, int(weights[1]), weights.endswith("+"), device)


def fits(name: str, weights: str, layers: int | None, device: str) -> bool:
    """Whether a bf16 model fits into the device's memory; any quantized one is tried."""
    if weights != "bf16" or device != "cuda":
        return True
    needed = sum(bytes_of(skeleton(config(name, layers))))
    return needed < 0.9 * torch.cuda.get_device_properties(0).total_memory


class Bench:
    """One model, built and compiled when the object is made."""

    def __init__(self, name: str, weights: str, args: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self._name, self._weights, self._args = name, weights, args
        self._model = build(name, weights, args.layers, args.device)
        self._generations = {
            way: Generation(self._model, args.prompt, compiled=way == COMPILED) for way in args.ways
        }
        for way, generation in self._generations.items():
            # The longest first, for it decides on the size of the cache.
            generation.run(START + args.tokens if way == COMPILED else 2)
            generation.run(1)
        if args.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def measure(self) -> Result:
        """Time all ways of generating."""
        args, on_gpu = self._args, self._args.device == "cuda"
        compiled = eager = peak = None
        if COMPILED in self._generations:
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            compiled = self._generations[COMPILED].speed(START, args.tokens, args.repeats)
            peak = torch.cuda.max_memory_allocated() if on_gpu else None
        if EAGER in self._generations:
            repeats = (args.repeats + 1) // 2
            eager = self._generations[EAGER].speed(EAGER_START, args.eager_tokens, repeats)
        linear_bytes, other_bytes = bytes_of(self._model)
        return Result(
            self._name, self._weights, self._model.config.num_hidden_layers, linear_bytes,
            other_bytes, peak, compiled, eager, counters["inductor"]["cudagraph_skips"],
        )  # fmt: skip


_shared: dict[str, Any] = {}


def share(ready: Barrier, timing: Lock) -> None:
    """Give a new process what it shares with those beside it."""
    _shared.update(ready=ready, timing=timing)


def bench_model(name: str, weights: str, args: argparse.Namespace) -> Result:
    """In a process of its own: build and compile, wait for the others, and time alone."""
    with torch.no_grad():
        try:
            bench = Bench(name, weights, args)
        finally:
            _shared["ready"].wait()
        with _shared["timing"]:
            return bench.measure()


def bench_together(jobs: list[tuple[str, str]], args: argparse.Namespace) -> list[Result]:
    """Results of the jobs that did not fail."""
    context = multiprocessing.get_context("spawn")
    cores = os.cpu_count() or 1
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(max(1, cores // len(jobs))))
    results = []
    with ProcessPoolExecutor(
        len(jobs), context, initializer=share, initargs=(context.Barrier(len(jobs)), context.Lock())
    ) as pool:
        futures = [pool.submit(bench_model, name, weights, args) for name, weights in jobs]
        for (name, weights), future in zip(jobs, futures, strict=True):
            try:
                results.append(future.result())
            except Exception as error:
                print(f"{name} {weights}: {type(error).__name__}: {error}", flush=True)
    return results


def with_ratios(result: Result, bf16: Result | None) -> Result:
    def ratio(ours: float | None, theirs: float | None) -> float | None:
        return None if ours is None or theirs is None else ours / theirs

    def decode(speed: Speed | None) -> float | None:
        return None if speed is None else speed.decode

    if bf16 is None:
        return result
    return Result(
        **{
            **{name: getattr(result, name) for name in Result.__dataclass_fields__},
            "decode_over_bf16": ratio(decode(result.compiled), decode(bf16.compiled)),
            "eager_decode_over_bf16": ratio(decode(result.eager), decode(bf16.eager)),
            "peak_over_bf16": ratio(result.peak_bytes, bf16.peak_bytes),
        }
    )


def print_table(results: list[Result], args: argparse.Namespace) -> None:
    table = Table(
        title=f"generate, batch 1, prompt of {args.prompt} tokens; tokens/s (x bf16); GB of memory"
    )
    for column in ("model", "weights"):
        table.add_column(column)
    for column in ("decode", "eager decode", "prefill", "linear GB", "other GB", "peak GB"):
        table.add_column(column, justify="right")

    def cell(value: float | None, ratio: float | None, digits: int) -> str:
        if value is None:
            return ""
        return f"{value:.{digits}f}" + ("" if ratio is None else f" ({ratio:.2f})")

    for r in results:
        prefill = r.compiled or r.eager
        table.add_row(
            r.model, r.weights,
            cell(r.compiled and r.compiled.decode, r.decode_over_bf16, 1),
            cell(r.eager and r.eager.decode, r.eager_decode_over_bf16, 1),
            cell(prefill and prefill.prefill, None, 0),
            f"{r.linear_bytes / 1e9:.2f}", f"{r.other_bytes / 1e9:.2f}",
            cell(r.peak_bytes and r.peak_bytes / 1e9, r.peak_over_bf16, 2),
        )  # fmt: skip
    Console(width=140).print(table)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["8b"], choices=["tiny", "8b", "32b", "70b"])
    parser.add_argument("--weights", nargs="+", default=["bf16", "w4+", "w3"],
                        help="bf16, or w and the bits, with + for a sparse part")  # fmt: skip
    parser.add_argument("--ways", nargs="+", default=[COMPILED, EAGER],
                        choices=[COMPILED, EAGER])  # fmt: skip
    parser.add_argument("--layers", type=int, help="blocks, for a quick look")
    parser.add_argument("--prompt", type=int, default=512, help="tokens")
    parser.add_argument("--tokens", type=int, default=128, help="timed, compiled")
    parser.add_argument("--eager-tokens", type=int, default=16, help="timed, eager")
    parser.add_argument("--repeats", type=int, default=5, help="half as many, eager")
    parser.add_argument("--together", type=int, default=1,
                        help="models compiled side by side; they must fit at once")  # fmt: skip
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(arguments)

    jobs = []
    for name, weights in itertools.product(args.models, args.weights):
        if fits(name, weights, args.layers, args.device):
            jobs.append((name, weights))
        else:
            print(f"{name} in {weights} does not fit into the device's memory", flush=True)
    measured: list[Result] = []
    for first in range(0, len(jobs), args.together):
        start = time.perf_counter()
        measured += bench_together(jobs[first : first + args.together], args)
        print(f"{time.perf_counter() - start:.0f} s", flush=True)
    bf16 = {result.model: result for result in measured if result.weights == "bf16"}
    results = [with_ratios(result, bf16.get(result.model)) for result in measured]
    print_table(results, args)
    if args.json is not None:
        document = {
            "hardware": hardware.stamp(args.device) | {"transformers": transformers.__version__},
            "prompt_tokens": args.prompt,
            "timed_tokens": {"compiled": args.tokens, "eager": args.eager_tokens},
            "results": [asdict(result) for result in results],
        }
        args.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
