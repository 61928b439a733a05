"""Time and memory of loading a quantized checkpoint, against its size and reading its bytes.

    python benchmarks/loading.py --model 8b --layers 6 --weights w3+ --json loading.json
    python benchmarks/loading.py --model 8b --weights w3+ --device cuda --json loading.json

A checkpoint of the given shapes with random weights is written first. Each measurement is a fresh
process that has imported everything, initialized the device and loaded a tiny checkpoint before it
looks at its memory. Files are dropped from the system's cache before they are read and before they
are loaded; "read" is reading all bytes of the files into one buffer, piece by piece.

Peak memory of the CPU is the kernel's own high-water mark of the resident set (``VmHWM``, reset
before loading), less what was resident then. It counts pages of mapped files, which the system can
take back at any time; "anonymous" is what it cannot.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import hardware
import random_models
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import logging

from squeezellm_hf import SqueezeLLMConfig, SqueezeLLMLinear
from squeezellm_hf.integration.in_memory import mark_quantized
from squeezellm_hf.integration.record import record_layers

PIECE_BYTES = 1 << 24
SETTINGS = ("model", "layers", "vocabulary", "weights", "device", "repeats")


def write_checkpoint(
    made: PreTrainedConfig, weights: str, path: Path, device: str, shard_size: str = "5GB"
) -> None:
    """A checkpoint with random weights, as ``save_pretrained`` writes it.

    Args:
        made: the model's configuration.
        weights: "w" and the bits, + for 0.45 % of sparse values.
        path: of the directory.
        device: where the weights are made.
        shard_size: of a file.
    """
    bits, sparse = int(weights.strip("w+")), weights.endswith("+")
    model = random_models.quantized_model(made, bits, sparse, device)
    config = SqueezeLLMConfig(bits=bits, dataset=None)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, SqueezeLLMLinear)}
    record_layers(config, layers)
    mark_quantized(model, config)
    model.save_pretrained(path, max_shard_size=shard_size)


def files(path: Path) -> list[Path]:
    return sorted(path.glob("*.safetensors"))


def checkpoint_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in files(path))


def drop_cache(path: Path) -> None:
    """Have the next read of the files go to the disk."""
    for file in files(path):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def read_seconds(path: Path) -> float:
    """Seconds to read all bytes of the files."""
    buffer = bytearray(PIECE_BYTES)
    start = time.perf_counter()
    for file in files(path):
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    return time.perf_counter() - start


def memory() -> dict[str, int]:
    """Bytes of this process: resident, its peak, and what is no page of a file."""
    fields = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key in ("VmRSS", "VmHWM", "RssAnon"):
            fields[key] = int(value.split()[0]) << 10
    return fields


def measure(path: Path, tiny: Path, device: str) -> dict[str, float]:
    """Load once, in a process that has done nothing else."""
    logging.disable_progress_bar()
    device_map = None if device == "cpu" else device
    AutoModelForCausalLM.from_pretrained(tiny, dtype="auto", device_map=device_map)
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    gpu_before = torch.cuda.memory_allocated() if device == "cuda" else 0
    Path("/proc/self/clear_refs").write_text("5")
    before = memory()
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", device_map=device_map)
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    after = memory()
    found: dict[str, float] = {
        "load_seconds": seconds,
        "peak_bytes": after["VmHWM"] - before["VmRSS"],
        "anonymous_bytes": after["RssAnon"] - before["RssAnon"],
    }
    if device == "cuda":
        found["gpu_bytes"] = torch.cuda.memory_allocated() - gpu_before
        found["gpu_peak_bytes"] = torch.cuda.max_memory_allocated() - gpu_before
    assert not any(parameter.is_meta for parameter in model.parameters())
    return found


def fresh(path: Path, tiny: Path, device: str) -> dict[str, float]:
    """:func:`measure` in a process of its own."""
    command = [sys.executable, __file__, "--measure", str(path), str(tiny), "--device", device]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: dict[str, float] = json.loads(output.splitlines()[-1])
    return found


def compare(path: Path, tiny: Path, device: str, repeats: int) -> dict[str, Any]:
    """Reading and loading in turns; the medians of the times, the largest of the sizes."""
    turns = []
    for _ in range(repeats):
        drop_cache(path)
        read = read_seconds(path)
        drop_cache(path)
        turns.append({"read_seconds": read, **fresh(path, tiny, device)})
    result: dict[str, Any] = {
        key: (statistics.median if key.endswith("seconds") else max)(turn[key] for turn in turns)
        for key in turns[0]
    }
    size = checkpoint_bytes(path)
    result |= {"checkpoint_bytes": size, "peak_over_size": result["peak_bytes"] / size}
    result["seconds_beyond_1.5_reads"] = result["load_seconds"] - 1.5 * result["read_seconds"]
    if device == "cuda":
        result["gpu_peak_over_final"] = result["gpu_peak_bytes"] / result["gpu_bytes"]
    return result


def show(result: dict[str, Any], title: str) -> None:
    table = Table("", "", title=title)
    for key, value in result.items():
        if key.endswith("_bytes"):
            table.add_row(key.replace("_", " ").removesuffix(" bytes"), f"{value / 1e6:,.0f} MB")
        else:
            table.add_row(key.replace("_", " "), f"{value:.3f}")
    Console().print(table)


def main(arguments: list[str] | None = None) -> None:
    """Command line; see the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="8b", help="tiny, 8b, 32b or 70b")
    parser.add_argument("--layers", type=int, help="blocks; default: the model's own")
    parser.add_argument(
        "--vocabulary", type=int, help="tokens; with few, nearly all bytes are packed weights"
    )
    parser.add_argument("--weights", default="w3+", help="w and the bits, + for a sparse part")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="for the checkpoint; kept, and used again")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure:
        print(json.dumps(measure(*options.measure, options.device)))
        return
    with tempfile.TemporaryDirectory(prefix="squeezellm-loading-") as temporary:
        path = options.directory or Path(temporary) / "checkpoint"
        tiny = Path(temporary) / "tiny"
        write_checkpoint(random_models.config("tiny"), options.weights, tiny, "cpu")
        if not files(path):
            made = random_models.config(options.model, options.layers)
            made.vocab_size = options.vocabulary or made.vocab_size
            write_checkpoint(made, options.weights, path, options.device)
            if options.device == "cuda":
                torch.cuda.empty_cache()
        result = compare(path, tiny, options.device, options.repeats)
    title = f"{options.model}, {options.layers or 'all'} blocks, {options.weights}"
    show(result, title)
    if options.json:
        settings = {key: getattr(options, key) for key in SETTINGS}
        document = {"hardware": hardware.stamp(options.device), **settings, "result": result}
        options.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
