"""SqueezeLLM (arXiv 2306.07629): sensitivity-weighted k-means per row, and a sparse part."""

from squeezellm_hf.methods.squeezellm.config import SqueezeLLMParameters
from squeezellm_hf.methods.squeezellm.objective import weighted_squared_error
from squeezellm_hf.methods.squeezellm.quantize import quantize_weight

__all__ = ["SqueezeLLMParameters", "quantize_weight", "weighted_squared_error"]
