"""The parameters of SqueezeLLM for one weight matrix."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

Solver = Literal["lloyd", "exact"]
Codebook = Literal["kmeans", "lnq", "guided"]

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
        codebook: ``"kmeans"``, sensitivity-weighted k-means, the method of the paper; ``"lnq"``,
            which from there minimises the squared change of the layer's outputs; ``"guided"``,
            the same with outputs weighted by squared gradients of the loss (GuidedQuant, arXiv
            2505.07004). The latter two need Hessians.
        guided_groups: groups of output channels with a Hessian of their own, for ``"guided"``.
        lnq_rounds: how often tables and assignment alternate, at least 1.
        lnq_sweeps: sweeps of coordinate descent a round, at least 1.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
    """

    bits: int = 4
    outlier_fraction: float = 0.004
    sensitive_fraction: float = 0.0005
    solver: Solver = "lloyd"
    codebook: Codebook = "kmeans"
    guided_groups: int = 4
    lnq_rounds: int = 2
    lnq_sweeps: int = 4

    def __post_init__(self) -> None:
        bits = self.bits
        if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= MAX_BITS:
            raise ValueError(f"bits must be an integer from 1 to {MAX_BITS}, got {bits!r}")
        for name in ("outlier_fraction", "sensitive_fraction"):
            _check_fraction(name, getattr(self, name))
        if self.solver not in get_args(Solver):
            raise ValueError(f"solver must be one of {get_args(Solver)}, got {self.solver!r}")
        if self.codebook not in get_args(Codebook):
            raise ValueError(f"codebook must be one of {get_args(Codebook)}, got {self.codebook!r}")
        for name in ("guided_groups", "lnq_rounds", "lnq_sweeps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")

    @property
    def hessian_groups(self) -> int | None:
        """Groups of guided Hessians that a layer needs; 0 for a plain one, None for none."""
        return {"kmeans": None, "lnq": 0, "guided": self.guided_groups}[self.codebook]


def _check_fraction(name: str, value: object) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    # NaN fails both comparisons of the range, but a string or None cannot be compared at all.
    if not number or math.isnan(value) or not 0 <= value < MAX_FRACTION:  # type: ignore[arg-type, operator]
        raise ValueError(f"{name} must be a number in [0, {MAX_FRACTION}), got {value!r}")
