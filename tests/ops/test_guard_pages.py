"""Tensors that end where readable memory ends: one byte read too far would be a segmentation fault.

This reaches the masked loads and gathers of the vector kernels, which AddressSanitizer does not
instrument.
"""

import ctypes
import mmap
import sys

import pytest
import torch
from torch import Tensor

from squeezellm_hf import ops
from tests.ops.oracle import TORCH_DTYPES, assert_linear, make_weight, make_x

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="uses mprotect")


def at_end_of_memory(tensor: Tensor) -> Tensor:
    """A copy whose last byte is followed by a page that must not be read."""
    data = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    readable = -(-max(len(data), 1) // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, readable + mmap.PAGESIZE)
    start = readable - len(data)
    memory[start:readable] = data
    guard = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + readable
    libc = ctypes.CDLL(None, use_errno=True)
    protect = libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(mmap.PAGESIZE), 0)
    assert protect == 0
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=start)
    return copy.view(tensor.shape)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("in_features", [1, 9, 32, 130, 515])
def test_reads_stay_inside(instruction_set: str, bits: int, in_features: int) -> None:
    for table_dtype in TORCH_DTYPES:
        weight = make_weight(7, in_features, bits, density=0.2, table_dtype=table_dtype)
        tensors = {name: at_end_of_memory(tensor) for name, tensor in weight.tensors.items()}
        bias = at_end_of_memory(torch.zeros(7))
        for dtype, result in TORCH_DTYPES.items():
            if dtype == "bf16":
                continue  # its own rounding is tested elsewhere; the loads are those of fp16
            for batch in (1, 2, 3, 6):
                x = at_end_of_memory(make_x(batch, in_features, dtype))
                assert_linear(ops.lut_linear(x, **tensors, bits=bits, bias=bias), x, weight.matrix)
            ops.lut_dequantize(**tensors, bits=bits, in_features=in_features, dtype=result)
        x = at_end_of_memory(make_x(6, in_features, "bf16"))
        ops.lut_linear(x, **tensors, bits=bits)
