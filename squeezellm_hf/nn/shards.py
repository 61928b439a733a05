"""Parts of a layer for tensor parallelism: some of its rows, or some of its input columns.

Megatron-LM (Shoeybi et al., 2019), section 3: a column-parallel layer holds some of the output
features, its input is the same everywhere; a row-parallel layer holds some of the input features,
and its output is a sum over all of them.
"""

from collections.abc import Mapping

from torch import Tensor

from squeezellm_hf.formats import csr, packing
from squeezellm_hf.nn.linear import SPARSE


def chunk(size: int, parts: int, index: int) -> tuple[int, int]:
    """Where part ``index`` of ``size`` features starts and stops, as ``torch.chunk`` cuts them.

    Raises:
        ValueError: if the part would be empty.
    """
    length = -(-size // parts)
    start, stop = index * length, min(size, (index + 1) * length)
    if start >= stop:
        raise ValueError(f"{size} features cannot be cut into {parts} parts of {length}")
    return start, stop


def columns_start_on_words(in_features: int, bits: int, parts: int) -> bool:
    """Whether cutting the words of ``qweight`` cuts the features as :func:`chunk` does."""
    length = -(-in_features // parts)
    words = packing.packed_words(in_features, bits)
    return length * bits % packing.WORD_BITS == 0 and length * bits // packing.WORD_BITS == -(
        -words // parts
    )


def take_rows(tensors: Mapping[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    """Output features ``start`` to ``stop`` (exclusive) of a layer's tensors, copied.

    Args:
        tensors: by name, as in :class:`~squeezellm_hf.nn.SqueezeLLMLinear`, without those that
            are None; or some of them, the sparse ones all together.
        start: first output feature.
        stop: output feature behind the last one.
    """
    taken = {name: t[start:stop].clone() for name, t in tensors.items() if name not in SPARSE}
    if "values" in tensors:
        taken |= csr.take_rows(_sparse(tensors), start, stop)._asdict()
    return taken


def take_columns(
    tensors: Mapping[str, Tensor], start: int, stop: int, *, bits: int
) -> dict[str, Tensor]:
    """Input features ``start`` to ``stop`` (exclusive) of a layer's tensors, copied.

    The table belongs to all of a row and stays whole; so does the bias, which only one of the
    parts may add.

    Args: as for :func:`take_rows`; ``bits`` is the width of an index.
    """
    taken = {name: t for name, t in tensors.items() if name not in (*SPARSE, "qweight")}
    if "qweight" in tensors:
        taken["qweight"] = packing.take_columns(tensors["qweight"], bits, start, stop)
    if "values" in tensors:
        taken |= csr.take_columns(_sparse(tensors), start, stop)._asdict()
    return taken


def _sparse(tensors: Mapping[str, Tensor]) -> csr.CSR:
    return csr.CSR(*(tensors[name] for name in SPARSE))
