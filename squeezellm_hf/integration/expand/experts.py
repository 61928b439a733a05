"""Fused experts of Transformers as experts made of linear layers, and back.

Transformers holds the weights of all experts of a layer in two parameters of three dimensions.
Every class that does so is decorated with ``use_experts_implementation``, which says how they lie:

    has_gate        gate_up_proj and down_proj, or up_proj and down_proj
    is_transposed   [experts, in, out] instead of [experts, out, in]
    has_bias        a bias [experts, out] beside each, named <weight>_bias

and gives the class ``_apply_gate``, in which the order of gate and up (one after the other or
interleaved), the activation and its limits are settled. All of that is taken from the module, so
that a new family needs no line here.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from squeezellm_hf.nn import Experts

DOWN = "down_proj"


def is_fused_experts(module: nn.Module) -> bool:
    """Whether ``module`` keeps to the layout above, with no parameter beyond it."""
    traits = [getattr(module, name, None) for name in ("has_gate", "has_bias", "is_transposed")]
    if not all(isinstance(trait, bool) for trait in traits) or isinstance(module, Experts):
        return False
    weights = {_up(module), DOWN}
    biases = {f"{name}_bias" for name in weights} if module.has_bias else set()
    parameters = module._parameters
    return set(parameters) == weights | biases and all(
        weight is not None and weight.dim() == (3 if name in weights else 2)
        for name, weight in parameters.items()
    )


class ExpandedExperts(Experts):
    """The experts of ``fused``, each weight a view of its parameters wherever one is possible.

    Args:
        fused: see :func:`is_fused_experts`; not changed.
        device: "meta" for the structure alone.
    """

    original: Any  # fused, without its parameters

    def __init__(self, fused: Any, device: str | None = None) -> None:
        original = copy.copy(fused)
        original._parameters = {}
        original._modules = dict(fused._modules)
        norm = "post_expert_norm" if getattr(fused, "has_post_expert_norm", False) else None
        count = fused._parameters[DOWN].shape[0]
        names = (_up(fused), DOWN)
        super().__init__(
            [
                nn.ModuleDict({name: _linear(fused, name, index, device) for name in names})
                for index in range(count)
            ],
            *names,
            activation=original._apply_gate if fused.has_gate else original.act_fn,
            norm=getattr(original, norm) if norm else None,
        )
        for name, child in fused._modules.items():
            self.add_module(name, child)
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
            if fused.is_transposed:
                weights = [weight.t() for weight in weights]
            wanted = layers[0].weight.requires_grad
            fused._parameters[name] = nn.Parameter(torch.stack(weights), wanted)
            if fused.has_bias:
                biases = torch.stack([layer.bias.detach() for layer in layers])
                fused._parameters[f"{name}_bias"] = nn.Parameter(biases, wanted)
        fused.train(self.training)
        return fused


def _up(fused: Any) -> str:
    return "gate_up_proj" if fused.has_gate else "up_proj"


def _linear(fused: Any, name: str, index: int, device: str | None) -> nn.Linear:
    weights = fused._parameters[name]
    weight = weights.detach()[index]
    bias = fused._parameters[f"{name}_bias"].detach()[index] if fused.has_bias else None
    if device is not None:
        weight, bias = weight.to(device), bias if bias is None else bias.to(device)
    if fused.is_transposed:
        weight = weight.t().contiguous()
    return linear(weight, bias, weights.requires_grad)


def linear(weight: Tensor, bias: Tensor | None, requires_grad: bool) -> nn.Linear:
    """A linear layer with these tensors: [out_features, in_features] and [out_features]."""
    out_features, in_features = weight.shape
    layer = nn.Linear(in_features, out_features, bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad)
    return layer
