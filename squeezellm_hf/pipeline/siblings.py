"""Statistics of layers that calibration barely reached, made up from those of their siblings.

A router sends some experts few tokens of the calibration data, or none. With n_e the tokens that
expert e got, a layer of it gets, for each token that it lacks, what a token gave on average:

    S_e  <-  S_e + max(0, m - n_e) * (sum of S_s) / (sum of n_s),    m = min(ENOUGH_TOKENS, max n_s)

with S the Fisher sums or the Hessians, and s running over the experts of the same block. Layers
that see every token are their own measure, and untouched.
"""

import re
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

ENOUGH_TOKENS = 32

_LAST_INDEX = re.compile(r"\.\d+(?=\.)(?!.*\.\d+\.)")


def family(name: str) -> str:
    """What siblings have in common: a layer's name without the last index in it.

    ``mlp.experts.3.down_proj`` and ``mlp.experts.4.down_proj`` are siblings.
    """
    return _LAST_INDEX.sub(".*", name)


def missing_tokens(tokens: Mapping[str, Tensor]) -> dict[str, int]:
    """How many tokens each layer lacks, of those that lack any or got none.

    Args:
        tokens: int64 [1] per name: how many tokens came by each layer.
    """
    most: dict[str, int] = {}
    for name, count in tokens.items():
        most[family(name)] = max(most.get(family(name), 0), int(count))
    found = {}
    for name, count in tokens.items():
        lacking = min(ENOUGH_TOKENS, most[family(name)]) - int(count)
        if lacking > 0 or not int(count):
            found[name] = lacking
    return found


@torch.no_grad()
def complete(sums: Mapping[str, Tensor], tokens: Mapping[str, Tensor]) -> None:
    """Add to the sums of layers that were barely reached, in place, what their siblings saw.

    Siblings of another shape do not count. A family that was not reached at all stays zero.

    Args:
        sums: fp32 by name, on any devices.
        tokens: int64 [1] per name, of these layers and maybe others.
    """
    lacking = {name: n for name, n in missing_tokens(tokens).items() if n and name in sums}
    wanted: dict[tuple[str, torch.Size], list[str]] = {}
    for name in lacking:
        wanted.setdefault((family(name), sums[name].shape), []).append(name)
    members: dict[tuple[str, torch.Size], list[str]] = {}
    for name, total in sums.items():
        key = (family(name), total.shape)
        if key in wanted and int(tokens[name]):
            members.setdefault(key, []).append(name)
    for key, reached in members.items():
        mean = torch.zeros_like(sums[reached[0]])
        for name in reached:
            mean += sums[name].to(mean.device)
        mean /= sum(int(tokens[name]) for name in reached)
        for name in wanted[key]:
            sums[name].add_(mean.to(sums[name].device), alpha=lacking[name])


def warn(tokens: Mapping[str, Tensor]) -> None:
    """Say how many layers calibration did not reach, or barely."""
    few = missing_tokens(tokens)
    if few:
        none = sum(not int(tokens[name]) for name in few)
        least = min(few, key=lambda name: int(tokens[name]))
        warnings.warn(
            f"{len(few)} of {len(tokens)} layers got fewer than {ENOUGH_TOKENS} tokens of the "
            f"calibration data, {none} of them not a single one (such as {least}): what they lack "
            "comes from the other experts; raise n_samples or sequence_length",
            stacklevel=2,
        )
