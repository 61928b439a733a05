"""CUDA calls one behind the other, in graphs and on streams: the same bits, memory of their own."""

import pytest
import torch

from squeezellm_hf import ops
from tests.ops.cuda_calls import FUSED_BITS, as_multiplied, assert_close, needs_cuda, on_gpu
from tests.ops.oracle import make_weight, make_x

pytestmark = needs_cuda


@pytest.mark.parametrize("density", [0.0, 0.01])
@pytest.mark.parametrize("batch", [1, 8, 16, 24, 64, 256])
def test_results_are_bit_identical(batch: int, density: float) -> None:
    weight = on_gpu(make_weight(300, 2048, 4, density=density))
    x = make_x(batch, 2048, "fp16").cuda()
    first = ops.lut_linear(x, **weight, bits=4)
    for _ in range(100):
        assert torch.equal(ops.lut_linear(x, **weight, bits=4), first)


@pytest.mark.parametrize("density", [0.0, 0.005])
@pytest.mark.parametrize("batch", [1, 4, 8, 12, 24, 40])
@pytest.mark.parametrize("bits", FUSED_BITS)
def test_thousands_of_calls_one_behind_the_other(bits: int, batch: int, density: float) -> None:
    """Blocks that go through many short tiles, at whatever pace: as calls follow in a graph."""
    # Of 2 bits enough for one activation to be multiplied by counting bits.
    columns = 2048 if bits == 2 and batch == 1 else 1024
    made = make_weight(14336, columns, bits, density=density)
    weight, x = on_gpu(made), make_x(batch, columns, "fp16")
    on_device = x.cuda()
    expected = ops.lut_linear(on_device, **weight, bits=bits)
    assert_close(expected.cpu(), x, as_multiplied(made, batch, "fp16"))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [ops.lut_linear(on_device, **weight, bits=bits) for _ in range(100)]
    for _ in range(40):
        for y in outputs:
            y.fill_(float("nan"))
        graph.replay()
        assert all(torch.equal(y, expected) for y in outputs)


@pytest.mark.parametrize(
    ("shape", "density", "batch"),
    [((4096, 1024), density, batch) for density in (0.0, 0.005) for batch in (12, 24, 40)]
    + [((11000, 2048), 0.0, batch) for batch in (100, 500)],
)
def test_calls_one_behind_the_other_have_memory_of_their_own(
    shape: tuple[int, int], density: float, batch: int
) -> None:
    """Calls in a graph take the same memory in turn: for copies of x, and sums for other blocks."""
    weight = on_gpu(make_weight(*shape, 4, density=density))
    xs = [make_x(batch, shape[1], "bf16", seed).cuda() for seed in range(3)]
    expected = [ops.lut_linear(x, **weight, bits=4) for x in xs]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [ops.lut_linear(xs[i % 3], **weight, bits=4) for i in range(60)]
    for _ in range(40):
        for y in outputs:
            y.fill_(float("nan"))
        graph.replay()
        assert all(torch.equal(y, expected[i % 3]) for i, y in enumerate(outputs))


@pytest.mark.parametrize("batch", [1, 8, 40, 300])
def test_graphs_and_streams(batch: int) -> None:
    weight = on_gpu(make_weight(130, 512, 4, density=0.01))
    x = make_x(batch, 512, "fp16").cuda()
    expected = ops.lut_linear(x, **weight, bits=4)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        beside = ops.lut_linear(x, **weight, bits=4)
    stream.synchronize()
    assert torch.equal(beside, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = ops.lut_linear(x, **weight, bits=4)
    for _ in range(3):
        replayed.fill_(float("nan"))
        graph.replay()
        assert torch.equal(replayed, expected)
