"""The part of kernels.py that times layers on the CPU.

Contenders take turns. Each call takes the next of several copies of its weight, together four times
the last-level cache, so that weights come from memory as they do in a model. Results are checked
before they are timed.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import hardware
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from squeezellm_hf import ops
from squeezellm_hf.formats import csr, packing
from squeezellm_hf.ops import native, reference

SPARSE_FRACTION = 0.0045
SHAPES = [(4096, 4096), (11008, 4096)]
BATCHES = [1, 8, 64]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

Quantized = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A layer, a batch, and how the weight is stored: bits, with or without a sparse part."""

    out_features: int
    in_features: int
    batch: int
    bits: int
    sparse: bool


@dataclass(frozen=True)
class Result(Case):
    """Microseconds (medians), and ratios to them: above 1 means that lut_linear is faster."""

    us: float
    gb_per_s: float
    share_of_bandwidth: float
    over_linear: float
    over_int4: float | None
    over_reference: float | None
    linear_us: float
    int4_us: float | None
    reference_us: float | None


def quantized_weight(case: Case, generator: torch.Generator) -> Quantized:
    """A random weight in the checkpoint's tensors."""
    shape = (case.out_features, case.in_features)
    indices = torch.randint(0, 2**case.bits, shape, dtype=torch.uint8, generator=generator)
    table = torch.randn(case.out_features, 2**case.bits, generator=generator) * 0.02
    tensors = {
        "qweight": packing.pack(indices, case.bits),
        "lookup_table": table.sort(1).values.half(),
    }
    if case.sparse:
        mask = torch.rand(shape, generator=generator) < SPARSE_FRACTION
        values = (torch.randn(shape, generator=generator) * 0.1).half()
        tensors |= csr.csr_from_dense(mask, values)._asdict()
    return tensors


def size_bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def copies(tensors: Quantized, total: int) -> list[Quantized]:
    """Copies that together fill ``total`` bytes."""
    count = max(2, -(-total // size_bytes(list(tensors.values()))))
    return [{name: t.clone() for name, t in tensors.items()} for _ in range(count)]


class Contender:
    """A function of (x, weight), with the weights it goes through."""

    def __init__(self, run: Callable[[Quantized], Tensor], weights: list[Quantized]) -> None:
        self._run = run
        self._weights = itertools.cycle(weights)
        self.times: list[float] = []

    def time(self, calls: int) -> None:
        """Record the mean of ``calls`` calls, in seconds."""
        start = time.perf_counter()
        for _ in range(calls):
            self._run(next(self._weights))
        self.times.append((time.perf_counter() - start) / calls)

    @property
    def us(self) -> float:
        return statistics.median(self.times) * 1e6


def int4_weight(out_features: int, in_features: int) -> Quantized:
    """torch's own 4-bit weight, groups of 32, with random content."""
    weight = torch.randint(0, 16, (out_features, in_features), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight, 2)
    scales = torch.rand(in_features // 32, out_features, 2).to(torch.bfloat16)
    return {"packed": packed, "scales": scales}


def check(y: Tensor, x: Tensor, weight: Tensor) -> None:
    """Raise unless y is x W^T as well as its dtype allows."""
    expected = x.double() @ weight.double().T
    error = float((y.double() - expected).abs().max() / expected.abs().max())
    limit = 1e-5 if y.dtype == torch.float32 else 1e-2
    if not error < limit:
        raise AssertionError(f"lut_linear is wrong: relative error {error:.1e}")


def bench_layer(
    out_features: int, in_features: int, args: argparse.Namespace, bandwidth: float
) -> list[Result]:
    """All widths and batches of one shape, in turns."""
    generator = torch.Generator().manual_seed(0)
    total = 4 * hardware.last_level_cache_bytes()
    dtype = DTYPES[args.dtype]
    dense = torch.randn(out_features, in_features, generator=generator) * 0.02
    dense_copies = copies({"weight": dense.to(torch.bfloat16)}, total)
    # Without a native bf16 product, torch's int4 needs in_features to be a multiple of its group.
    int4_copies = None
    if in_features % 32 == 0 and out_features % 16 == 0:
        int4_copies = copies(int4_weight(out_features, in_features), total)
    weights = {}
    for bits, sparse in itertools.product(args.bits, (False, True)):
        case = Case(out_features, in_features, 1, bits, sparse)
        weights[bits, sparse] = copies(quantized_weight(case, generator), total)

    results = []
    for batch in args.batches or BATCHES:
        x = torch.randn(batch, in_features, generator=generator).to(dtype)
        x_bf16 = x.to(torch.bfloat16)
        linear = Contender(
            lambda w, x=x_bf16: torch.nn.functional.linear(x, w["weight"]), dense_copies
        )
        contenders: dict[Any, Contender] = {"linear": linear}
        if int4_copies is not None and batch == 1:
            contenders["int4"] = Contender(
                lambda w, x=x_bf16: torch.ops.aten._weight_int4pack_mm_for_cpu(
                    x, w["packed"], 32, w["scales"]
                ),
                int4_copies,
            )
        for (bits, sparse), stored in weights.items():
            dequantized = ops.lut_dequantize(
                **stored[0], bits=bits, in_features=in_features, dtype=torch.float32
            )
            check(ops.lut_linear(x, **stored[0], bits=bits), x, dequantized)
            contenders[bits, sparse] = Contender(
                lambda w, x=x, bits=bits: ops.lut_linear(x, **w, bits=bits), stored
            )
        for contender in contenders.values():
            contender.time(1)  # a warm-up
        slowest = max(contender.times.pop() for contender in contenders.values())
        calls = max(1, min(8, int(0.02 / slowest)))
        for _ in range(args.repeats):
            for contender in contenders.values():
                contender.time(calls)

        for (bits, sparse), stored in weights.items():
            us = contenders[bits, sparse].us
            int4_us = contenders["int4"].us if "int4" in contenders else None
            reference_us = None
            if args.reference:
                tensors = {"crow_indices": None, "col_indices": None, "values": None, **stored[0]}
                slow = Contender(
                    lambda w, x=x, bits=bits: reference.lut_linear(x, **w, bias=None, bits=bits),
                    [tensors],
                )
                slow.time(1)
                slow.time(1)
                reference_us = min(slow.times) * 1e6
            moved = size_bytes(list(stored[0].values())) + x.element_size() * batch * (
                in_features + out_features
            )
            results.append(
                Result(
                    out_features, in_features, batch, bits, sparse, us,
                    gb_per_s=moved / us / 1e3,
                    share_of_bandwidth=moved / us * 1e6 / bandwidth,
                    over_linear=linear.us / us,
                    over_int4=None if int4_us is None else int4_us / us,
                    over_reference=None if reference_us is None else reference_us / us,
                    linear_us=linear.us, int4_us=int4_us, reference_us=reference_us,
                )
            )  # fmt: skip
    return results


def print_table(results: list[Result], bandwidth: float, dtype: str) -> None:
    title = f"lut_linear, {dtype} activations; memory reads at {bandwidth / 1e9:.1f} GB/s"
    table = Table(title=title)
    for column in ("out x in", "batch", "bits", "sparse"):
        table.add_column(column)
    for column in ("us", "GB/s", "of bandwidth", "x bf16 linear", "x int4", "x reference"):
        table.add_column(column, justify="right")
    for r in results:
        ratios = [r.over_linear, r.over_int4, r.over_reference]
        table.add_row(
            f"{r.out_features} x {r.in_features}", str(r.batch), str(r.bits),
            f"{SPARSE_FRACTION:.2%}" if r.sparse else "-",
            f"{r.us:.1f}", f"{r.gb_per_s:.1f}", f"{r.share_of_bandwidth:.0%}",
            *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
            end_section=r is results[-1] or (r.sparse and r.bits == max(o.bits for o in results)),
        )  # fmt: skip
    Console(width=120).print(table)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Time all layers, print their table, return what goes into the JSON."""
    native.set_instruction_set(args.isa)
    bandwidth = hardware.read_bandwidth()
    results: list[Result] = []
    for out_features, in_features in args.shapes or SHAPES:
        results += bench_layer(out_features, in_features, args, bandwidth)
    print_table(results, bandwidth, args.dtype)
    return {
        "hardware": hardware.stamp(),
        "read_bandwidth_bytes_per_s": bandwidth,
        "dtype": args.dtype,
        "results": [asdict(result) for result in results],
    }
