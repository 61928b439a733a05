"""Rows of a matrix in chunks, on a CPU several chunks at once."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

# Cells of a chunk, for tables of up to _NARROW entries. On a CPU the temporaries (about 100 bytes
# a cell at 4 bits) then stay near a core's caches; elsewhere few launches matter more.
_CPU_CELLS = 1 << 16
_DEVICE_CELLS = 1 << 21
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
    slices = [slice(start, start + step) for start in range(0, rows, step)]
    if threads == 1 or len(slices) == 1:
        for rows_of_chunk in slices:
            task(rows_of_chunk)
        return
    try:
        with ThreadPoolExecutor(threads, initializer=_start_thread) as pool:
            list(pool.map(task, slices))
    finally:
        # A thread's setting is also the default of threads that start later.
        torch.set_num_threads(threads)


def _start_thread() -> None:
    torch.set_num_threads(1)
