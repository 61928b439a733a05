"""The parameters of SqueezeLLM for one weight matrix."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

Solver = Literal["lloyd", "exact"]

MAX_BITS = 8
MAX_FRACTION = 0.5


@dataclass(frozen=True)
class SqueezeLLMParameters:
    """How one weight matrix is quantized (SqueezeLLM, arXiv 2306.07629).

    Attributes:
        bits: width of a table index, 1 to 8; a row's lookup table has ``2**bits`` entries.
        outlier_fraction: part of the matrix, in [0, 0.5), kept sparse for its magnitude
            (0.40 % in section 5 of the paper).
        sensitive_fraction: part of the matrix, in [0, 0.5), kept sparse for its Fisher
            information (0.05 % there). Without Fisher information nothing is kept for it.
        solver: ``"lloyd"``, a near-optimal start and Lloyd's iteration to convergence, or
            ``"exact"``, the optimum by dynamic programming, some twenty times slower.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
    """

    bits: int = 4
    outlier_fraction: float = 0.004
    sensitive_fraction: float = 0.0005
    solver: Solver = "lloyd"

    def __post_init__(self) -> None:
        bits = self.bits
        if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= MAX_BITS:
            raise ValueError(f"bits must be an integer from 1 to {MAX_BITS}, got {bits!r}")
        for name in ("outlier_fraction", "sensitive_fraction"):
            _check_fraction(name, getattr(self, name))
        if self.solver not in get_args(Solver):
            raise ValueError(f"solver must be one of {get_args(Solver)}, got {self.solver!r}")


def _check_fraction(name: str, value: object) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    # NaN fails both comparisons of the range, but a string or None cannot be compared at all.
    if not number or math.isnan(value) or not 0 <= value < MAX_FRACTION:  # type: ignore[arg-type, operator]
        raise ValueError(f"{name} must be a number in [0, {MAX_FRACTION}), got {value!r}")
