"""Time the linear layers of a decoder block one behind the other, batch 1, on a CUDA device.

    python benchmarks/chain.py
    python benchmarks/chain.py --hidden 5120 --inner 27648 --bits 3 --steps plain all

The four calls of a block (o, gate and up, down, then q, k and v of the next one), each with what
the one before it wrote, as in a model without its attention. ``--steps``: ``plain``, nothing else;
``residual``, ``norm`` and ``gate``, with that done in the calls; ``all`` three; ``kernels``, all
three by torch's own kernels between the calls. As in kernels.py: a CUDA graph goes through blocks
far beyond the L2 cache; medians, in turns.
"""

import argparse
import itertools
import statistics
from typing import Any

import torch
from kernels_cuda import Quantized, capture, quantized_weight, replay_seconds, size_bytes
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

STEPS = ("plain", "residual", "norm", "gate", "all", "kernels")
NAMES = ("qweight", "lookup_table", "crow_indices", "col_indices", "values", "bias")
EPS = 1e-5


class Block:
    """The calls of a block whose weights are given by name and part."""

    def __init__(self, bits: int, steps: str, norm_weight: Tensor) -> None:
        self._bits = bits
        self._steps = {"all": ("residual", "norm", "gate")}.get(steps, (steps,))
        self._norm_weight = norm_weight

    def _call(self, x: Tensor, weights: list[Quantized], **steps: Any) -> list[Tensor]:
        lists = ([weight.get(name) for weight in weights] for name in NAMES)
        results: list[Tensor] = torch.ops.squeezellm_hf.lut_linear_group(
            x, *lists, self._bits, **steps
        )
        return results

    def _normed(self, x: Tensor, weights: list[Quantized], silu: int = -1) -> list[Tensor]:
        if "norm" in self._steps:
            return self._call(x, weights, norm_weight=self._norm_weight, norm_eps=EPS, silu=silu)
        if "kernels" in self._steps:
            x = nn.functional.rms_norm(x, x.shape[-1:], self._norm_weight, EPS)
        return self._call(x, weights, silu=silu)

    def _added(self, x: Tensor, weight: Quantized, residual: Tensor, **steps: Any) -> Tensor:
        if "residual" in self._steps:
            return self._call(x, [weight], **steps, residual=residual)[0]
        (y,) = self._call(x, [weight], **steps)
        return y + residual if "kernels" in self._steps else y

    def __call__(self, q: Tensor, h: Tensor, tensors: Quantized) -> tuple[Tensor, Tensor]:
        o, gate_weight, up_weight, down, *qkv = (
            {n: tensors[f"{part}.{n}"] for n in NAMES if f"{part}.{n}" in tensors}
            for part in ("o", "gate", "up", "down", "q", "k", "v")
        )
        h = self._added(q, o, h)
        gated = "gate" in self._steps
        gate, up = self._normed(h, [gate_weight, up_weight], silu=0 if gated else -1)
        if gated:
            h = self._added(up, down, h, factor=gate)
        else:
            inner = nn.functional.silu(gate) * up if "kernels" in self._steps else up
            h = self._added(inner, down, h)
        return self._normed(h, qkv)[0], h


def bench(args: argparse.Namespace, bits: int, sparse: bool) -> list[str]:
    """A row of the table."""
    hidden, inner, kv = args.hidden, args.inner, args.kv
    shapes = {"o": (hidden, hidden), "gate": (inner, hidden), "up": (inner, hidden),
              "down": (hidden, inner), "q": (hidden, hidden), "k": (kv, hidden),
              "v": (kv, hidden)}  # fmt: skip
    made = {
        f"{part}.{name}": tensor
        for part, shape in shapes.items()
        for name, tensor in quantized_weight(*shape, bits, sparse).items()
    }
    blocks = [made, *({k: t.clone() for k, t in made.items()} for _ in range(args.blocks - 1))]
    norm_weight = torch.ones(hidden, device="cuda", dtype=torch.bfloat16)
    start = torch.randn(1, hidden, device="cuda", dtype=torch.bfloat16)
    graphs = {}
    for steps in args.steps:
        block = Block(bits, steps, norm_weight)

        def chain(_: Quantized, block: Block = block) -> Tensor:
            q = h = start
            for tensors in blocks:
                q, h = block(q, h, tensors)
            return q

        graphs[steps] = capture(chain, [made])
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(args.repeats):
        for name, graph in graphs.items():
            times[name].append(replay_seconds(graph) / len(blocks) * 1e6)
    bytes_alone = size_bytes(made) / args.terabytes / 1e6
    return [
        f"w{bits}{'+' if sparse else ''}",
        *(f"{statistics.median(values):.1f}" for values in times.values()),
        f"{bytes_alone:.1f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--inner", type=int, default=14336)
    parser.add_argument("--kv", type=int, default=1024, help="rows of the key and of the value")
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--terabytes", type=float, default=4.4, help="a second, that memory gives")
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    torch.manual_seed(0)
    table = Table(title=f"microseconds a block, {args.hidden} and {args.inner}; + is 0.45 % sparse")
    for column in ("", *args.steps, "bytes alone"):
        table.add_column(column, justify="right")
    for bits, sparse in itertools.product(args.bits, (False, True)):
        table.add_row(*bench(args, bits, sparse))
    Console(width=120).print(table)


if __name__ == "__main__":
    with torch.no_grad():
        main()
