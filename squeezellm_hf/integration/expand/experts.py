"""Fused experts of Transformers as experts made of linear layers, and back.

Transformers holds the weights of all experts of a layer in two parameters of three dimensions.
Every class that does so is decorated with ``use_experts_implementation``, which says how they lie:

    has_gate        gate_up_proj and down_proj, or up_proj and down_proj
    is_transposed   [experts, in, out] instead of [experts, out, in]
    has_bias        a bias [experts, out] beside each, named <weight>_bias

and gives the class ``_apply_gate``, in which the order of gate and up (one after the other or
interleaved), the activation and its limits are settled. All of that is taken from the module, so
that a new family needs no line here; :data:`_SILENT` has the few classes that are not decorated.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from squeezellm_hf.nn import Experts

DOWN = "down_proj"


class Layout(NamedTuple):
    """How fused experts lie: see above."""

    has_gate: bool = True
    has_bias: bool = False
    is_transposed: bool = False

    @property
    def up(self) -> str:
        """Name of the first weight."""
        return "gate_up_proj" if self.has_gate else "up_proj"


_SILENT = {"Llama4TextExperts": Layout(is_transposed=True), "Step3p7Experts": Layout()}


def layout_of(module: nn.Module) -> Layout | None:
    """The layout of fused experts; None for any other module, or if it has other parameters."""
    traits = [getattr(module, name, None) for name in Layout._fields]
    layout = _SILENT.get(type(module).__name__) if None in traits else Layout(*map(bool, traits))
    if layout is None or isinstance(module, Experts):
        return None
    weights = {layout.up, DOWN}
    biases = {f"{name}_bias" for name in weights} if layout.has_bias else set()
    parameters = module._parameters
    fits = set(parameters) == weights | biases and all(
        parameter is not None and parameter.dim() == (3 if name in weights else 2)
        for name, parameter in parameters.items()
    )
    return layout if fits else None


class ExpandedExperts(Experts):
    """The experts of ``fused``, each weight a view of its parameters wherever one is possible.

    Args:
        fused: has a :func:`layout_of`; not changed.
        device: "meta" for the structure alone.
    """

    original: Any  # fused, without its parameters

    def __init__(self, fused: Any, device: str | None = None) -> None:
        layout = layout_of(fused)
        if layout is None:
            raise ValueError(f"{type(fused).__name__} has no known layout of fused experts")
        original = copy.copy(fused)
        original._parameters = {}
        original._modules = dict(fused._modules)
        norm = "post_expert_norm" if getattr(fused, "has_post_expert_norm", False) else None
        count = fused._parameters[DOWN].shape[0]
        names = (layout.up, DOWN)
        super().__init__(
            [
                nn.ModuleDict({n: _linear(fused, layout, n, index, device) for n in names})
                for index in range(count)
            ],
            *names,
            activation=_activation(original, layout),
            norm=getattr(original, norm) if norm else None,
        )
        for name, child in fused._modules.items():
            self.add_module(name, child)
        self.layout = layout
        self.__dict__["original"] = original
        self.train(fused.training)

    @property
    def is_plain(self) -> bool:
        """Whether all layers are plain linear ones, so that :meth:`fold` works."""
        return all(
            type(expert[name]) is nn.Linear for expert in self for name in (self.up, self.down)
        )

    def fold(self) -> Any:
        """The original module again, with the weights that the linear layers have now.

        Raises:
            ValueError: if a layer is not a plain ``nn.Linear``.
        """
        if not self.is_plain:
            raise ValueError(
                "only plain linear layers can be folded into fused experts; dequantize first"
            )
        fused = self.original
        for name in (self.up, self.down):
            layers = [expert[name] for expert in self]
            weights = [layer.weight.detach() for layer in layers]
            if self.layout.is_transposed:
                weights = [weight.t() for weight in weights]
            wanted = layers[0].weight.requires_grad
            fused._parameters[name] = nn.Parameter(torch.stack(weights), wanted)
            if self.layout.has_bias:
                biases = torch.stack([layer.bias.detach() for layer in layers])
                fused._parameters[f"{name}_bias"] = nn.Parameter(biases, wanted)
        fused.train(self.training)
        return fused


def _activation(original: Any, layout: Layout) -> Callable[[Tensor], Tensor]:
    if not layout.has_gate:
        activation: Callable[[Tensor], Tensor] = original.act_fn
        return activation
    return getattr(original, "_apply_gate", None) or functools.partial(_gate, original.act_fn)


def _gate(act_fn: Callable[[Tensor], Tensor], states: Tensor) -> Tensor:
    gate, up = states.chunk(2, dim=-1)
    return act_fn(gate) * up


def _linear(fused: Any, layout: Layout, name: str, index: int, device: str | None) -> nn.Linear:
    weights = fused._parameters[name]
    weight = weights.detach()[index]
    bias = fused._parameters[f"{name}_bias"].detach()[index] if layout.has_bias else None
    if device is not None:
        weight, bias = weight.to(device), bias if bias is None else bias.to(device)
    if layout.is_transposed:
        weight = weight.t().contiguous()
    return linear(weight, bias, weights.requires_grad)


def linear(weight: Tensor, bias: Tensor | None, requires_grad: bool) -> nn.Linear:
    """A linear layer with these tensors: [out_features, in_features] and [out_features]."""
    # Its __init__ would draw random weights, which takes seconds for thousands of experts.
    layer = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(layer)
    layer.out_features, layer.in_features = weight.shape
    layer.weight = nn.Parameter(weight, requires_grad)
    layer.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad))
    return layer
