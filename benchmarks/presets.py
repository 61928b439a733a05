"""What each preset costs, from the original to files that are written, and what it gives: SmolLM2
on texts of the Brown corpus.

    python benchmarks/distill.py --write-data brown.safetensors
    python benchmarks/presets.py --data brown.safetensors --bits 4 3 2 --device cuda \\
        --json presets.json
    python benchmarks/presets.py --data brown.safetensors --presets fast balanced

Each runs in a process of its own, one after the other, as a user would run it:
``from_pretrained(model, quantization_config=SqueezeLLMConfig(preset=...))``, ``save_pretrained``.
The time is that of both; loading the libraries is not counted. The model that is evaluated is the
one that was written. Data as for ``benchmarks/distill.py``.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from distill import DENSE, QUALITY, evaluated, write_data
from quality import _smollm2
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from squeezellm_hf import SqueezeLLMConfig
from squeezellm_hf.evaluation.environment import environment
from squeezellm_hf.evaluation.report import Column, decimals, print_table, write_json
from squeezellm_hf.integration.presets import PRESETS

COLUMNS = (
    Column("model", "preset"),
    *QUALITY,
    Column("seconds", "took, s", decimals(1)),
    Column("peak_gb", "peak GB", decimals(2)),
)


def measure(options: Any) -> dict[str, Any]:
    """Quantize with one preset and one width, write, load what was written, evaluate."""
    (preset,), (bits,) = options.presets, options.bits
    data = {key: ids.to(torch.int64) for key, ids in load_file(options.data).items()}
    size = {"dtype": torch.bfloat16, "device_map": options.device}
    accelerator = torch.device(options.device).type != "cpu"
    config = SqueezeLLMConfig(
        bits=bits,
        preset=preset,
        dataset=data["calibration"],
        n_samples=len(data["calibration"]),
        sequence_length=data["calibration"].shape[1],
        distill_dataset=data["distill"],
        **(DENSE if options.dense else {}),
    )
    torch.zeros(1, device=options.device)
    start = time.monotonic()
    model = AutoModelForCausalLM.from_pretrained(options.model, quantization_config=config, **size)
    with tempfile.TemporaryDirectory() as written:
        model.save_pretrained(written)
        seconds = time.monotonic() - start
        peak = torch.accelerator.max_memory_allocated() / 1e9 if accelerator else None
        model = AutoModelForCausalLM.from_pretrained(written, **size)
        original = AutoModelForCausalLM.from_pretrained(options.model, **size)
        label = f"{preset}, {bits} bits{' dense' if options.dense else ''}"
        row: dict[str, Any] = evaluated(label, model, original, data, options)
    return row | {"preset": preset, "bits": bits, "seconds": seconds, "peak_gb": peak}


def fresh(preset: str, bits: int, options: Any) -> dict[str, Any]:
    """:func:`measure` in a process of its own."""
    command = [sys.executable, __file__, "--measure", "--presets", preset, "--bits", str(bits)]
    command += ["--model", options.model, "--data", str(options.data), "--device", options.device]
    command += ["--n-test", str(options.n_test)] + ["--dense"] * options.dense
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    row: dict[str, Any] = json.loads(output.splitlines()[-1])
    return row


def main() -> None:
    """Quantize with each preset, evaluate, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--presets", nargs="+", default=list(PRESETS), choices=list(PRESETS))
    parser.add_argument("--bits", nargs="+", type=int, default=[3])
    parser.add_argument("--dense", action="store_true", help="without a sparse part")
    parser.add_argument("--model", help="Hub id or folder (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--data", type=Path, help="what distill.py --write-data wrote")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--n-test", type=int, default=24)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.model = options.model or _smollm2()
    if options.measure:
        print(json.dumps(measure(options)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        if options.data is None:
            options.data = Path(temporary) / "data.safetensors"
            write_data(options.data, options.model)
        rows: list[Any] = []
        for bits in options.bits:
            for preset in options.presets:
                rows.append(fresh(preset, bits, options))
                print_table(rows[-1:], COLUMNS)
                if options.json is not None:
                    name = Path(options.model).name
                    write_json(options.json, rows, model=name, environment=environment())
    print_table(rows, COLUMNS, f"Brown corpus, {options.device}, bfloat16")


if __name__ == "__main__":
    main()
