"""Rows of a matrix in chunks, on a CPU several chunks at once."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

# Cells of a chunk, for tables of up to _NARROW entries. On a CPU the temporaries (about 100 bytes
# a cell at 4 bits) then stay near a core's caches; elsewhere few launches matter more.
_CPU_CELLS = 1 << 16
_DEVICE_CELLS = 1 << 23
_NARROW = 64


def for_each_chunk(matrix: Tensor, bits: int, task: Callable[[slice], None]) -> None:
    """Call ``task`` with slices that together cover the rows of ``matrix`` once.

    On a CPU there are as many threads as PyTorch uses, each on chunks of its own with PyTorch's
    own threads off: hundreds of small operations a chunk would otherwise each wait for the
    slowest thread, which on a machine that does other work as well costs far more than they do.

    Args:
        matrix: [out_features, in_features].
        bits: width of an index; wide tables need more memory a row, so that chunks are smaller.
        task: works on the rows of a slice, and on nothing that another slice's call writes.
    """
    rows, columns = matrix.shape
    on_cpu = matrix.device.type == "cpu"
    threads = torch.get_num_threads() if on_cpu else 1
    cells = (_CPU_CELLS if on_cpu else _DEVICE_CELLS) // max(1, 2**bits // _NARROW)
    step = max(1, min(cells // columns, -(-rows // threads)))
    in_threads(task, [slice(start, start + step) for start in range(0, rows, step)], on_cpu=on_cpu)


def in_threads(task: Callable[[T], None], arguments: Sequence[T], *, on_cpu: bool) -> None:
    """Call ``task`` with every argument, on a CPU several calls at once."""
    threads = torch.get_num_threads() if on_cpu else 1
    if threads == 1 or len(arguments) <= 1:
        for argument in arguments:
            task(argument)
        return
    try:
        with ThreadPoolExecutor(threads, initializer=_start_thread) as pool:
            list(pool.map(task, arguments))
    finally:
        # A thread's setting is also the default of threads that start later.
        torch.set_num_threads(threads)


def _start_thread() -> None:
    torch.set_num_threads(1)
