"""How true the predictions behind a bit budget are: single layers, quantized one at a time.

    python benchmarks/sensitivity.py --work-dir W --json sensitivity.json

SmolLM2, Fisher sums of 128 x 512 tokens of 450 texts of the Brown corpus (found in W, or made);
the divergence on 4 x 512 other tokens of these texts, everything in fp32.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from brown import CACHE, split
from transformers import AutoModelForCausalLM, AutoTokenizer

from squeezellm_hf.calibration.datasets import token_batches
from squeezellm_hf.calibration.divergence import ReferenceLogits
from squeezellm_hf.calibration.held_out import held_out
from squeezellm_hf.evaluation.environment import environment
from squeezellm_hf.evaluation.report import Column, decimals, print_table, write_json
from squeezellm_hf.methods.squeezellm import SqueezeLLMParameters, fisher_errors
from squeezellm_hf.pipeline import make_plan
from squeezellm_hf.pipeline.calibrate import Calibration
from squeezellm_hf.pipeline.probes import measure_probes
from squeezellm_hf.pipeline.work_dir import WorkDir, fingerprint

LENGTH, SAMPLES = 512, 128
COLUMNS = (
    Column("layer", "layer"),
    Column("predicted", "predicted, s = 1", decimals(5)),
    Column("measured", "measured", decimals(5)),
    Column("ratio", "ratio", decimals(3)),
)


def main() -> None:
    """Predict, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="Hub id or folder (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--sparse", type=float, default=0.0, help="times 0.45 %%")
    parser.add_argument("--blocks", type=int, nargs="+", default=[0, 5, 12, 20])
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    name = options.model or _smollm2()
    tokenizer = AutoTokenizer.from_pretrained(name)

    def windows(seed: int) -> torch.Tensor:
        return token_batches(
            split("train"), tokenizer, n_samples=SAMPLES, sequence_length=LENGTH, seed=seed
        )

    sequences = windows(0)
    model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)
    plan = make_plan(model, SqueezeLLMParameters(), skip=["lm_head"])
    linears = {name: model.get_submodule(name) for name in plan}
    work_dir = WorkDir(options.work_dir, fingerprint(model, sequences))
    calibration = Calibration(model, linears, sequences, {}, work_dir, True, True)
    statistics = calibration.take({})
    model.float()
    parameters = SqueezeLLMParameters(
        bits=options.bits,
        outlier_fraction=0.004 * options.sparse,
        sensitive_fraction=0.0005 * options.sparse,
    )
    layers = [layer for layer in plan if int(layer.split(".")[2]) in options.blocks]
    reference = ReferenceLogits(model, held_out(windows(1), sequences, 4))
    probes = [(layer, parameters) for layer in layers]
    measured = measure_probes(model, linears, probes, reference, lambda: statistics, None)
    rows = []
    for layer, kl in zip(layers, measured, strict=True):
        (error,) = fisher_errors(linears[layer].weight, statistics[0][layer], [parameters])
        predicted = LENGTH / (2 * SAMPLES) * error
        rows.append(
            {"layer": layer, "predicted": predicted, "measured": kl, "ratio": kl / predicted}
        )
    print_table(rows, COLUMNS, f"{options.bits} bits + {options.sparse:g} x 0.45 %")
    logs = torch.tensor([[row["predicted"], row["measured"]] for row in rows]).log()
    correlation = float(torch.corrcoef(logs.t())[0, 1])
    print(f"correlation of the logarithms: {correlation:.3f}")
    if options.json is not None:
        write_json(options.json, rows, correlation=correlation, environment=environment())


def _smollm2() -> str:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
    from smollm2 import build

    return str(build(CACHE / "SmolLM2-135M-Instruct"))


if __name__ == "__main__":
    main()
