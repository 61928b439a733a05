"""Bytes that a quantized weight matrix takes in a checkpoint, before it is quantized."""

from squeezellm_hf.formats.csr import column_dtype
from squeezellm_hf.formats.packing import packed_words
from squeezellm_hf.methods.squeezellm.config import SqueezeLLMParameters
from squeezellm_hf.methods.squeezellm.decompose import sparse_counts

_WORD_BYTES = 4
_VALUE_BYTES = 2


def stored_bytes(out_features: int, in_features: int, parameters: SqueezeLLMParameters) -> int:
    """Bytes of indices, tables, sparse values, columns and row pointers.

    What :func:`squeezellm_hf.evaluation.footprint.footprint` counts of the finished layer; that is
    less only where the sparse part finds fewer cells than it may take (zeros, or cells without
    Fisher information).
    """
    nnz = sum(sparse_counts(out_features * in_features, parameters))
    rows = _WORD_BYTES * packed_words(in_features, parameters.bits)
    total = out_features * (rows + _VALUE_BYTES * 2**parameters.bits)
    if nnz:
        total += nnz * (_VALUE_BYTES + column_dtype(in_features).itemsize)
        total += _WORD_BYTES * (out_features + 1)
    return total
