"""Time SqueezeLLM's quantization of a whole model, and measure how near the optimum it comes.

    python benchmarks/quantization.py --json quantization.json
    python benchmarks/quantization.py --shapes 4096x4096 14336x4096 --device cuda

With a model (default: SmolLM2-135M-Instruct) the Fisher values are real, from Python's help texts.
The error of a row is sum F (w - centroid)^2 over the cells that stay dense; it is compared with
the exact optimum (dynamic programming) and with scikit-learn's KMeans (k-means++, 50 iterations,
the same weights) on some rows of every layer. With --shapes weights are random and only time is
measured.
"""

import argparse
import functools
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import hardware
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits
from torch import Tensor

from squeezellm_hf.methods.squeezellm import SqueezeLLMParameters, quantize_weight
from squeezellm_hf.methods.squeezellm.chunks import for_each_chunk
from squeezellm_hf.methods.squeezellm.decompose import sparse_mask
from squeezellm_hf.methods.squeezellm.kmeans import weighted_kmeans
from squeezellm_hf.methods.squeezellm.quantize import kmeans_input

ROOT = Path(__file__).resolve().parents[1]
KMEANS_ITERATIONS = 50

Layers = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Speed:
    """Seconds for all layers; ``kmeans_s`` is sorting and clustering alone."""

    bits: int
    weights: int
    kmeans_s: float
    quantize_s: float


@dataclass(frozen=True)
class Quality:
    """One layer: errors relative to the exact optimum's of the same rows.

    Attributes:
        mean_excess: mean over rows of error / optimum - 1.
        worst_excess: the greatest of them.
        stored_excess: as ``mean_excess``, with the table rounded to 16 bits.
        sum_excess: sum of errors / sum of optima - 1.
        scikit_learn_excess: the same for scikit-learn's centroids, by its n_init.
    """

    layer: str
    bits: int
    rows: int
    mean_excess: float
    worst_excess: float
    stored_excess: float
    sum_excess: float
    scikit_learn_excess: dict[int, float]


def model_layers(name: str | None, samples: int, length: int) -> Layers:
    """Weights and Fisher values of the linear layers of a model's blocks."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from squeezellm_hf.calibration.datasets import token_batches
    from squeezellm_hf.calibration.fisher import calibrate_fisher

    if name is None:
        sys.path.insert(0, str(ROOT / "examples"))
        from smollm2 import build

        name = str(build(ROOT / ".cache" / "SmolLM2-135M-Instruct"))
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(name)
    linears = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and path != "lm_head"
    }
    sequences = token_batches("builtin", tokenizer, n_samples=samples, sequence_length=length)
    fisher = calibrate_fisher(model, linears, sequences)
    return {path: (linear.weight.detach(), fisher[path]) for path, linear in linears.items()}


def random_layers(shapes: list[str], device: str) -> Layers:
    """Layers with the heavy tails of trained ones."""
    generator = torch.Generator(device).manual_seed(0)
    layers = {}
    for index, shape in enumerate(shapes):
        size = tuple(map(int, shape.split("x")))
        weight = torch.randn(size, generator=generator, device=device).mul_(0.02).bfloat16()
        fisher = torch.randn(size, generator=generator, device=device).mul_(2).exp_()
        layers[f"{index}: {shape}"] = weight, fisher
    return layers


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def cluster_rows(
    weight: Tensor, fisher: Tensor, removed: Tensor, parameters: SqueezeLLMParameters, rows: slice
) -> None:
    values, weights = kmeans_input(weight[rows].float(), fisher[rows], removed[rows])
    weighted_kmeans(values, weights, 2**parameters.bits, parameters.solver)


def measure_speed(layers: Layers, parameters: SqueezeLLMParameters) -> Speed:
    """Cluster all layers, then quantize them from beginning to end."""
    kmeans_s = 0.0
    for weight, fisher in layers.values():
        removed = sparse_mask(weight, fisher, parameters)
        task = functools.partial(cluster_rows, weight, fisher, removed, parameters)
        synchronize(weight.device)
        start = time.perf_counter()
        for_each_chunk(weight, parameters.bits, task)
        synchronize(weight.device)
        kmeans_s += time.perf_counter() - start
    start = time.perf_counter()
    for weight, fisher in layers.values():
        quantize_weight(weight, fisher, parameters)
        synchronize(weight.device)
    quantize_s = time.perf_counter() - start
    count = sum(weight.numel() for weight, _ in layers.values())
    return Speed(parameters.bits, count, kmeans_s, quantize_s)


def errors(values: Tensor, weights: Tensor, centroids: Tensor) -> Tensor:
    """fp64 [R]: distances to every centroid, no sorting."""
    distance = (values[:, :, None].double() - centroids[:, None].double()).abs_().amin(dim=2)
    return (weights.double() * distance.square_()).sum(dim=1)


def scikit_learn(values: Tensor, weights: Tensor, clusters: int, n_init: int) -> Tensor:
    """Centroids fp64 [R, clusters] of scikit-learn, row by row."""
    rows = []
    for x, w in zip(values.double().numpy(), weights.double().numpy(), strict=True):
        kmeans = KMeans(
            min(clusters, np.unique(x).size),
            n_init=n_init,
            max_iter=KMEANS_ITERATIONS,
            random_state=0,
        )
        with threadpool_limits(1):  # its threads only wait for one another on so few points
            kmeans.fit(x[:, None], sample_weight=w)
        found = np.sort(kmeans.cluster_centers_[:, 0])
        rows.append(np.pad(found, (0, clusters - found.size), mode="edge"))
    return torch.from_numpy(np.stack(rows))


def measure_quality(
    name: str,
    layer: tuple[Tensor, Tensor],
    parameters: SqueezeLLMParameters,
    rows: int,
    n_inits: list[int],
) -> Quality:
    """Compare ``rows`` evenly spaced rows of a layer."""
    weight, fisher = layer
    chosen = torch.linspace(0, weight.shape[0] - 1, min(rows, weight.shape[0])).long()
    removed = sparse_mask(weight, fisher, parameters)[chosen]
    values, weights = kmeans_input(weight[chosen].float(), fisher[chosen], removed)
    clusters = 2**parameters.bits
    optimum = errors(values, weights, weighted_kmeans(values, weights, clusters, "exact"))
    centroids = weighted_kmeans(values, weights, clusters)
    ours = errors(values, weights, centroids)
    stored = errors(values, weights, centroids.half())
    excess = ours / optimum - 1
    # Sums over rows are of Fisher-weighted errors: kmeans_input scales each row by its maximum.
    scale = fisher[chosen].masked_fill(removed, 0.0).amax(dim=1).double()
    total = (scale * optimum).sum()
    theirs = {
        n_init: float(
            (scale * errors(values, weights, scikit_learn(values, weights, clusters, n_init))).sum()
            / total
            - 1
        )
        for n_init in n_inits
    }
    return Quality(
        name,
        parameters.bits,
        chosen.numel(),
        float(excess.mean()),
        float(excess.max()),
        float((stored / optimum - 1).mean()),
        float((scale * ours).sum() / total - 1),
        theirs,
    )


def print_speed(speeds: list[Speed]) -> None:
    table = Table(title="Quantization of all layers")
    for column in ("bits", "weights, M", "k-means, s", "all of it, s", "M weights/s"):
        table.add_column(column, justify="right")
    for speed in speeds:
        table.add_row(
            str(speed.bits),
            f"{speed.weights / 1e6:.1f}",
            f"{speed.kmeans_s:.2f}",
            f"{speed.quantize_s:.2f}",
            f"{speed.weights / 1e6 / speed.quantize_s:.1f}",
        )
    Console(width=160).print(table)


def print_quality(qualities: list[Quality]) -> None:
    table = Table(title="Error above the exact optimum, percent")
    headings = ["bits", "layers", "rows", "mean", "worst row", "16-bit table", "layer sums: mean"]
    n_inits = list(qualities[0].scikit_learn_excess)
    headings += [f"scikit-learn, n_init={n}" for n in n_inits]
    headings += [f"layers above n_init={n}" for n in n_inits]
    for heading in headings:
        table.add_column(heading, justify="right")
    for bits in sorted({quality.bits for quality in qualities}, reverse=True):
        some = [quality for quality in qualities if quality.bits == bits]
        table.add_row(
            str(bits),
            str(len(some)),
            str(sum(quality.rows for quality in some)),
            f"{100 * np.mean([quality.mean_excess for quality in some]):.3f}",
            f"{100 * max(quality.worst_excess for quality in some):.2f}",
            f"{100 * np.mean([quality.stored_excess for quality in some]):.3f}",
            f"{100 * np.mean([quality.sum_excess for quality in some]):.3f}",
            *(
                f"{100 * np.mean([quality.scikit_learn_excess[n] for quality in some]):.2f}"
                for n in n_inits
            ),
            *(
                str(sum(quality.sum_excess > quality.scikit_learn_excess[n] for quality in some))
                for n in n_inits
            ),
        )
    Console(width=160).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="Hub id or folder (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--shapes", nargs="+", metavar="OUTxIN", help="random layers, no model")
    parser.add_argument("--device", default="cpu", help="of the random layers")
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 3])
    parser.add_argument("--solver", choices=["lloyd", "exact"], default="lloyd")
    parser.add_argument("--samples", type=int, default=8, help="calibration sequences")
    parser.add_argument("--length", type=int, default=256, help="tokens of each")
    parser.add_argument("--rows", type=int, default=8, help="compared per layer; 0 for none")
    parser.add_argument("--n-init", nargs="+", type=int, default=[1, 10], help="of scikit-learn")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()

    if args.shapes:
        layers = random_layers(args.shapes, args.device)
    else:
        layers = model_layers(args.model, args.samples, args.length)
    speeds: list[Speed] = []
    qualities: list[Quality] = []
    for bits in args.bits:
        parameters = SqueezeLLMParameters(bits=bits, solver=args.solver)
        speeds.append(measure_speed(layers, parameters))
        if args.rows and not args.shapes:
            qualities += [
                measure_quality(name, layer, parameters, args.rows, args.n_init)
                for name, layer in layers.items()
            ]
    print_speed(speeds)
    if qualities:
        print_quality(qualities)
    if args.json is not None:
        document: dict[str, Any] = {
            "hardware": hardware.stamp(),
            "solver": args.solver,
            "speed": [asdict(speed) for speed in speeds],
            "quality": [asdict(quality) for quality in qualities],
        }
        args.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
