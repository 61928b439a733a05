"""Modules that stand in for ``torch.nn.Linear``, and for experts that are made of them."""

from squeezellm_hf.nn.experts import Experts
from squeezellm_hf.nn.linear import SqueezeLLMLinear

__all__ = ["Experts", "SqueezeLLMLinear"]
