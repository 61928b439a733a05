"""Which layers are chosen, and how patterns are read."""

import pytest
import torch
from torch import nn

from squeezellm_hf.methods.squeezellm import SqueezeLLMParameters
from squeezellm_hf.pipeline import make_plan
from squeezellm_hf.pipeline.plan import check_overrides, matches

DEFAULTS = SqueezeLLMParameters()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 8)
        self.down = nn.Linear(8, 4)
        self.norm = nn.LayerNorm(4)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(11))
        self.lm_head = nn.Linear(4, 9)


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("up", "layers.0.up", True),
        ("layers.1", "layers.1.up", True),
        ("layers.1", "layers.10.up", False),
        ("layer", "layers.1.up", False),
        ("layers.0.up", "layers.0.up", True),
        ("re:.*up", "layers.0.up", True),
        ("re:up", "layers.0.up", False),
        (r"re:layers\.(0|1)\.", "layers.10.up", False),
    ],
)
def test_matches(pattern: str, name: str, expected: bool) -> None:
    assert matches(pattern, name) is expected


def test_every_linear_layer_but_the_skipped() -> None:
    plan = make_plan(Model(), DEFAULTS, skip=["lm_head"])
    assert len(plan) == 22
    assert set(plan.values()) == {DEFAULTS}


def test_the_first_override_that_fits_counts() -> None:
    overrides = {"layers.0": {"skip": True}, "re:.*down": {"bits": 3}, "layers": {"bits": 2}}
    plan = make_plan(Model(), DEFAULTS, skip=["lm_head"], overrides=overrides)
    assert len(plan) == 20
    assert {p.bits for name, p in plan.items() if name.endswith("down")} == {3}
    assert {p.bits for name, p in plan.items() if name.endswith("up")} == {2}
    assert plan["layers.1.down"].outlier_fraction == DEFAULTS.outlier_fraction


def test_works_on_meta() -> None:
    with torch.device("meta"):
        assert make_plan(Model(), DEFAULTS, skip=["lm_head"])


def test_nothing_to_quantize() -> None:
    with pytest.raises(ValueError, match=r"LayerNorm has nothing to quantize: it has no"):
        make_plan(nn.LayerNorm(3), DEFAULTS)
    with pytest.raises(ValueError, match="nothing to quantize: of its 23 linear layers all are"):
        make_plan(Model(), DEFAULTS, skip=["lm_head", "layers"])


def test_an_override_without_a_layer_is_named() -> None:
    with pytest.raises(ValueError, match=r"overrides\['gate'\] fits no linear layer of Model"):
        make_plan(Model(), DEFAULTS, overrides={"gate": {"bits": 3}})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([("up", 3)], "overrides must be a mapping"),
        ({"up": 3}, r"overrides\['up'\] must be a mapping"),
        ({"up": {"bit": 3}}, r"overrides\['up'\] has the unknown option 'bit'"),
        ({"up": {"bits": 11}}, r"overrides\['up'\]: bits"),
        ({"up": {"skip": False}}, r"overrides\['up'\]: skip must stand alone"),
        ({"up": {"skip": True, "bits": 3}}, r"overrides\['up'\]: skip must stand alone"),
        ({"re:(": {"bits": 3}}, "is not a regular expression"),
        ({"": {"bits": 3}}, "a pattern must be a non-empty string"),
    ],
)
def test_wrong_overrides_are_named(overrides: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_overrides(overrides, DEFAULTS)  # type: ignore[arg-type]
