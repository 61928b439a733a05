"""SqueezeLLM of one weight matrix: decompose, cluster each row, pack."""

import torch
from torch import Tensor

from squeezellm_hf.formats.csr import csr_from_dense
from squeezellm_hf.formats.packing import pack, packed_words
from squeezellm_hf.methods.squeezellm.chunks import for_each_chunk
from squeezellm_hf.methods.squeezellm.codebook import nearest_entry, table_dtype
from squeezellm_hf.methods.squeezellm.config import SqueezeLLMParameters
from squeezellm_hf.methods.squeezellm.decompose import sparse_mask
from squeezellm_hf.methods.squeezellm.kmeans import weighted_kmeans
from squeezellm_hf.methods.squeezellm.sparse import exact_residuals

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# What a kept cell without Fisher information counts, relative to the mean of its row: nothing
# beside any other, but entries that are left over go to these cells.
_LEAST_WEIGHT = 1e-8

# Differences of weights must be finite in bf16 and squares of them in fp64.
_LARGEST_WEIGHT = 2.0**126
_LARGEST_FISHER = torch.finfo(torch.float32).max


@torch.no_grad()
def quantize_weight(
    weight: Tensor,
    fisher: Tensor | None,
    parameters: SqueezeLLMParameters,
    *,
    name: str = "weight",
) -> dict[str, Tensor]:
    """Quantize one weight matrix to indices, lookup tables and a sparse part.

    Per row (section 4 of arXiv 2306.07629), with the removed cells S:

        minimise  sum_{i not in S} F_i (w_i - table[index_i])^2
        value_i = w_i - table[index_i]                               for i in S

    The table is rounded to its 16-bit dtype first and each weight assigned to the nearest rounded
    entry. Deterministic: the same input gives the same bytes.

    Memory beyond the arguments and the result: about 4 bytes per cell of the matrix, and a working
    set that does not grow with it, on a CPU about 200 MB. (A row is never split.)

    Args:
        weight: [out_features, in_features], fp32, bf16 or fp16, finite.
        fisher: [out_features, in_features], any floating dtype, finite and >= 0: the diagonal of
            the empirical Fisher information. None: every cell counts the same and there are no
            sensitive values. A row without any counts as a row of ones.
        parameters: bits, fractions and solver.
        name: what errors call the weight, for instance "model.layers.0.mlp.up_proj.weight".

    Returns:
        ``qweight`` int32 [out_features, ceil(in_features * bits / 32)] and ``lookup_table``
        [out_features, 2**bits], ascending, fp16 or bf16 (see
        :func:`~squeezellm_hf.methods.squeezellm.codebook.table_dtype`); if any cell is kept sparse
        also ``crow_indices``, ``col_indices`` and ``values`` (the table's dtype) as in
        :class:`~squeezellm_hf.formats.csr.CSR`. All on the device of ``weight``.

    Raises:
        ValueError: for a weight or Fisher matrix of the wrong shape or dtype, with NaN or infinite
            entries, or a negative Fisher entry.
    """
    check_arguments(weight, fisher, name)
    out_features = weight.shape[0]
    removed = sparse_mask(weight, fisher, parameters)
    dtype = table_dtype(weight)
    device = weight.device
    words = packed_words(weight.shape[1], parameters.bits)
    qweight = torch.empty(out_features, words, dtype=torch.int32, device=device)
    tables = torch.empty(out_features, 2**parameters.bits, dtype=dtype, device=device)
    residuals = torch.zeros(weight.shape, dtype=dtype, device=device)

    @torch.no_grad()  # holds for one thread
    def quantize_rows(rows: slice) -> None:
        tables[rows], indices, residuals[rows] = _quantize_rows(
            weight[rows].float(),
            None if fisher is None else fisher[rows].float(),
            removed[rows],
            parameters,
            dtype,
        )
        qweight[rows] = pack(indices, parameters.bits)

    for_each_chunk(weight, parameters.bits, quantize_rows)
    tensors = {"qweight": qweight, "lookup_table": tables}
    if bool(removed.any()):
        tensors |= csr_from_dense(removed, residuals)._asdict()
    return tensors


def _quantize_rows(
    weight: Tensor,
    fisher: Tensor | None,
    removed: Tensor,
    parameters: SqueezeLLMParameters,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Table [R, k], indices uint8 [R, n] and residuals [R, n] (zero where not removed)."""
    values, weights = kmeans_input(weight, fisher, removed)
    table = weighted_kmeans(values, weights, 2**parameters.bits, parameters.solver).to(dtype)
    indices = nearest_entry(weight, table)
    residuals = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
    row = removed.nonzero()[:, 0]
    indices[removed], residuals[removed] = exact_residuals(weight[removed], table[row], dtype)
    return table, indices, residuals


def kmeans_input(weight: Tensor, fisher: Tensor | None, removed: Tensor) -> tuple[Tensor, Tensor]:
    """Values and weights of the clustering: removed cells have no influence.

    Args:
        weight: fp32 [R, n].
        fisher: fp32 [R, n] or None.
        removed: bool [R, n].

    Returns:
        fp32 [R, n] values, in which removed cells repeat the least kept value of their row (they
        can then not count as a value of their own), and fp32 [R, n] weights relative to the
        greatest of the row, zero at removed cells.
    """
    least = weight.masked_fill(removed, torch.inf).amin(dim=1, keepdim=True)
    least = least.masked_fill(least.isinf(), 0.0)
    values = torch.where(removed, least, weight)
    if fisher is None:
        return values, (~removed).float()
    weights = fisher.masked_fill(removed, 0.0)
    top = weights.amax(dim=1, keepdim=True)
    weights = torch.where(top > 0, weights / top, 1.0)
    floor = _LEAST_WEIGHT * weights.mean(dim=1, keepdim=True)
    return values, torch.maximum(weights, floor).masked_fill_(removed, 0.0)


def check_arguments(weight: Tensor, fisher: Tensor | None, name: str = "weight") -> None:
    """Raise ValueError unless the matrices can be quantized; see :func:`quantize_weight`."""
    if weight.dim() != 2 or weight.numel() == 0 or weight.dtype not in WEIGHT_DTYPES:
        raise ValueError(
            f"{name} must be a non-empty [out_features, in_features] matrix in fp32, bf16 or "
            f"fp16, got {weight.dtype} {list(weight.shape)}"
        )
    low, high = (float(bound) for bound in weight.aminmax())
    if not -_LARGEST_WEIGHT < low <= high < _LARGEST_WEIGHT:
        raise ValueError(
            f"{name} must be finite and below 2**126 in magnitude, "
            f"got {_first(weight, ~(weight.abs() < _LARGEST_WEIGHT))}"
        )
    if fisher is None:
        return
    if fisher.shape != weight.shape or not fisher.is_floating_point():
        raise ValueError(
            f"fisher of {name} must be a floating-point matrix {list(weight.shape)}, "
            f"got {fisher.dtype} {list(fisher.shape)}"
        )
    low, high = (float(bound) for bound in fisher.aminmax())
    if not 0 <= low <= high <= _LARGEST_FISHER:
        raise ValueError(
            f"fisher of {name} must be finite in fp32 and not negative, "
            f"got {_first(fisher, ~((fisher >= 0) & (fisher <= _LARGEST_FISHER)))}"
        )


def _first(matrix: Tensor, bad: Tensor) -> str:
    row, column = bad.nonzero()[0].tolist()
    return f"{float(matrix[row, column])} in row {row}, column {column}"
