"""What quantizing a matrix in several ways would cost the loss, by its Fisher information."""

from collections.abc import Sequence

import torch
from torch import Tensor

from squeezellm_hf.methods.squeezellm.chunks import for_each_chunk
from squeezellm_hf.methods.squeezellm.codebook import nearest_entry, table_dtype
from squeezellm_hf.methods.squeezellm.config import SqueezeLLMParameters
from squeezellm_hf.methods.squeezellm.decompose import sparse_mask
from squeezellm_hf.methods.squeezellm.kmeans import weighted_kmeans
from squeezellm_hf.methods.squeezellm.quantize import check_arguments, kmeans_input

# Larger matrices are judged by some of their rows: an error need only be known to some percent.
_MOST_CELLS = 1 << 18


@torch.no_grad()
def fisher_errors(
    weight: Tensor,
    fisher: Tensor | None,
    candidates: Sequence[SqueezeLLMParameters],
    *,
    name: str = "weight",
    most_cells: int = _MOST_CELLS,
) -> list[float]:
    """The objective of SqueezeLLM's k-means, sum_i F_i (w_i - w'_i)^2, for several parameters.

    The cells to be kept sparse are chosen in the whole matrix; tables are made for at most
    ``most_cells`` of it, for rows at equal distances. With e_r the error of row r and
    p_r = sum_i F_i w_i^2 over its other cells, the total is then estimated as
    sum_sampled(e) * sum(p) / sum_sampled(p).

    Args:
        weight: [out_features, in_features], fp32, bf16 or fp16, finite.
        fisher: [out_features, in_features], >= 0, or None: all ones.
        candidates: bits and fractions to judge; their tables are those of k-means.
        name: what errors call the weight.
        most_cells: cells for which tables are made, at least one row.

    Returns:
        An error for each candidate.

    Raises:
        ValueError: as :func:`~squeezellm_hf.methods.squeezellm.quantize.quantize_weights`.
    """
    check_arguments(weight, fisher, name)
    step = -(-weight.numel() // max(most_cells, weight.shape[1]))
    sample = slice(None, None, step)
    part = weight[sample].float()
    part_fisher = None if fisher is None else fisher[sample].float()
    dtype = table_dtype(weight)
    masks: dict[tuple[float, float], tuple[Tensor, float]] = {}
    found = []
    for parameters in candidates:
        key = parameters.outlier_fraction, parameters.sensitive_fraction
        if key not in masks:
            removed = sparse_mask(weight, fisher, parameters)
            scale = 1.0 if step == 1 else _scale(weight, fisher, removed, step)
            masks[key] = removed[sample], scale
        removed, scale = masks[key]
        error = _error(part, part_fisher, removed, parameters, dtype)
        found.append(scale * error)
    return found


def _error(
    weight: Tensor,
    fisher: Tensor | None,
    removed: Tensor,
    parameters: SqueezeLLMParameters,
    dtype: torch.dtype,
) -> float:
    errors = torch.zeros(weight.shape[0], dtype=torch.float64, device=weight.device)

    @torch.no_grad()  # holds for one thread
    def judge(rows: slice) -> None:
        row_fisher = None if fisher is None else fisher[rows]
        values, weights = kmeans_input(weight[rows], row_fisher, removed[rows])
        table = weighted_kmeans(values, weights, 2**parameters.bits, "lloyd").to(dtype)
        entries = table.float().gather(1, nearest_entry(weight[rows], table).long())
        squares = (entries - weight[rows]).double().square_().masked_fill_(removed[rows], 0.0)
        errors[rows] = (squares if row_fisher is None else squares.mul_(row_fisher)).sum(dim=1)

    for_each_chunk(weight, parameters.bits, judge)
    return float(errors.sum())


def _scale(weight: Tensor, fisher: Tensor | None, removed: Tensor, step: int) -> float:
    """How much more there is to lose in all rows than in every ``step``-th."""
    power = torch.zeros(weight.shape[0], dtype=torch.float64, device=weight.device)

    @torch.no_grad()  # holds for one thread
    def add(rows: slice) -> None:
        squares = weight[rows].double().square_().masked_fill_(removed[rows], 0.0)
        power[rows] = (squares if fisher is None else squares.mul_(fisher[rows])).sum(dim=1)

    for_each_chunk(weight, 1, add)
    sampled = float(power[::step].sum())
    return float(power.sum()) / sampled if sampled > 0 else float(step)
