"""Time the codebook solvers on the layers of a model of given shapes, with random weights.

    python benchmarks/codebooks.py --shapes smollm2 --layers 30
    python benchmarks/codebooks.py --shapes llama-3-8b --layers 32 --at-once 8 --device cuda

For each shape, ``--layers`` times as many matrices as a block has of it, ``--at-once`` blocks
side by side: k-means alone, then k-means and the solver. Inputs are correlated and a few of them
are large, as in language models; their second moments are made on the device and not timed.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import hardware
import torch
from torch import Tensor

from squeezellm_hf.calibration.hessian import channel_groups
from squeezellm_hf.methods.squeezellm import (
    SqueezeLLMParameters,
    WeightMatrix,
    quadratic_error,
    quantize_weights,
)
from squeezellm_hf.nn import SqueezeLLMLinear

# (out_features, in_features): matrices a block.
SHAPES: dict[str, dict[tuple[int, int], int]] = {
    "tiny": {(64, 64): 2, (160, 64): 2, (64, 160): 1},
    "smollm2": {(576, 576): 2, (192, 576): 2, (1536, 576): 2, (576, 1536): 1},
    "llama-3-8b": {(4096, 4096): 2, (1024, 4096): 2, (14336, 4096): 2, (4096, 14336): 1},
}


def matrix(
    shape: tuple[int, int], parameters: SqueezeLLMParameters, device: str, seed: int
) -> WeightMatrix:
    """A random matrix with Fisher values and, if the codebook wants them, Hessians."""
    generator = torch.Generator(device).manual_seed(seed)
    rows, columns = shape

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    weight = (normal(rows, columns) * columns**-0.5).bfloat16()
    fisher = (3 * normal(rows, columns) - 12).exp_()
    if parameters.hessian_groups is None:
        return WeightMatrix(weight, fisher, parameters)
    groups = len(channel_groups(rows, max(1, parameters.hessian_groups)))
    scale = normal(columns).exp_()
    hessian = torch.empty(groups, columns, columns, device=device)
    for group in hessian:
        tokens = normal(1024, columns).mul_(scale).add_(normal(1024, 1))
        torch.mm(tokens.t(), tokens, out=group)
    return WeightMatrix(weight, fisher, parameters, hessian)


def measure(shape: tuple[int, int], count: int, at_once: int, options: Any) -> dict[str, Any]:
    """Seconds for ``count`` matrices, ``at_once`` side by side, and what the solver gained."""
    seconds, errors = {}, {}
    for codebook in dict.fromkeys(("kmeans", options.codebook)):
        parameters = SqueezeLLMParameters(
            options.bits, codebook=codebook, guided_groups=options.guided_groups
        )
        wanted = SqueezeLLMParameters(codebook=options.codebook,
                                      guided_groups=options.guided_groups)  # fmt: skip
        seconds[codebook] = 0.0
        for first in range(0, count, at_once):
            part = range(first, min(first + at_once, count))
            matrices = [matrix(shape, wanted, options.device, seed) for seed in part]
            matrices = [each._replace(parameters=parameters) for each in matrices]
            _synchronize(options.device)
            start = time.perf_counter()
            results = quantize_weights(matrices)
            _synchronize(options.device)
            seconds[codebook] += time.perf_counter() - start
            if first == 0 and matrices[0].hessian is not None:
                errors[codebook] = _error(matrices[0], results[0])
    row: dict[str, Any] = {
        "out_features": shape[0],
        "in_features": shape[1],
        "matrices": count,
        **{f"{codebook}_s": spent for codebook, spent in seconds.items()},
    }
    if errors:
        row["objective_ratio"] = errors[options.codebook] / errors["kmeans"]
    return row


def _error(each: WeightMatrix, tensors: dict[str, Tensor]) -> float:
    assert each.hessian is not None
    layer = SqueezeLLMLinear.from_tensors(
        tensors, bits=each.parameters.bits, in_features=each.weight.shape[1]
    )
    dequantized = layer.to_linear(torch.float32).weight.detach()
    # A few rows suffice, and the Hessian of the first group.
    rows = channel_groups(each.weight.shape[0], each.hessian.shape[0])[0].stop
    rows = min(rows, 64)
    return float(quadratic_error(each.weight[:rows], dequantized[:rows], each.hessian[:1]).sum())


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def main() -> None:
    """Measure all shapes of a model and print a line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default="smollm2", choices=tuple(SHAPES))
    parser.add_argument("--layers", type=int, default=4, help="blocks of the model")
    parser.add_argument("--at-once", type=int, default=4, help="blocks side by side")
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--codebook", default="guided", choices=("kmeans", "lnq", "guided"))
    parser.add_argument("--guided-groups", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    measure((64, 64), 1, 1, options)  # loads the libraries
    rows = []
    for shape, per_block in SHAPES[options.shapes].items():
        row = measure(shape, per_block * options.layers, per_block * options.at_once, options)
        if options.device.startswith("cuda"):
            row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
            torch.cuda.reset_peak_memory_stats()
        rows.append(row)
        print(json.dumps(row), flush=True)
    total = {key: sum(row[key] for row in rows) for key in rows[0] if key.endswith("_s")}
    print(json.dumps(total))
    if options.json is not None:
        settings = {k: str(v) for k, v in vars(options).items() if k != "json"}
        result = {"settings": settings, "hardware": hardware.stamp(), "rows": rows, **total}
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
