"""Weights mapped from a file start anywhere; the kernels want them on a cache line."""

import torch

from squeezellm_hf.nn import SqueezeLLMLinear
from tests.ops.oracle import make_weight


def test_align_copies_a_misplaced_weight_only() -> None:
    tensors = make_weight(8, 32, 4).tensors
    qweight = tensors["qweight"]
    room = torch.empty(qweight.numel() + 1, dtype=torch.int32)
    misplaced = room[1:].view(qweight.shape)
    misplaced.copy_(qweight)
    layer = SqueezeLLMLinear.from_tensors({**tensors, "qweight": misplaced}, bits=4, in_features=32)
    assert layer.qweight.data_ptr() % 64 == 4
    layer.align()
    aligned = layer.qweight.data_ptr()
    assert aligned % 64 == 0
    assert torch.equal(layer.qweight, qweight)
    layer.align()
    assert layer.qweight.data_ptr() == aligned
