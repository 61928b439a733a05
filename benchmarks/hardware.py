"""What a measurement was taken on, and the bandwidth its memory gives."""

import os
import platform
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from squeezellm_hf.ops import native


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if os.name == "posix" else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def last_level_cache_bytes(default: int = 32 << 20) -> int:
    """Size of the processor's largest cache, or ``default`` where the system does not tell."""
    sizes = []
    for entry in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = entry.read_text().strip()
        scale = {"K": 1 << 10, "M": 1 << 20}.get(text[-1], 1)
        sizes.append(int(text.rstrip("KM")) * scale)
    return max(sizes, default=default)


def stamp(device: str = "cpu") -> dict[str, Any]:
    """Date, machine and software of a run on ``device``, for its JSON."""
    return (_gpu() if device == "cuda" else {}) | {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "last_level_cache_bytes": last_level_cache_bytes(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "instruction_set": native.status().instruction_set,
    }


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "l2_cache_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
    }


def read_bandwidth(size_bytes: int = 512 << 20, repeats: int = 9) -> float:
    """Bytes a second that a reduction over ``size_bytes`` reaches with torch's threads (best)."""
    buffer = torch.ones(size_bytes // 4, dtype=torch.float32)
    buffer.sum()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        buffer.sum()
        best = min(best, time.perf_counter() - start)
    return size_bytes / best
