"""What a group does besides, against torch's own steps: RMSNorm, the gate of an MLP, residuals."""

import pytest
import torch
from torch import Tensor, nn

from squeezellm_hf.formats import packing
from squeezellm_hf.nn import SqueezeLLMLinear, grouping
from squeezellm_hf.ops import reference
from tests.ops.cuda_calls import DTYPES, FUSED_BITS, has_warpgroups, needs_cuda, on_gpu, poison
from tests.ops.groups import GROUP, arguments, call, refused_steps
from tests.ops.oracle import ROUNDING, TORCH_DTYPES, make_weight, make_x

pytestmark = needs_cuda

EPS = 1e-5
# Columns of x; as many pieces of 8 as a thread holds at once, and more; rows that fill the blocks.
COLUMNS = [(512, 40), (1536, 40), (5120, 40), (8192, 3100), (20480, 40)]


def selection(rows: int, columns: int, bits: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """A weight each row of which is one column of x; and these columns."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(columns, (rows,), generator=generator)
    chosen[:8], chosen[-8:] = torch.arange(8), columns - 1 - torch.arange(8)
    indices = torch.zeros(rows, columns, dtype=torch.uint8)
    indices[torch.arange(rows), chosen] = 1
    table = torch.zeros(rows, 2**bits, dtype=torch.float16)
    table[:, 1] = 1
    tensors = {"qweight": packing.pack(indices, bits).cuda(), "lookup_table": table.cuda()}
    return tensors, chosen.cuda()


def normalized(x: Tensor, weight: Tensor) -> Tensor:
    """x after a norm, rounded where the kernels do: with bf16 the scale comes last."""
    if x.dtype != torch.bfloat16 or torch.cuda.get_device_capability()[0] < 9:
        return reference.rms_norm(x, weight, EPS)
    scale = (x.double().square().mean() + EPS).rsqrt()
    return ((x * weight).double() * scale).to(x.dtype)


def random(columns: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, columns, generator=generator).to(dtype).cuda()


def assert_steps(y: Tensor, expected: Tensor, columns: Tensor) -> None:
    """These columns, equal but for a rounding here and there.

    Counted bits (streamed_planes.cuh) round to 2^-23 of the largest of all columns.
    """
    relative, absolute = ROUNDING[y.dtype]
    absolute = 4 * absolute + 2**-22 * float(expected.abs().max())
    expected = expected[:, columns].double()
    error = (y.double() - expected).abs()
    assert (error <= 4.01 * relative * expected.abs() + absolute).all()
    assert (error > 2**-22 * expected.abs().max()).double().mean() < 0.02


@pytest.mark.parametrize(("columns", "rows"), COLUMNS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", FUSED_BITS)
def test_a_norm_before(bits: int, dtype: str, columns: int, rows: int) -> None:
    x = random(columns, TORCH_DTYPES[dtype], 0) * 3
    weight = 1 + random(columns, TORCH_DTYPES[dtype], 1)[0] / 4
    made = [selection(rows, columns, bits, seed) for seed in (0, 1)]
    poison(rows, x.dtype)
    results = call(x, [tensors for tensors, _ in made], bits, norm_weight=weight, norm_eps=EPS)
    for y, (_, chosen) in zip(results, made, strict=True):
        assert_steps(y, normalized(x, weight), chosen)


@pytest.mark.parametrize(("columns", "rows"), COLUMNS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", FUSED_BITS)
def test_a_factor_before(bits: int, dtype: str, columns: int, rows: int) -> None:
    x, factor = (random(columns, TORCH_DTYPES[dtype], seed) * 3 for seed in (0, 1))
    tensors, chosen = selection(rows, columns, bits, 0)
    poison(rows, x.dtype)
    (y,) = call(x, [tensors], bits, factor=factor)
    assert_steps(y, x * factor, chosen)


@pytest.mark.parametrize(("columns", "rows"), COLUMNS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", FUSED_BITS)
def test_silu_behind(bits: int, dtype: str, columns: int, rows: int) -> None:
    """Of one weight, and not of the others."""
    x = random(columns, TORCH_DTYPES[dtype], 0) * 3
    x[0, :8] = torch.tensor([0.0, -0.0, 100, -100, 50, -50, 20, -20])
    made = [selection(rows, columns, bits, seed) for seed in (0, 1, 2)]
    for place in range(3):
        results = call(x, [tensors for tensors, _ in made], bits, silu=place)
        for i, (y, (_, chosen)) in enumerate(zip(results, made, strict=True)):
            assert_steps(y, nn.functional.silu(x) if i == place else x, chosen)


@pytest.mark.parametrize("density", [0.0, 0.01])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", FUSED_BITS)
def test_a_residual_behind(bits: int, dtype: str, density: float) -> None:
    """Bit for bit: after the rounding of what a call without one returns."""
    for rows, columns in ((77, 512), (3100, 1024), (3100, 8192)):
        weight = on_gpu(make_weight(rows, columns, bits, density=density, table_dtype=dtype))
        weight["bias"] = torch.linspace(-1, 1, rows, device="cuda")
        x = make_x(1, columns, dtype).cuda()
        residual = random(rows, x.dtype, 2) * 30
        # A norm whose weight makes nothing of it, lest the call be an ordinary one.
        norm = {"norm_weight": torch.ones(columns, dtype=x.dtype, device="cuda"), "norm_eps": EPS}
        (without,) = call(x, [weight], bits, **norm)
        poison(rows, x.dtype)
        (y,) = call(x, [weight], bits, **norm, residual=residual)
        assert torch.equal(y, without + residual)


def test_where_they_are_launches_of_their_own() -> None:
    """Several rows, rows of odd length, other widths, fp32, activations beside a boundary."""
    cases = [
        (3, "bf16", [make_weight(20, 512, 4, density=0.05), make_weight(33, 512, 4)]),
        (1, "fp16", [make_weight(20, 77, 3)]),
        (1, "bf16", [make_weight(20, 512, 7)]),
        (2, "fp32", [make_weight(20, 512, 3, table_dtype="fp32")]),
        (0, "bf16", [make_weight(20, 512, 4)]),
        (1, "bf16", [make_weight(0, 512, 4)]),
        (300, "bf16", [make_weight(40, 512, 4, density=0.05)]),
        (1, "bf16", [make_weight(16, 131072, 4)]),
    ]
    for batch, dtype, made in cases:
        columns = made[0].matrix.shape[1]
        x = make_x(batch, columns, dtype).cuda()
        weights, bits = [on_gpu(weight) for weight in made], made[0].bits
        norm = {"norm_weight": torch.linspace(0, 2, columns, device="cuda").to(x.dtype)}
        for steps in ({**norm, "norm_eps": EPS}, {"factor": x.flip(-1), "silu": 0}, {}):
            if len(weights) == 1:
                steps["residual"] = torch.ones(batch, made[0].matrix.shape[0]).to(x)
            expected = reference.lut_linear_group(*arguments(x, weights, bits), **steps)
            relative = ROUNDING[x.dtype][0]
            for y, other in zip(call(x, weights, bits, **steps), expected, strict=True):
                scale = float(other.double().abs().max()) if other.numel() else 0.0
                torch.testing.assert_close(y, other, rtol=0, atol=4 * relative * scale + 1e-6)


def test_tensors_that_are_not_contiguous_or_aligned() -> None:
    weight = on_gpu(make_weight(40, 512, 4))
    x = make_x(1, 512, "bf16").cuda()
    norm_weight = torch.linspace(0, 2, 513, device="cuda", dtype=x.dtype)
    odd = {"norm_weight": norm_weight[1:], "norm_eps": EPS}
    even = {"norm_weight": norm_weight[1:].clone(), "norm_eps": EPS}
    (y,), (expected,) = call(x, [weight], 4, **odd), call(x, [weight], 4, **even)
    # Other kernels, which round otherwise.
    atol = 4 * ROUNDING[x.dtype][0] * float(expected.abs().max())
    torch.testing.assert_close(y, expected, rtol=0, atol=atol)
    spread = torch.stack([x, x], -1)[..., 0]
    (y,), (expected,) = call(x, [weight], 4, factor=spread), call(x, [weight], 4, factor=x)
    assert torch.equal(y, expected)


@pytest.mark.parametrize("density", [0.0, 0.005])
@pytest.mark.parametrize("bits", FUSED_BITS)
def test_blocks_in_a_graph_one_behind_the_other(bits: int, density: float) -> None:
    """Each call reads what the ones before it wrote, while they end: a hundred runs alike."""
    size, inner = 1024, 3008

    def weight(rows: int, columns: int, seed: int) -> dict[str, Tensor]:
        return on_gpu(make_weight(rows, columns, bits, density=density, seed=seed))

    qkv = [weight(size, size, 0), weight(256, size, 1), weight(256, size, 2)]
    o, down = weight(size, size, 3), weight(size, inner, 4)
    halves = [weight(inner, size, 5), weight(inner, size, 6)]
    norm = {"norm_weight": random(size, torch.bfloat16, 7)[0] / 8, "norm_eps": EPS}
    start = random(size, torch.bfloat16, 8)

    def chain() -> list[Tensor]:
        h, outputs = start, []
        for _ in range(12):
            q, *_ = call(h, qkv, bits, **norm)
            (h,) = call(q, [o], bits, residual=h)
            gate, up = call(h, halves, bits, **norm, silu=0)
            (h,) = call(up, [down], bits, factor=gate, residual=h)
            outputs += [q, gate, up, h]
        return outputs

    expected = [y.clone() for y in chain()]
    assert all(y.isfinite().all() for y in expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = chain()
    for _ in range(100):
        for y in outputs:
            y.fill_(float("nan"))
        graph.replay()
        assert all(torch.equal(y, z) for y, z in zip(outputs, expected, strict=True))


def test_a_norm_whose_weight_the_kernel_before_made() -> None:
    """It is not read before that kernel has ended."""
    maker, weight = (on_gpu(make_weight(n, 512, 4, seed=n)) for n in (512, 40))
    x = random(512, torch.bfloat16, 0)

    def steps(source: Tensor) -> Tensor:
        (norm_weight,) = call(source, [maker], 4, factor=source)
        return call(x, [weight], 4, norm_weight=norm_weight[0], norm_eps=EPS)[0]

    sources = [random(512, torch.bfloat16, seed) for seed in range(20)]
    expected = []
    for source in sources:
        (norm_weight,) = call(source, [maker], 4, factor=source)
        torch.cuda.synchronize()
        expected += call(x, [weight], 4, norm_weight=norm_weight[0], norm_eps=EPS)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [steps(source) for source in sources]
    for _ in range(50):
        graph.replay()
        assert all(torch.equal(y, z) for y, z in zip(outputs, expected, strict=True))


class Block(nn.Module):
    """A gated MLP of quantized layers, as in Llama's blocks."""

    def __init__(self, density: float) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.linspace(0.5, 1.5, 512).to("cuda", torch.bfloat16))
        self.gate, self.up, self.down = (
            SqueezeLLMLinear.from_tensors(
                on_gpu(make_weight(*shape, 4, density=density)), bits=4, in_features=shape[1]
            )
            for shape in ((1504, 512), (1504, 512), (512, 1504))
        )

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            h = reference.rms_norm(x, self.norm, EPS)
            x = x + self.down(nn.functional.silu(self.gate(h)) * self.up(h)) / 8
            x = x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return x


@pytest.mark.skipif(
    torch.cuda.is_available() and not has_warpgroups(), reason="needs compute capability 9.0"
)
@pytest.mark.parametrize("density", [0.0, 0.01])
def test_a_compiled_block(density: float) -> None:
    """A kernel for each group, one for each division with its sum, and close to eager."""
    block, x = Block(density), random(512, torch.bfloat16, 0)[None] / 8
    grouping.enable()
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        expected = block(x)
        for _ in range(4):
            y = compiled(x).clone()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
            compiled(x)
            torch.cuda.synchronize()
    torch.testing.assert_close(y, expected, rtol=0.03, atol=0.03 * float(expected.abs().max()))
    names = [event.name for event in seen.events()]
    assert sum("streamed_group_kernel" in name for name in names) == 8
    assert sum("triton" in name for name in names) == 2


def test_errors_name_the_argument() -> None:
    weights = [on_gpu(make_weight(n, 128, 3)) for n in (20, 21)]
    x = make_x(1, 128, "fp16").cuda()
    elsewhere = ({"factor": x.cpu()}, "factor must be on the CUDA device")
    for steps, message in (*refused_steps(x, len(weights)), elsewhere):
        with pytest.raises(ValueError, match=message):
            call(x, weights, 3, **steps)
    with pytest.raises(ValueError, match=r"residual must have .* the shape \[1, 20\], got"):
        call(x, weights[:1], 3, residual=x)


def test_opcheck() -> None:
    weight = on_gpu(make_weight(128, 128, 3, density=0.05))
    x = make_x(1, 128, "fp16").cuda()
    torch.library.opcheck(GROUP.default, (*arguments(x, [weight], 3), x[0], EPS, 0, None, x))
