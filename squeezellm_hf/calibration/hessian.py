"""Hessians of the layer-wise objectives: second moments of a linear layer's inputs.

With X the inputs of a layer, one token a row, a change D of its weight changes its outputs by
X D^T. The squared change of output channel o is D[o] H D[o]^T with

    H = X^T X                      plain: every token and every output counts the same
    H_g = X^T diag(s_g) X          guided: s_g[t] = mean over o in group g of (dLoss/dz[t,o])^2

z the layer's output, groups of consecutive output channels: the end loss, to second order with its
own gradients for a Hessian, enters each layer's objective (GuidedQuant, arXiv
2505.07004).
"""

from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from squeezellm_hf.calibration.accumulate import input_device
from squeezellm_hf.calibration.objectives import CausalLM, Objective, Sample, to_device

# Columns of a block row of H: only blocks on and below the diagonal are computed.
_BLOCK = 384


def channel_groups(out_features: int, groups: int) -> list[slice]:
    """Cut the output channels into ``groups`` consecutive groups, sizes differing by one at most.

    A layer with fewer channels than groups has one group a channel.
    """
    groups = min(groups, out_features)
    edges = [round(out_features * g / groups) for g in range(groups + 1)]
    return [slice(start, stop) for start, stop in pairwise(edges)]


class Hessians:
    """Second moments of the inputs of linear layers, a :class:`~.accumulate.Statistic`.

    Memory: 4 * in_features^2 bytes a group of a layer; plain Hessians of layers that share their
    input (q, k and v; gate and up) are one.

    Args:
        linears: the layers by name; their weights may lie on several devices.
        groups: by name, the number of groups of a guided Hessian, or 0 for a plain one.
        shared: by name, the first layer of those with the same input, as
            :func:`shared_inputs` finds it. A layer that is not in it has its input to itself.
        sums: sums to go on from, with ``sequences`` sequences in them.
        sequences: 0 without ``sums``.

    Attributes:
        sums: fp32 [groups or 1, in_features, in_features] per name (of several with the same
            input and plain Hessians, the first), on the device of the weight. Only blocks on and
            below the diagonal are filled until :meth:`of`.
    """

    def __init__(
        self,
        linears: Mapping[str, nn.Linear],
        groups: Mapping[str, int],
        shared: Mapping[str, str] | None = None,
        sums: dict[str, Tensor] | None = None,
        sequences: int = 0,
    ) -> None:
        self.linears = linears
        self.sequences = sequences
        self.active = True
        self.needs_gradients = any(groups[name] for name in linears)
        self._key = sum_names(linears, groups, shared)
        self._channels = {
            name: channel_groups(linear.out_features, groups[name]) if groups[name] else []
            for name, linear in linears.items()
        }
        self.sums = sums if sums is not None else {
            name: torch.zeros(
                max(1, len(self._channels[name])), linear.in_features, linear.in_features,
                dtype=torch.float32, device=linear.weight.device,
            )
            for name, linear in linears.items() if self._key[name] == name
        }  # fmt: skip

    def of(self, name: str) -> Tensor:
        """The Hessians of a layer: fp32 [groups or 1, in_features, in_features], symmetric."""
        total = self.sums[self._key[name]]
        for hessian in total:
            for start in range(0, hessian.shape[0], _BLOCK):
                stop = start + _BLOCK
                hessian[start:stop, stop:] = hessian[stop:, start:stop].t()
        return total

    def of_each(self, names: Iterable[str]) -> dict[str, Tensor]:
        """:meth:`of` of those of these layers that have a Hessian."""
        return {name: self.of(name) for name in names if name in self._key}

    def keep(self, names: Iterable[str]) -> None:
        """Drop the sums that none of these layers needs."""
        needed = {self._key[name] for name in names if name in self._key}
        for name in self.sums.keys() - needed:
            del self.sums[name]

    def attach(self, loss_scale: float) -> list[RemovableHandle]:
        """Look at the inputs and, where guided, at the gradients of the outputs."""
        hooks = []
        for name, linear in self.linears.items():
            if self._channels[name]:
                guided = self._guided_hook(name, 1.0 / loss_scale)
                hooks.append(linear.register_forward_hook(guided))
            elif self._key[name] == name:
                hooks.append(linear.register_forward_hook(self._plain_hook(name)))
        return hooks

    def _plain_hook(self, name: str) -> Callable[..., None]:
        def add(_: nn.Module, inputs: tuple[Tensor, ...], __: Tensor) -> None:
            if self.active:
                add_gram(self.sums[name][0], _tokens(inputs[0]))

        return add

    def _guided_hook(self, name: str, factor: float) -> Callable[..., Tensor]:
        channels = self._channels[name]

        def add(inputs: Tensor, gradient: Tensor) -> None:
            if not self.active:
                return
            device = self.sums[name].device
            rows = _tokens(inputs).to(device, torch.float32)
            gradient = _tokens(gradient).to(device, torch.float32) * factor
            for hessian, group in zip(self.sums[name], channels, strict=True):
                # The root mean square on both sides keeps H a Gram matrix, rounding and all.
                root = gradient[:, group].square().mean(dim=1, keepdim=True).sqrt_()
                add_gram(hessian, rows * root)

        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            # Where nothing before it wants a gradient, the graph begins at this layer.
            output = output if output.requires_grad else output.detach().requires_grad_()
            kept = inputs[0].detach()
            output.register_hook(lambda gradient: add(kept, gradient))
            return output

        return hook

    def check(self) -> None:
        """Raise ValueError unless every sum is finite."""
        for name, total in self.sums.items():
            # The trace bounds every entry of a Gram matrix.
            if not bool(total.diagonal(dim1=1, dim2=2).sum().isfinite()):
                raise ValueError(
                    f"the second moments of the inputs of {name} are not finite; calibrate in "
                    f"bfloat16 or float32, not {self.linears[name].weight.dtype}"
                )


def add_gram(hessian: Tensor, rows: Tensor) -> None:
    """Add rows^T rows to the blocks of ``hessian`` on and below the diagonal.

    Args:
        hessian: fp32 [n, n].
        rows: [t, n], any device and floating dtype.
    """
    rows = rows.to(hessian.device, torch.float32)
    with torch.no_grad():
        for start in range(0, hessian.shape[0], _BLOCK):
            stop = start + _BLOCK
            hessian[start:stop, :stop].addmm_(rows[:, start:stop].t(), rows[:, :stop])


def sum_names(
    linears: Mapping[str, Any], groups: Mapping[str, int], shared: Mapping[str, str] | None
) -> dict[str, str]:
    """Under which layer's name each layer's Hessian is summed: see :class:`Hessians`."""
    first: dict[str, str] = {}
    names = {}
    for name in linears:
        source = (shared or {}).get(name, name)
        names[name] = name if groups[name] else first.setdefault(source, name)
    return names


@torch.no_grad()
def shared_inputs(
    model: Any,
    linears: Mapping[str, nn.Linear],
    sequence: Sample,
    objective: Objective | None = None,
) -> dict[str, str]:
    """Which layers have the same input, found by running the model once.

    Args:
        model: as for :func:`~squeezellm_hf.calibration.accumulate.accumulate`.
        linears: the layers by name.
        sequence: token ids, int64 [n], of which the first few are used; or keyword arguments.
        objective: as for :func:`~squeezellm_hf.calibration.accumulate.accumulate`.

    Returns:
        By name, the first layer that got the same tensor. Layers that were not called are left
        out.
    """
    seen: dict[int, tuple[str, Tensor]] = {}  # holds the tensors, so that no id is used again
    first: dict[str, str] = {}

    def hook(name: str) -> Callable[..., None]:
        def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            first[name] = seen.setdefault(id(inputs[0]), (name, inputs[0]))[0]

        return note

    hooks = [linear.register_forward_pre_hook(hook(name)) for name, linear in linears.items()]
    was_training = model.training
    model.eval()
    try:
        sample = sequence[:8] if isinstance(sequence, Tensor) else sequence
        (objective or CausalLM())(model, to_device(sample, input_device(model)), 0)
    finally:
        model.train(was_training)
        for handle in hooks:
            handle.remove()
    return first


def _tokens(matrix: Tensor) -> Tensor:
    """[..., n] -> [tokens, n]."""
    return matrix.detach().flatten(0, -2)
