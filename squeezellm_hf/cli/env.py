"""`squeezellm env`."""

from __future__ import annotations

import json
from dataclasses import dataclass

from rich.table import Table

from squeezellm_hf.evaluation.environment import environment
from squeezellm_hf.evaluation.report import console
from squeezellm_hf.ops import native

DESCRIPTION = """Print installed versions, hardware, and which kernels are active.

  squeezellm env
  squeezellm env --json

Put this into a bug report. Without native kernels everything works, through
PyTorch, and slower; the reason is printed.
SQUEEZELLM_HF_ISA=scalar|avx2|avx512 forces an instruction set,
SQUEEZELLM_HF_NATIVE=0 turns the native kernels off."""


@dataclass
class Command:
    """Print versions, hardware and kernels."""

    json: bool = False
    """Print JSON."""

    def run(self) -> None:
        """Print a table, or JSON."""
        # Where the library lies tells who asks; results of measurements go without it.
        path = native.status().path
        found = {**environment(), "native_library": None if path is None else str(path)}
        if self.json:
            print(json.dumps(found, indent=2))
            return
        table = Table(show_header=False)
        for name, version in found["versions"].items():
            table.add_row(name, version or "not installed")
        table.add_section()
        for name in ("system", "cpu", "cores", "threads"):
            table.add_row(name, str(found[name]))
        table.add_row("GPUs", ", ".join(found["gpus"]) or "none")
        table.add_section()
        table.add_row("CPU kernels", _kernels(found))
        reason = found["native_cuda_reason"]
        table.add_row("CUDA kernels", f"PyTorch reference ({reason})" if reason else "native")
        console().print(table)


def _kernels(found: dict[str, object]) -> str:
    if not found["native_kernels"]:
        return f"PyTorch reference ({found['native_reason']})"
    return f"native, {found['instruction_set']} ({found['native_library']})"
