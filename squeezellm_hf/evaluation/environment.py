"""What a measurement was made on: versions, hardware, active kernels."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

from squeezellm_hf.ops import native

PACKAGES = (
    "squeezellm-hf",
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "huggingface_hub",
    "safetensors",
    "tokenizers",
)


def versions() -> dict[str, str | None]:
    """Return the versions of this package and of those that it stands on; None: not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def environment() -> dict[str, Any]:
    """Return versions, hardware and the state of the native kernels, ready for JSON."""
    status = native.status()
    return {
        "versions": versions(),
        "system": platform.platform(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "native_kernels": status.loaded,
        "instruction_set": status.instruction_set,
        "native_reason": status.reason,
        "native_cuda_kernels": status.cuda_loaded,
        "native_cuda_reason": status.cuda_reason,
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
