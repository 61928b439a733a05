"""SqueezeLLM (arXiv 2306.07629): sensitivity-weighted k-means per row, and a sparse part."""

from squeezellm_hf.methods.squeezellm.config import SqueezeLLMParameters
from squeezellm_hf.methods.squeezellm.objective import quadratic_error, weighted_squared_error
from squeezellm_hf.methods.squeezellm.quantize import (
    WeightMatrix,
    quantize_weight,
    quantize_weights,
)
from squeezellm_hf.methods.squeezellm.sensitivity import fisher_errors
from squeezellm_hf.methods.squeezellm.size import stored_bytes

__all__ = [
    "SqueezeLLMParameters",
    "WeightMatrix",
    "fisher_errors",
    "quadratic_error",
    "quantize_weight",
    "quantize_weights",
    "stored_bytes",
    "weighted_squared_error",
]
