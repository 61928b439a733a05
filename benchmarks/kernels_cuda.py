"""The part of kernels.py that times layers on a CUDA device.

A CUDA graph holds one call for each of several copies of the weight, together far beyond the L2
cache, so that weights come from memory as they do in a model; the time of a call is the median of
the graph's replays by the number of copies. bf16 linear layers and all kinds of weight take turns.
Results are checked before they are timed.
"""

import argparse
import itertools
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import hardware
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from squeezellm_hf import ops
from squeezellm_hf.formats import csr
from squeezellm_hf.ops import native

SPARSE_FRACTION = 0.0045
COPIES_BYTES = 640 << 20
INT4_GROUP = 128
INT4_MOST = 32  # batch beyond which torch's int4 product takes milliseconds
SHAPES = [(8192, 28672), (14336, 4096), (4096, 14336), (4096, 4096)]
BATCHES = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048]

Quantized = dict[str, Tensor]


@dataclass(frozen=True)
class Result:
    """Microseconds of a call, and ratios; ``kind``: linear, int4, or w and bits, + for sparse."""

    out_features: int
    in_features: int
    batch: int
    kind: str
    us: float
    over_linear: float
    share_of_bandwidth: float


def quantized_weight(
    out_features: int, in_features: int, bits: int, sparse: bool, device: str = "cuda"
) -> Quantized:
    """A random weight in the checkpoint's tensors, made on the device."""
    words = -(-in_features * bits // 32)
    limits = torch.iinfo(torch.int32)
    qweight = torch.randint(
        limits.min, limits.max, (out_features, words), dtype=torch.int32, device=device
    )
    if used := in_features * bits % 32:
        qweight[:, -1] &= 2**used - 1
    table = torch.randn(out_features, 2**bits, device=device) * 0.02
    tensors = {"qweight": qweight, "lookup_table": table.sort(1).values.half()}
    if sparse:
        mask = torch.rand(out_features, in_features, device=device) < SPARSE_FRACTION
        values = (torch.randn(out_features, in_features, device=device) * 0.1).half()
        tensors |= csr.csr_from_dense(mask, values)._asdict()
    return tensors


def int4_weight(out_features: int, in_features: int) -> Quantized:
    """torch's own 4-bit weight, groups of 128, with random content."""
    nibbles = torch.randint(
        0, 256, (out_features, in_features // 2), dtype=torch.uint8, device="cuda"
    )
    packed = torch.ops.aten._convert_weight_to_int4pack(nibbles, 8)
    scales = torch.rand(in_features // INT4_GROUP, out_features, 2, device="cuda")
    return {"packed": packed, "scales": scales.to(torch.bfloat16)}


def size_bytes(tensors: Quantized) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())


def copies(tensors: Quantized) -> list[Quantized]:
    count = max(2, -(-COPIES_BYTES // size_bytes(tensors)))
    return [{name: t.clone() for name, t in tensors.items()} for _ in range(count)]


def capture(run: Callable[[Quantized], Tensor], weights: list[Quantized]) -> torch.cuda.CUDAGraph:
    """A graph of one call for each weight."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(weights[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for weight in weights:
            run(weight)
    graph.replay()
    return graph


def replay_seconds(graph: torch.cuda.CUDAGraph) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def read_bandwidth() -> float:
    """Bytes a second that a reduction over 4 GiB reaches (best of nine)."""
    buffer = torch.ones(1 << 30, device="cuda")
    buffer.sum()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        buffer.sum()
    return size_bytes({"buffer": buffer}) / min(replay_seconds(graph) for _ in range(9))


def check(y: Tensor, x: Tensor, weight: Tensor) -> None:
    """Raise unless y is x W^T as well as 16-bit weights and products allow."""
    expected = x.double() @ weight.double().T
    error = float((y.double() - expected).norm() / expected.norm())
    if not error < 1e-2:
        raise AssertionError(f"lut_linear is wrong: relative error {error:.1e}")


def bench_layer(
    out_features: int, in_features: int, args: argparse.Namespace, bandwidth: float, bar: tqdm
) -> list[Result]:
    """All batches of one shape; all kinds of weight in turns, so that drifting clocks cancel."""
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float16
    kinds: dict[str, tuple[list[Quantized], Callable[[Tensor, Quantized], Tensor]]] = {}
    dense = torch.randn(out_features, in_features, device="cuda", dtype=dtype)
    kinds["linear"] = (
        copies({"weight": dense}),
        lambda x, w: torch.nn.functional.linear(x, w["weight"]),
    )
    if args.peers and dtype == torch.bfloat16 and in_features % 1024 == 0:
        kinds["int4"] = (
            copies(int4_weight(out_features, in_features)),
            lambda x, w: torch.ops.aten._weight_int4pack_mm(
                x, w["packed"], INT4_GROUP, w["scales"]
            ),
        )
    for bits, sparse in itertools.product(args.bits, (False, True)):
        weight = quantized_weight(out_features, in_features, bits, sparse)
        matrix = ops.lut_dequantize(
            **weight, bits=bits, in_features=in_features, dtype=torch.float32
        )
        for batch in args.batches or BATCHES:
            x = torch.randn(min(batch, 300), in_features, device="cuda", dtype=dtype)
            check(ops.lut_linear(x, **weight, bits=bits), x, matrix)
        del matrix
        kinds[f"w{bits}{'+' if sparse else ''}"] = (
            copies(weight),
            lambda x, w, bits=bits: ops.lut_linear(x, **w, bits=bits),  # type: ignore[misc]
        )

    results: list[Result] = []
    for batch in args.batches or BATCHES:
        x = torch.randn(batch, in_features, device="cuda", dtype=dtype)
        graphs = {}
        for kind, (weights, run) in kinds.items():
            if kind != "int4" or batch <= INT4_MOST:
                graphs[kind] = capture(lambda w, run=run, x=x: run(x, w), weights)  # type: ignore[misc]
        times: dict[str, list[float]] = {kind: [] for kind in graphs}
        for _ in range(args.repeats):
            for kind, graph in graphs.items():
                times[kind].append(replay_seconds(graph) / len(kinds[kind][0]))
        medians = {kind: statistics.median(seconds) for kind, seconds in times.items()}
        for kind, seconds in medians.items():
            moved = size_bytes(kinds[kind][0][0])
            moved += x.element_size() * batch * (in_features + out_features)
            results.append(
                Result(
                    out_features, in_features, batch, kind, seconds * 1e6,
                    medians["linear"] / seconds, moved / seconds / bandwidth,
                )
            )  # fmt: skip
        bar.update()
    return results


def print_tables(results: list[Result], batches: list[int], dtype: str, bandwidth: float) -> None:
    """A table a shape: microseconds, and the ratio to the linear layer of the same run."""
    for (out_features, in_features), group in itertools.groupby(
        results, lambda r: (r.out_features, r.in_features)
    ):
        cells = {(r.kind, r.batch): r for r in group}
        table = Table(
            title=f"{out_features} x {in_features}, {dtype}; us (x {dtype} linear); "
            f"memory reads at {bandwidth / 1e12:.2f} TB/s; + is {SPARSE_FRACTION:.2%} sparse"
        )
        table.add_column("")
        for batch in batches:
            table.add_column(str(batch), justify="right")
        for kind in dict.fromkeys(kind for kind, _ in cells):
            row = [cells.get((kind, batch)) for batch in batches]
            table.add_row(kind, *(f"{r.us:.1f} ({r.over_linear:.2f})" if r else "" for r in row))
        Console(width=200).print(table)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Time all layers, print their tables, return what goes into the JSON."""
    status = native.status()
    if not status.cuda_loaded:
        raise SystemExit(f"the CUDA kernels are not loaded: {status.cuda_reason}")
    if args.dtype == "fp32":
        raise SystemExit("--dtype must be bf16 or fp16 on a CUDA device")
    torch.manual_seed(0)
    bandwidth = read_bandwidth()
    document = {
        "hardware": hardware.stamp("cuda"),
        "read_bandwidth_bytes_per_s": bandwidth,
        "dtype": args.dtype,
    }
    results: list[Result] = []
    shapes, batches = args.shapes or SHAPES, args.batches or BATCHES
    with tqdm(total=len(shapes) * len(batches), unit="batch") as bar:
        for out_features, in_features in shapes:
            bar.set_description(f"{out_features} x {in_features}")
            results += bench_layer(out_features, in_features, args, bandwidth, bar)
            # What is measured is kept, whatever becomes of the shapes to come.
            document["results"] = [asdict(result) for result in results]
            if args.json is not None:
                args.json.write_text(json.dumps(document, indent=2) + "\n")
    print_tables(results, batches, args.dtype, bandwidth)
    return document
