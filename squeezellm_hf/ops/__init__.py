"""The two operations on quantized weights, as torch.library ops in the namespace ``squeezellm_hf``.

``schema`` declares them with their fake kernels, ``reference`` implements them in PyTorch for
every device, ``autograd`` gives their derivatives, ``native`` loads the compiled kernels, which
torch's dispatcher then prefers on their device.
"""

from squeezellm_hf.ops import autograd, native, reference, schema
from squeezellm_hf.ops.functional import (
    lut_dequantize,
    lut_dequantize_reference,
    lut_linear,
    lut_linear_reference,
)

native.load()

# The modules are named so that their import, which registers the ops, is not taken for unused.
__all__ = [
    "autograd",
    "lut_dequantize",
    "lut_dequantize_reference",
    "lut_linear",
    "lut_linear_reference",
    "native",
    "reference",
    "schema",
]
