"""What CUDA calls take: views, empty batches, other devices; opcheck."""

import pytest
import torch

from squeezellm_hf import ops
from tests.ops.cuda_calls import assert_close, needs_cuda, on_gpu
from tests.ops.oracle import make_weight, make_x

pytestmark = needs_cuda


def test_views_and_empty_batches() -> None:
    weight = make_weight(33, 128, 4)
    wide = make_x(5, 256, "fp16")
    x = wide[:, 3:131]
    assert_close(ops.lut_linear(x.cuda(), **on_gpu(weight), bits=4).cpu(), x, weight)
    assert ops.lut_linear(x[:0].cuda(), **on_gpu(weight), bits=4).shape == (0, 33)
    assert ops.lut_linear(x[None].cuda(), **on_gpu(weight), bits=4).shape == (1, 5, 33)


def test_opcheck() -> None:
    weight = on_gpu(make_weight(20, 128, 3, density=0.05))
    sparse = (weight["crow_indices"], weight["col_indices"], weight["values"])
    x = make_x(3, 128, "fp16").cuda()
    for op in (torch.ops.squeezellm_hf.lut_linear, torch.ops.squeezellm_hf.lut_linear_no_grad):
        torch.library.opcheck(
            op.default, (x, weight["qweight"], weight["lookup_table"], *sparse, None, 3)
        )
    torch.library.opcheck(
        torch.ops.squeezellm_hf.lut_dequantize,
        (weight["qweight"], weight["lookup_table"], *sparse, 3, 128, torch.float16),
    )


def test_tensors_on_several_devices_are_refused() -> None:
    weight = on_gpu(make_weight(20, 128, 3))
    weight["lookup_table"] = weight["lookup_table"].cpu()
    with pytest.raises((ValueError, RuntimeError), match="lookup_table must be on the CUDA device"):
        ops.lut_linear(make_x(3, 128, "fp16").cuda(), **weight, bits=3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_second_device() -> None:
    weight = make_weight(70, 256, 4, density=0.01)
    x = make_x(20, 256, "fp16")
    tensors = {name: tensor.to("cuda:1") for name, tensor in weight.tensors.items()}
    for batch in (1, 20):
        y = ops.lut_linear(x[:batch].to("cuda:1"), **tensors, bits=4)
        assert y.device == torch.device("cuda:1")
        assert_close(y.cpu(), x[:batch], weight)
