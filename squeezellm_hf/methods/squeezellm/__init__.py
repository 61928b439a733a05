"""SqueezeLLM (arXiv 2306.07629): sensitivity-weighted k-means per row, and a sparse part."""

from squeezellm_hf.methods.squeezellm.config import SqueezeLLMParameters
from squeezellm_hf.methods.squeezellm.objective import quadratic_error, weighted_squared_error
from squeezellm_hf.methods.squeezellm.quantize import (
    WeightMatrix,
    quantize_weight,
    quantize_weights,
)

__all__ = [
    "SqueezeLLMParameters",
    "WeightMatrix",
    "quadratic_error",
    "quantize_weight",
    "quantize_weights",
    "weighted_squared_error",
]
