"""GPT-2's ``Conv1D``, a linear layer with its weight transposed, as ``nn.Linear`` and back."""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from squeezellm_hf.integration.expand.experts import linear


def to_linear(layer: Conv1D, device: str | None = None) -> nn.Linear:
    """A linear layer with the same weights, [out_features, in_features].

    Args:
        layer: not changed.
        device: "meta" for the structure alone.
    """
    weight, bias = layer.weight.detach(), layer.bias.detach()
    if device is not None:
        weight, bias = weight.to(device), bias.to(device)
    result = linear(weight.t().contiguous(), bias, layer.weight.requires_grad)
    result.train(layer.training)
    return result


def to_conv1d(layer: nn.Linear) -> Conv1D:
    """The inverse of :func:`to_linear`."""
    with torch.device("meta"):
        result = Conv1D(layer.out_features, layer.in_features)
    wanted = layer.weight.requires_grad
    result.weight = nn.Parameter(layer.weight.detach().t().contiguous(), wanted)
    result.bias = nn.Parameter(layer.bias.detach(), wanted)
    result.train(layer.training)
    return result
