"""SqueezeLLM of one weight matrix: decompose, cluster each row, pack."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from squeezellm_hf.calibration.hessian import channel_groups
from squeezellm_hf.formats.csr import csr_from_dense
from squeezellm_hf.formats.packing import pack, packed_words
from squeezellm_hf.methods.squeezellm.chunks import for_each_chunk
from squeezellm_hf.methods.squeezellm.codebook import nearest_entry, table_dtype
from squeezellm_hf.methods.squeezellm.config import SqueezeLLMParameters
from squeezellm_hf.methods.squeezellm.decompose import sparse_mask
from squeezellm_hf.methods.squeezellm.kmeans import weighted_kmeans
from squeezellm_hf.methods.squeezellm.lnq import RowGroup, refine
from squeezellm_hf.methods.squeezellm.sparse import exact_residuals

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# What a kept cell without Fisher information counts, relative to the mean of its row: nothing
# beside any other, but entries that are left over go to these cells.
_LEAST_WEIGHT = 1e-8

# Differences of weights must be finite in bf16 and squares of them in fp64.
_LARGEST_WEIGHT = 2.0**126
_LARGEST_FISHER = torch.finfo(torch.float32).max


class WeightMatrix(NamedTuple):
    """One weight matrix to quantize, and what is known of it.

    Attributes:
        weight: [out_features, in_features], fp32, bf16 or fp16, finite.
        fisher: [out_features, in_features], any floating dtype, finite and >= 0: the diagonal of
            the empirical Fisher information. None: every cell counts the same and there are no
            sensitive values. A row without any counts as a row of ones.
        parameters: bits, fractions and solvers.
        hessian: [groups, in_features, in_features], any floating dtype, symmetric, positive
            semidefinite: of each group of consecutive output channels as
            :func:`~squeezellm_hf.calibration.hessian.channel_groups` cuts them. Only for the
            codebooks "lnq" and "guided".
        name: what errors call the weight, for instance "model.layers.0.mlp.up_proj".
    """

    weight: Tensor
    fisher: Tensor | None
    parameters: SqueezeLLMParameters
    hessian: Tensor | None = None
    name: str = "weight"


def quantize_weight(
    weight: Tensor,
    fisher: Tensor | None,
    parameters: SqueezeLLMParameters,
    *,
    hessian: Tensor | None = None,
    name: str = "weight",
) -> dict[str, Tensor]:
    """Quantize one weight matrix: :func:`quantize_weights` of one :class:`WeightMatrix`."""
    return quantize_weights([WeightMatrix(weight, fisher, parameters, hessian, name)])[0]


@torch.no_grad()
def quantize_weights(matrices: Sequence[WeightMatrix]) -> list[dict[str, Tensor]]:
    """Quantize weight matrices to indices, lookup tables and a sparse part.

    Per row (section 4 of arXiv 2306.07629), with the removed cells S:

        minimise  sum_{i not in S} F_i (w_i - table[index_i])^2
        value_i = w_i - table[index_i]                               for i in S

    The table is rounded to its 16-bit dtype first and each weight assigned to the nearest rounded
    entry. With a codebook other than "kmeans" this is the start of a search for a smaller

        d H d^T,   d_i = table[index_i] - w_i for i not in S, and 0 for i in S

    which works on all matrices of one shape together (:mod:`.lnq`): give it many.

    Deterministic: the same input gives the same bytes.

    Memory beyond the arguments and the results: about 5 bytes per cell of a matrix, and a working
    set that does not grow with them, on a CPU about 200 MB. (A row is never split.)

    Args:
        matrices: any shapes and devices.

    Returns:
        For each matrix ``qweight`` int32 [out_features, ceil(in_features * bits / 32)] and
        ``lookup_table`` [out_features, 2**bits], ascending, fp16 or bf16 (see
        :func:`~squeezellm_hf.methods.squeezellm.codebook.table_dtype`); if any cell is kept sparse
        also ``crow_indices``, ``col_indices`` and ``values`` (the table's dtype) as in
        :class:`~squeezellm_hf.formats.csr.CSR`. All on the device of ``weight``.

    Raises:
        ValueError: for a weight, Fisher matrix or Hessian of the wrong shape or dtype, with NaN
            or infinite entries, for a negative Fisher entry, or a Hessian that is missing.
    """
    for matrix in matrices:
        check_arguments(matrix.weight, matrix.fisher, matrix.name)
        check_hessian(matrix)
    codes = [_kmeans(matrix) for matrix in matrices]
    problems: dict[tuple[int, int], list[RowGroup]] = {}
    for matrix, code in zip(matrices, codes, strict=True):
        if matrix.hessian is not None and matrix.parameters.hessian_groups is not None:
            effort = (matrix.parameters.lnq_rounds, matrix.parameters.lnq_sweeps)
            problems.setdefault(effort, []).extend(_row_groups(matrix, matrix.hessian, code))
    for (rounds, sweeps), groups in problems.items():
        refine(groups, rounds, sweeps)
    return [_encode(matrix, code) for matrix, code in zip(matrices, codes, strict=True)]


class _Code(NamedTuple):
    """Removed cells, bool [R, n]; table, 16 bits [R, k], ascending; indices, uint8 [R, n]."""

    removed: Tensor
    table: Tensor
    indices: Tensor


def _kmeans(matrix: WeightMatrix) -> _Code:
    weight, fisher, parameters, *_ = matrix
    removed = sparse_mask(weight, fisher, parameters)
    dtype = table_dtype(weight)
    tables = torch.empty(weight.shape[0], 2**parameters.bits, dtype=dtype, device=weight.device)
    indices = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)

    @torch.no_grad()  # holds for one thread
    def cluster(rows: slice) -> None:
        part = weight[rows].float()
        values, weights = kmeans_input(
            part, None if fisher is None else fisher[rows].float(), removed[rows]
        )
        centroids = weighted_kmeans(values, weights, 2**parameters.bits, parameters.solver)
        tables[rows] = centroids.to(dtype)
        indices[rows] = nearest_entry(part, tables[rows])

    for_each_chunk(weight, parameters.bits, cluster)
    return _Code(removed, tables, indices)


def _row_groups(matrix: WeightMatrix, hessian: Tensor, code: _Code) -> list[RowGroup]:
    groups = channel_groups(matrix.weight.shape[0], hessian.shape[0])
    return [
        RowGroup(
            hessian[g].float(),
            matrix.weight[rows].detach(),
            code.removed[rows],
            code.table[rows],
            code.indices[rows],
        )
        for g, rows in enumerate(groups)
    ]


def _encode(matrix: WeightMatrix, code: _Code) -> dict[str, Tensor]:
    weight, bits = matrix.weight, matrix.parameters.bits
    removed, table, indices = code
    words = packed_words(weight.shape[1], bits)
    qweight = torch.empty(weight.shape[0], words, dtype=torch.int32, device=weight.device)
    residuals = torch.zeros(weight.shape, dtype=table.dtype, device=weight.device)

    @torch.no_grad()  # holds for one thread
    def encode(rows: slice) -> None:
        sparse = removed[rows]
        row = sparse.nonzero()[:, 0]
        indices[rows][sparse], residuals[rows][sparse] = exact_residuals(
            weight[rows].float()[sparse], table[rows][row], table.dtype
        )
        qweight[rows] = pack(indices[rows], bits)

    for_each_chunk(weight, bits, encode)
    tensors = {"qweight": qweight, "lookup_table": table}
    if bool(removed.any()):
        tensors |= csr_from_dense(removed, residuals)._asdict()
    return tensors


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


def check_hessian(matrix: WeightMatrix) -> None:
    """Raise ValueError unless the Hessian is there, if it is needed, and fits the weight."""
    groups = matrix.parameters.hessian_groups
    if groups is None:
        return
    hessian, (out_features, in_features) = matrix.hessian, matrix.weight.shape
    if hessian is None:
        raise ValueError(
            f"codebook={matrix.parameters.codebook!r} needs the Hessian of {matrix.name}, "
            "got None; calibrate, or choose codebook='kmeans'"
        )
    count = len(channel_groups(out_features, max(1, groups)))
    expected = [count, in_features, in_features]
    if list(hessian.shape) != expected or not hessian.is_floating_point():
        raise ValueError(
            f"hessian of {matrix.name} must be a floating-point tensor {expected}, "
            f"got {hessian.dtype} {list(hessian.shape)}"
        )
    low, high = (float(bound) for bound in hessian.aminmax())
    least = float(hessian.diagonal(dim1=1, dim2=2).min())
    if not (-_LARGEST_FISHER <= low <= high <= _LARGEST_FISHER and least >= 0):
        raise ValueError(
            f"hessian of {matrix.name} must be finite in fp32 and not negative on its diagonal, "
            f"got entries from {low} to {high}, on the diagonal from {least}"
        )


def _first(matrix: Tensor, bad: Tensor) -> str:
    row, column = bad.nonzero()[0].tolist()
    return f"{float(matrix[row, column])} in row {row}, column {column}"
