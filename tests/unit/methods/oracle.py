"""Codebook solvers once more, slowly: numpy, fp64, one row and one coordinate at a time."""

import itertools

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray


def quadratic(hessian: Array, weight: Array, values: Array) -> float:
    """(values - weight) H (values - weight)^T of one row."""
    error = values.astype(np.float64) - weight.astype(np.float64)
    return float(error @ hessian.astype(np.float64) @ error)


def sweep(hessian: Array, weight: Array, kept: Array, table: Array, values: Array) -> Array:
    """One pass over the coordinates of a row; each takes the entry of least objective."""
    values = values.astype(np.float64).copy()
    for i in np.flatnonzero(kept):
        costs = []
        for entry in table:
            values[i] = entry
            costs.append(quadratic(hessian, weight, values))
        values[i] = table[int(np.argmin(costs))]
    return values


def best_table(hessian: Array, weight: Array, kept: Array, indices: Array, size: int) -> Array:
    """The least-squares table of a row, by numpy's lstsq on a square root of H."""
    values, vectors = np.linalg.eigh(hessian.astype(np.float64))
    root = np.sqrt(np.clip(values, 0, None))[:, None] * vectors.T
    one_hot = np.zeros((len(weight), size))
    one_hot[np.flatnonzero(kept), indices[kept]] = 1.0
    return np.linalg.lstsq(root @ one_hot, root @ np.where(kept, weight, 0.0), rcond=None)[0]


def optimum(hessian: Array, weight: Array, kept: Array, size: int) -> float:
    """The least objective of all assignments of a short row, each with its best table."""
    least = np.inf
    for choice in itertools.product(range(size), repeat=len(weight)):
        indices = np.array(choice)
        table = best_table(hessian, weight, kept, indices, size)
        least = min(least, quadratic(hessian, weight, np.where(kept, table[indices], weight)))
    return least


def random_hessian(columns: int, tokens: int, seed: int = 0, spread: float = 1.0) -> Tensor:
    """X^T X of correlated inputs whose scales differ by e^spread, fp32 [columns, columns]."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator).double()
    mixing = torch.eye(columns).double() + 0.5 * mixing / columns**0.5
    scale = (spread * torch.randn(columns, generator=generator)).exp().double()
    rows = torch.randn(tokens, columns, generator=generator).double() @ mixing * scale
    return (rows.T @ rows).float()
