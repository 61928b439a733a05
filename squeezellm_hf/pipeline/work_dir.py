"""What a run has finished, on disk, so that a killed run goes on where it was.

Every file is named by a hash of all that it depends on (weights, token ids, parameters): a run
with another model, other data or other bits never picks up a wrong one, and one that differs in
the bits alone finds the Fisher information ready, and Hessians that fit in memory together.
"""

import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from squeezellm_hf.calibration import batches
from squeezellm_hf.calibration.objectives import CausalLM, Objective, Sample

# Sums are written at most so often, and only where writing takes a small part of the time.
SECONDS_BETWEEN_WRITES = 60.0
WRITE_SHARE = 0.05
SAMPLED_VALUES = 4096


def fingerprint(
    model: nn.Module,
    sequences: Sequence[Sample] | Tensor | None,
    objective: Objective | None = None,
) -> str:
    """A hash of a sample of all weights of ``model``, of all its data, and of the objective."""
    digest = hashlib.sha256()
    for name, tensor in model.named_parameters():
        flat = tensor.detach().flatten()
        sample = flat[:: max(1, flat.numel() // SAMPLED_VALUES)].float().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    if isinstance(sequences, Tensor):
        digest.update(sequences.cpu().contiguous().numpy().tobytes())
    elif sequences is not None:
        digest.update(batches.digest(sequences))
    if objective is not None and not isinstance(objective, CausalLM):
        digest.update(repr(objective).encode())
    return digest.hexdigest()


class WorkDir:
    """Sums over the data and finished layers of the runs that share a directory.

    Args:
        path: created if it does not exist.
        run: :func:`fingerprint` of the model and the data.
    """

    def __init__(self, path: str | os.PathLike[str], run: str) -> None:
        self.path = Path(path)
        self.run = run
        self.path.mkdir(parents=True, exist_ok=True)
        self._start = time.monotonic()
        # When each label was written, and how long that took.
        self._writes: dict[str, tuple[float, float]] = {}

    def _sums_path(self, label: str) -> Path:
        return self.path / f"{label}-{self.run[:16]}.safetensors"

    def _layer_path(self, name: str, parameters: Any, kind: str) -> Path:
        key = hashlib.sha256(f"{self.run} {name} {parameters}".encode()).hexdigest()[:16]
        return self.path / f"{kind}-{name}-{key}.safetensors"

    def load_sums(
        self, label: str, devices: Mapping[str, torch.device]
    ) -> tuple[dict[str, Tensor] | None, int]:
        """Sums on ``devices`` and the number of sequences in them; (None, 0) if none are kept.

        Args:
            label: what is summed: "fisher", or a name for some layers' Hessians.
            devices: by name of the sum.
        """
        path = self._sums_path(label)
        if not path.exists():
            return None, 0
        try:
            with safe_open(path, framework="pt") as file:
                count = int((file.metadata() or {})["sequences"])
                return {name: file.get_tensor(name).to(d) for name, d in devices.items()}, count
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{path} is damaged; delete it to calibrate anew: {error}") from error

    def save_sums(
        self, label: str, sums: Mapping[str, Tensor], sequences: int, *, final: bool
    ) -> None:
        """Write sums, unless it is too early for another write and they are not ``final``."""
        last, seconds = self._writes.get(label, (self._start, 0.0))
        pause = max(SECONDS_BETWEEN_WRITES, seconds / WRITE_SHARE)
        start = time.monotonic()
        if not final and start - last < pause:
            return
        self._write(self._sums_path(label), sums, {"sequences": str(sequences)})
        end = time.monotonic()
        self._writes[label] = end, end - start

    def drop_sums(self, label: str) -> None:
        """Delete sums that nothing needs any more."""
        self._sums_path(label).unlink(missing_ok=True)

    def load_layer(
        self, name: str, parameters: Any, kind: str = "layer"
    ) -> dict[str, Tensor] | None:
        """The quantized tensors of a layer, or None if it is not finished.

        Args:
            name: of the layer.
            parameters: all that the tensors depend on, beside model and data, with a fixed repr.
            kind: other than "layer": of other tensors that were found out about it.
        """
        path = self._layer_path(name, parameters, kind)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged; delete it to redo this layer: {error}") from error

    def save_layer(
        self, name: str, parameters: Any, tensors: Mapping[str, Tensor], kind: str = "layer"
    ) -> None:
        """Write what :meth:`load_layer` is to find."""
        self._write(self._layer_path(name, parameters, kind), tensors, None)

    def _write(
        self, path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None
    ) -> None:
        """A kill in the middle leaves the old file: written beside it, flushed, renamed over it."""
        temporary = path.with_suffix(".tmp")
        save_file({k: t.detach().contiguous() for k, t in tensors.items()}, temporary, metadata)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
