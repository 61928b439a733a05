"""The layout of fused experts, on every class of the installed transformers that has it."""

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from squeezellm_hf.integration.expand.experts import ExpandedExperts

EXPERTS = 8


class AnyConfig:
    """A config of any family: whatever is asked for is small."""

    _experts_implementation = "eager"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if "act" in name:
            return "silu"
        return EXPERTS if "experts" in name else 16


def experts_classes() -> list[str]:
    """Every class of transformers that keeps to the layout of fused experts."""
    found = []
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        for match in re.finditer(
            r"^@use_experts_implementation.*\nclass (\w+)\(", path.read_text(), re.M
        ):
            found.append(f"{path.parent.name}.{path.stem}.{match.group(1)}")
    return found


@pytest.mark.parametrize("name", experts_classes())
def test_every_class_of_experts_is_known(name: str) -> None:
    module, _, kind = name.rpartition(".")
    torch.manual_seed(0)
    fused = getattr(importlib.import_module(f"transformers.models.{module}"), kind)(AnyConfig())
    for parameter in fused.parameters():
        nn.init.normal_(parameter)
    x, index = torch.randn(10, 16), torch.randint(0, EXPERTS, (10, 3))
    weight = torch.rand(10, 3)
    with torch.no_grad():
        expanded = ExpandedExperts(fused)
        expected = fused(x, index, weight)
        assert (expanded(x, index, weight) - expected).norm() < 1e-5 * expected.norm()
    state = expanded.fold().state_dict()
    assert state.keys() == fused.state_dict().keys()
    assert all(tensor.equal(state[n]) for n, tensor in fused.state_dict().items())
