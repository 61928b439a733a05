"""Which weights leave the dense matrix: SqueezeLLM's sensitive values and outliers."""

from collections.abc import Callable

import torch
from torch import Tensor

from squeezellm_hf.methods.squeezellm.config import SqueezeLLMParameters

# Elements looked at together: bounds the memory of a selection in a large matrix.
_CHUNK = 1 << 21


def sparse_mask(weight: Tensor, fisher: Tensor | None, parameters: SqueezeLLMParameters) -> Tensor:
    """Choose the cells that are stored in the sparse part (section 4.2 of arXiv 2306.07629).

    First the ``sensitive_fraction`` of the matrix with the most Fisher information; of the rest,
    the ``outlier_fraction`` of the matrix with the greatest magnitude. A count is
    ``floor(fraction * weight.numel() + 0.5)``. Among equals the first in row-major order is
    taken. Cells without Fisher information are never sensitive, zeros never outliers, so that
    there can be fewer.

    Args:
        weight: [out_features, in_features].
        fisher: [out_features, in_features], >= 0, or None: no sensitive values.
        parameters: the two fractions.

    Returns:
        bool [out_features, in_features], True where a cell is kept sparse.
    """
    mask = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
    cells = weight.numel()
    if fisher is not None:
        flat_fisher = fisher.reshape(-1)
        count, _ = sparse_counts(cells, parameters)
        _mark_largest(lambda start, stop: flat_fisher[start:stop].float(), count, mask)
    flat_weight = weight.reshape(-1)
    _, count = sparse_counts(cells, parameters)
    sensitive = mask.clone()
    _mark_largest(
        lambda start, stop: (
            flat_weight[start:stop].float().abs().masked_fill_(sensitive[start:stop], 0.0)
        ),
        count,
        mask,
    )
    return mask.view(weight.shape)


def sparse_counts(cells: int, parameters: SqueezeLLMParameters) -> tuple[int, int]:
    """How many sensitive values and how many outliers a matrix of so many cells may have."""
    fractions = parameters.sensitive_fraction, parameters.outlier_fraction
    sensitive, outliers = (int(fraction * cells + 0.5) for fraction in fractions)
    return sensitive, outliers


def _mark_largest(score: Callable[[int, int], Tensor], count: int, mask: Tensor) -> None:
    """Set ``mask`` (bool [n]) at the ``count`` largest positive scores, first come first.

    ``score(start, stop)`` gives fp32 scores >= 0 of the elements from start to stop.
    """
    if count == 0:
        return
    starts = range(0, mask.numel(), _CHUNK)
    largest = torch.zeros(0, dtype=torch.float32, device=mask.device)
    for start in starts:
        chunk = score(start, start + _CHUNK)
        # What is not above the least of `count` greater ones cannot move the threshold.
        floor = largest.min() if largest.numel() == count else largest.new_zeros(())
        chunk = torch.cat([largest, chunk[chunk > floor]])
        largest = chunk.topk(min(count, chunk.numel()), sorted=False).values
    if largest.numel() == 0:
        return
    threshold = largest.min()
    ties_wanted = int((largest == threshold).sum())
    for start in starts:
        chunk = score(start, start + _CHUNK)
        mask[start : start + _CHUNK] |= chunk > threshold
        if ties_wanted:
            ties = torch.nonzero(chunk == threshold)[:ties_wanted, 0]
            mask[start + ties] = True
            ties_wanted -= ties.numel()
