"""Modules that stand in for ``torch.nn.Linear``."""

from squeezellm_hf.nn.linear import SqueezeLLMLinear

__all__ = ["SqueezeLLMLinear"]
