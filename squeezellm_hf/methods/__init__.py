"""Quantization methods, one folder each, known by name.

A method turns the statistics of one weight matrix into a dense part in some codec and a sparse
part in some layout. Methods never import one another.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from squeezellm_hf.methods import squeezellm


class Method(NamedTuple):
    """A way to quantize one weight matrix.

    Attributes:
        parameters: frozen dataclass of the method's settings for one matrix.
        quantize_weight: ``(weight, fisher, parameters, *, hessian, name) -> tensors of the
            checkpoint``.
    """

    parameters: type
    quantize_weight: Callable[..., dict[str, Tensor]]


METHODS: dict[str, Method] = {
    "squeezellm": Method(squeezellm.SqueezeLLMParameters, squeezellm.quantize_weight),
}


def get_method(name: str) -> Method:
    """The method called ``name``.

    Raises:
        ValueError: if there is none.
    """
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(f"method must be one of {sorted(METHODS)}, got {name!r}")
    return METHODS[name]
