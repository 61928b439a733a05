"""Weights that share x in one launch, against a launch for each and against fp64 numpy."""

import pytest
import torch
from torch import Tensor

from squeezellm_hf import ops
from squeezellm_hf.nn import SqueezeLLMLinear, grouping
from tests.ops.cuda_calls import (
    DTYPES,
    FUSED_BITS,
    assert_close,
    has_warpgroups,
    needs_cuda,
    on_gpu,
    poison,
)
from tests.ops.groups import GROUP, arguments
from tests.ops.groups import call as group
from tests.ops.oracle import make_weight, make_x

pytestmark = needs_cuda


@pytest.mark.parametrize("density", [0.0, 0.01])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", FUSED_BITS)
def test_a_group_of_few_rows_is_bit_identical_to_its_calls(
    bits: int, dtype: str, density: float
) -> None:
    """Few enough for a block a tile, alone and together: each tile is the first of its block."""
    for rows, columns in (((33, 16), 512), ((1, 77, 130), 1536), ((64, 16, 16, 5), 8192)):
        made = [
            make_weight(
                n, columns, bits, density=density, full_row=density > 0, table_dtype=dtype, seed=n
            )
            for n in rows
        ]
        weights = [on_gpu(weight) for weight in made]
        weights[-1]["bias"] = torch.linspace(-1, 1, rows[-1], device="cuda")
        x = make_x(1, columns, dtype).cuda()
        expected = [ops.lut_linear(x, **weight, bits=bits) for weight in weights]
        poison(rows[0], x.dtype)
        for y, single in zip(group(x, weights, bits), expected, strict=True):
            assert torch.equal(y, single)


@pytest.mark.parametrize("density", [0.0, 0.005])
@pytest.mark.parametrize("bits", FUSED_BITS)
def test_groups_of_many_rows(bits: int, density: float) -> None:
    """Other blocks than those of the calls: their warps' sums are added in another order."""
    for rows in ((4096, 1024, 1024), (7000, 7001), (2100, 1)):
        made = [
            make_weight(n, 512, bits, density=density, table_dtype="bf16", seed=n) for n in rows
        ]
        x = make_x(1, 512, "bf16")
        results = group(x.cuda(), [on_gpu(weight) for weight in made], bits)
        for y, weight in zip(results, made, strict=True):
            assert_close(y.cpu(), x, weight)


@pytest.mark.parametrize("density", [0.0, 0.005])
def test_groups_of_two_bits_that_are_counted(density: float) -> None:
    """24 M weights or more: by counting bits, though each alone would be looked up."""
    for rows in ((5000, 2001), (3100, 3100, 17)):
        made = [make_weight(n, 4096, 2, density=density, table_dtype="fp16", seed=n) for n in rows]
        x = make_x(1, 4096, "fp16")
        weights = [on_gpu(weight) for weight in made]
        results = group(x.cuda(), weights, 2)
        for y, weight in zip(results, made, strict=True):
            assert_close(y.cpu(), x, weight)
        again = group(x.cuda(), weights, 2)
        assert all(torch.equal(y, z) for y, z in zip(results, again, strict=True))


def test_groups_that_are_several_launches() -> None:
    """Several rows of x, rows of odd length, weights that differ in more than their rows."""
    many = [make_weight(20 + n, 512, 4, seed=n) for n in range(6)]
    cases = [
        (2, many[:2]),
        (40, many[:2]),
        (0, many[:2]),
        (1, many[:1]),
        (1, many),
        (1, [make_weight(20, 77, 3), make_weight(21, 77, 3)]),
        (1, [make_weight(20, 512, 4), make_weight(21, 512, 4, density=0.05)]),
        (1, [make_weight(20, 512, 4), make_weight(21, 512, 4, table_dtype="bf16")]),
        (1, [make_weight(20, 512, 4), make_weight(0, 512, 4)]),
        (1, [make_weight(20, 512, 7), make_weight(21, 512, 7)]),
    ]
    for batch, made in cases:
        weights = [on_gpu(weight) for weight in made]
        bits = made[0].bits
        x = make_x(batch, made[0].matrix.shape[1], "fp16").cuda()
        for y, weight in zip(group(x, weights, bits), weights, strict=True):
            assert torch.equal(y, ops.lut_linear(x, **weight, bits=bits))


@pytest.mark.parametrize("density", [0.0, 0.005])
@pytest.mark.parametrize("bits", FUSED_BITS)
def test_groups_in_a_graph_one_behind_the_other(bits: int, density: float) -> None:
    """Each reads what the one before wrote; blocks go through tiles of all weights."""
    rows = (1024, 3000, 1500)
    weights = [on_gpu(make_weight(n, 1024, bits, density=density, seed=n)) for n in rows]
    x = make_x(1, 1024, "fp16").cuda()

    def chain() -> list[list[Tensor]]:
        outputs = [group(x, weights, bits)]
        for _ in range(20):
            outputs.append(group(outputs[-1][0] / 64, weights, bits))
        return outputs

    expected = chain()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = chain()
    for _ in range(40):
        for results in outputs:
            for y in results:
                y.fill_(float("nan"))
        graph.replay()
        for results, before in zip(outputs, expected, strict=True):
            assert all(torch.equal(y, z) for y, z in zip(results, before, strict=True))


def test_no_row_pointer_or_column_of_a_group_leads_out_of_bounds() -> None:
    weights = [on_gpu(make_weight(n, 512, 4, density=0.05)) for n in (64, 33)]
    generator = torch.Generator(device="cuda").manual_seed(0)
    for weight in weights:
        for name in ("crow_indices", "col_indices"):
            limits = torch.iinfo(weight[name].dtype)
            weight[name].random_(limits.min, limits.max, generator=generator)
    results = group(make_x(1, 512, "fp16").cuda(), weights, 4)
    torch.cuda.synchronize()
    assert [y.shape for y in results] == [(1, 64), (1, 33)]


def test_errors_of_a_group_name_the_weight() -> None:
    weights = [on_gpu(make_weight(n, 128, 3)) for n in (20, 21)]
    weights[1]["lookup_table"] = weights[0]["lookup_table"]
    x = make_x(1, 128, "fp16").cuda()
    with pytest.raises(ValueError, match="weight 1 of the group: lookup_table must be"):
        group(x, weights, 3)


def test_opcheck() -> None:
    weights = [on_gpu(make_weight(n, 128, 3, density=0.05)) for n in (20, 21)]
    x = make_x(1, 128, "fp16").cuda()
    torch.library.opcheck(GROUP.default, arguments(x, weights, 3))


@pytest.mark.skipif(
    torch.cuda.is_available() and not has_warpgroups(), reason="needs compute capability 9.0"
)
@pytest.mark.parametrize("density", [0.0, 0.01])
def test_compiled_layers_of_one_input_are_one_launch(density: float) -> None:
    """In the CUDA graph that torch.compile makes, with the results of a launch for each."""
    layers = [
        SqueezeLLMLinear.from_tensors(
            on_gpu(make_weight(n, 512, 4, density=density, seed=n)), bits=4, in_features=512
        )
        for n in (512, 130, 130)
    ]

    def block(x: Tensor) -> tuple[Tensor, ...]:
        h = torch.nn.functional.rms_norm(x, (512,))
        return tuple(layer(h) * 2 for layer in layers)

    x = make_x(1, 512, "bf16").cuda()[None]
    results, kernels = [], []
    for switch in (grouping.disable, grouping.enable):
        torch._dynamo.reset()
        switch()
        compiled = torch.compile(block, fullgraph=True, mode="reduce-overhead")
        with torch.no_grad():
            for _ in range(4):
                results.append([y.clone() for y in compiled(x)])
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
                compiled(x)
                torch.cuda.synchronize()
        kernels.append([event.name for event in seen.events() if "streamed" in event.name])
    for other in results[1:]:
        assert all(torch.equal(y, z) for y, z in zip(results[0], other, strict=True))
    assert len(kernels[0]) == 3
    assert len(kernels[1]) == 1
    assert "streamed_group_kernel" in kernels[1][0]
