"""Copies of tensors that lie in mapped files, made without touching the mapping.

Safetensors maps a file into memory. Copying a tensor out of a mapping brings its pages in first,
and they stay for as long as any tensor of the file lives: two copies in memory. Reading the file
leaves one.
"""

import bisect
import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

_MAPS = Path("/proc/self/maps")


class Mapping(NamedTuple):
    """A piece of a file in this process's memory: addresses ``start`` to ``stop``."""

    start: int
    stop: int
    offset: int
    inode: int
    path: str


class MappedFiles:
    """The files that are mapped into this process at this moment; none where it is not Linux."""

    def __init__(self) -> None:
        lines = _MAPS.read_text().splitlines() if _MAPS.exists() else []
        self._mappings = sorted(mapping for line in lines if (mapping := _parse(line)) is not None)

    def copy(self, tensor: Tensor) -> Tensor:
        """A contiguous copy of ``tensor``, which must not have been written to since it was mapped.

        Read from its file if it lies in one, else cloned.
        """
        if tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.numel():
            mapping = self._find(tensor.data_ptr(), tensor.nbytes)
            if mapping is not None and (read := _read(tensor, mapping)) is not None:
                return read
        return tensor.clone(memory_format=torch.contiguous_format)

    def _find(self, address: int, size: int) -> Mapping | None:
        index = bisect.bisect_right(self._mappings, address, key=lambda mapping: mapping.start)
        if not index:
            return None
        mapping = self._mappings[index - 1]
        return mapping if address + size <= mapping.stop else None


def _parse(line: str) -> Mapping | None:
    """A line such as ``7f00-7f10 r--p 00001000 fd:01 1234   /path``, if it is of a file."""
    fields = line.split(maxsplit=5)
    if len(fields) < 6 or not fields[5].startswith("/"):
        return None
    start, _, stop = fields[0].partition("-")
    return Mapping(int(start, 16), int(stop, 16), int(fields[2], 16), int(fields[4]), fields[5])


def _read(tensor: Tensor, mapping: Mapping) -> Tensor | None:
    """The bytes that ``tensor`` has in its file; None if that cannot be read any more."""
    copy = torch.empty_like(tensor)
    view = copy.view(-1).view(torch.uint8).numpy().data
    try:
        with Path(mapping.path).open("rb", buffering=0) as file:
            if os.fstat(file.fileno()).st_ino != mapping.inode:
                return None  # another file has taken the name
            file.seek(mapping.offset + tensor.data_ptr() - mapping.start)
            while view:
                count = file.readinto(view)
                if not count:
                    return None
                view = view[count:]
    except OSError:
        return None
    return copy
