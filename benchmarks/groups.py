"""Time weights that share x, batch 1, in one launch and in a launch each, on a CUDA device.

    python benchmarks/groups.py
    python benchmarks/groups.py --columns 8192 --rows 8192 1024 1024 --bits 4

As in kernels.py: a CUDA graph goes through copies of the weights far beyond the L2 cache; medians,
in turns. "behind" puts a small kernel that does not announce its end before each launch or group,
as there is one before them in a model; its time alone, in a graph of its own, is taken off. Results
are checked against one launch each before they are timed.
"""

import argparse
import itertools
import statistics

import torch
from kernels_cuda import Quantized, capture, copies, quantized_weight, replay_seconds, size_bytes
from rich.console import Console
from rich.table import Table
from torch import Tensor

from squeezellm_hf import ops

NAMES = ("qweight", "lookup_table", "crow_indices", "col_indices", "values", "bias")
# Query, key and value, and the halves of the MLP: of Llama-3-8B, Qwen2.5-32B and Llama-3-70B.
GROUPS = [
    (4096, (4096, 1024, 1024)),
    (4096, (14336, 14336)),
    (5120, (5120, 1024, 1024)),
    (5120, (27648, 27648)),
    (8192, (8192, 1024, 1024)),
    (8192, (28672, 28672)),
]


def flat(weights: list[Quantized]) -> Quantized:
    """One dictionary, so that all are copied together."""
    return {f"{i}.{name}": t for i, weight in enumerate(weights) for name, t in weight.items()}


def weights_of(tensors: Quantized, count: int) -> list[Quantized]:
    return [
        {name: tensors[f"{i}.{name}"] for name in NAMES if f"{i}.{name}" in tensors}
        for i in range(count)
    ]


def together(x: Tensor, weights: list[Quantized], bits: int) -> list[Tensor]:
    lists = ([weight.get(name) for weight in weights] for name in NAMES)
    results: list[Tensor] = torch.ops.squeezellm_hf.lut_linear_group(x, *lists, bits)
    return results


def each(x: Tensor, weights: list[Quantized], bits: int) -> list[Tensor]:
    return [ops.lut_linear(x, **weight, bits=bits) for weight in weights]


def bench(columns: int, rows: tuple[int, ...], bits: int, sparse: bool, repeats: int) -> list[str]:
    """A row of the table."""
    made = [quantized_weight(n, columns, bits, sparse) for n in rows]
    x = torch.randn(1, columns, device="cuda", dtype=torch.bfloat16)
    for y, single in zip(together(x, made, bits), each(x, made, bits), strict=True):
        error = float((y.double() - single.double()).norm() / single.double().norm())
        if not error < 2e-3:
            raise AssertionError(f"lut_linear_group is wrong: relative error {error:.1e}")
    all_copies = copies(flat(made))
    source = x * 2

    def other() -> Tensor:
        return torch.mul(source, 0.5, out=x)

    runs = {
        "each": lambda w: each(x, weights_of(w, len(rows)), bits)[0],
        "group": lambda w: together(x, weights_of(w, len(rows)), bits)[0],
        "each, behind": lambda w: each(other(), weights_of(w, len(rows)), bits)[0],
        "group, behind": lambda w: together(other(), weights_of(w, len(rows)), bits)[0],
        "other": lambda w: other(),
    }
    graphs = {name: capture(run, all_copies) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(repeats):
        for name, graph in graphs.items():
            times[name].append(replay_seconds(graph) / len(all_copies) * 1e6)
    us = {name: statistics.median(values) for name, values in times.items()}
    for name in ("each, behind", "group, behind"):
        us[name] -= us["other"]
    terabytes = size_bytes(all_copies[0]) / us["group"] / 1e6
    return [
        f"{' + '.join(map(str, rows))} x {columns}", f"w{bits}{'+' if sparse else ''}",
        *(f"{us[name]:.1f}" for name in list(runs)[:4]), f"{terabytes:.2f}",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--columns", type=int, help="of a group of one's own")
    parser.add_argument("--rows", type=int, nargs="+", help="of its weights")
    parser.add_argument("--bits", type=int, nargs="+", default=[3, 4])
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    if (args.columns is None) != (args.rows is None):
        parser.error("--columns and --rows go together")
    groups = [(args.columns, tuple(args.rows))] if args.rows else GROUPS
    torch.manual_seed(0)
    table = Table(title="microseconds of all weights of a group; + is 0.45 % sparse")
    for column in ("", "", "each", "group", "each, behind", "group, behind", "TB/s"):
        table.add_column(column, justify="right")
    for (columns, rows), bits, sparse in itertools.product(groups, args.bits, (False, True)):
        table.add_row(*bench(columns, rows, bits, sparse, args.repeats))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
