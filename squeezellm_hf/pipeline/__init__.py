"""From a model in memory to a quantized one: plan, calibrate, quantize, swap, resume."""

from squeezellm_hf.pipeline.plan import Plan, make_plan
from squeezellm_hf.pipeline.quantize import quantize_modules

__all__ = ["Plan", "make_plan", "quantize_modules"]
