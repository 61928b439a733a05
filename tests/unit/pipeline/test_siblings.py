"""Statistics of layers that calibration barely reached."""

import pytest
import torch
from torch import Tensor

from squeezellm_hf.pipeline.siblings import ENOUGH_TOKENS, complete, family, missing_tokens, warn


def counts(**tokens: int) -> dict[str, Tensor]:
    return {f"layers.0.experts.{n[1:]}.up": torch.tensor([count]) for n, count in tokens.items()}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.12.mlp.experts.3.down_proj", "model.layers.12.mlp.experts.*.down_proj"),
        ("model.layers.12.self_attn.q_proj", "model.layers.*.self_attn.q_proj"),
        ("lm_head", "lm_head"),
        ("fc1.2", "fc1.2"),
    ],
)
def test_family(name: str, expected: str) -> None:
    assert family(name) == expected


def test_missing_tokens() -> None:
    assert missing_tokens(counts(e0=100, e1=ENOUGH_TOKENS, e2=5, e3=0)) == {
        "layers.0.experts.2.up": ENOUGH_TOKENS - 5,
        "layers.0.experts.3.up": ENOUGH_TOKENS,
    }
    # Short data is no reason to mix layers that saw all of it.
    assert missing_tokens({f"layers.{i}.fc": torch.tensor([7]) for i in range(3)}) == {}
    assert missing_tokens(counts(e0=0, e1=0)) == dict.fromkeys(counts(e0=0, e1=0), 0)


def test_complete_adds_the_mean_of_a_token() -> None:
    tokens = counts(e0=100, e1=50, e2=10, e3=0)
    generator = torch.Generator().manual_seed(0)
    sums = {name: torch.rand(3, 4, generator=generator) for name in tokens}
    sums["layers.0.experts.3.up"].zero_()
    before = {name: total.double() for name, total in sums.items()}
    complete(sums, tokens)
    names = list(tokens)
    mean = torch.stack([before[name] for name in names]).sum(0) / 160
    for name, lacking in zip(names, (0, 0, ENOUGH_TOKENS - 10, ENOUGH_TOKENS), strict=True):
        torch.testing.assert_close(sums[name].double(), before[name] + lacking * mean)
        if not lacking:
            assert sums[name].double().equal(before[name])


def test_other_shapes_and_other_blocks_do_not_count() -> None:
    tokens = counts(e0=100, e1=0) | {"layers.1.experts.0.up": torch.tensor([100])}
    sums = {
        "layers.0.experts.0.up": torch.ones(2, 2),
        "layers.0.experts.1.up": torch.zeros(3, 2),
        "layers.1.experts.0.up": torch.ones(3, 2),
    }
    complete(sums, tokens)
    assert not sums["layers.0.experts.1.up"].any()


def test_warns_with_numbers() -> None:
    with pytest.warns(
        UserWarning, match=r"2 of 3 layers .* 1 of them not a single one .*experts\.2\.up"
    ):
        warn(counts(e0=100, e1=3, e2=0))
