"""Quantized weights made with numpy alone: packing, unpacking and products in fp64."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Half the distance between neighbours of 1, and the same at the bottom of the range.
ROUNDING = {
    torch.float32: (2.0**-24, 0.0),
    torch.bfloat16: (2.0**-8, 0.0),
    torch.float16: (2.0**-11, 2.0**-25),
}


def pack_row(indices: NDArray[np.uint8], bits: int) -> NDArray[np.int32]:
    """One row of indices as a little-endian bit stream, filled up to whole words."""
    stream = ((indices[:, None] >> np.arange(bits)) & 1).astype(np.uint8).reshape(-1)
    words = -(-stream.size // 32)
    stream = np.pad(stream, (0, words * 32 - stream.size))
    return np.packbits(stream, bitorder="little").view("<i4").astype(np.int32)


@dataclass(frozen=True)
class Weight:
    """Checkpoint tensors, the fp64 matrix that they stand for, and its dense part alone."""

    bits: int
    tensors: dict[str, Tensor]
    matrix: NDArray[np.float64]
    dense: NDArray[np.float64] | None = None

    def rounded(self, dtype: str) -> NDArray[np.float64]:
        """The matrix rounded to ``dtype`` once, from fp32."""
        return _rounded(self.matrix, dtype)

    def dense_rounded(self, dtype: str) -> NDArray[np.float64]:
        """The dense part rounded to ``dtype``, the sparse part exact."""
        assert self.dense is not None
        return _rounded(self.dense, dtype) + (self.matrix - self.dense)


def _rounded(matrix: NDArray[np.float64], dtype: str) -> NDArray[np.float64]:
    fp32 = torch.from_numpy(matrix.astype(np.float32))
    return fp32.to(TORCH_DTYPES[dtype]).double().numpy()


def make_weight(
    out_features: int,
    in_features: int,
    bits: int,
    *,
    density: float = 0.0,
    empty_rows: bool = False,
    full_row: bool = False,
    table_dtype: str = "fp16",
    wide_columns: bool = False,
    seed: int = 0,
) -> Weight:
    """A random weight; ``density`` is the fraction of cells with a sparse value (0: no CSR).

    Every other row may be without any, and the last one may have one in each cell.
    """
    rng = np.random.default_rng(seed)
    indices = rng.integers(0, 2**bits, (out_features, in_features)).astype(np.uint8)
    rows = [pack_row(row, bits) for row in indices]
    words = -(-in_features * bits // 32)
    qweight = np.stack(rows) if out_features else np.zeros((0, words), np.int32)
    table = torch.from_numpy(np.sort(rng.standard_normal((out_features, 2**bits)), axis=1))
    table = table.to(TORCH_DTYPES[table_dtype])
    matrix = np.take_along_axis(table.double().numpy(), indices.astype(np.int64), axis=1)
    dense = matrix.copy()
    tensors = {"qweight": torch.from_numpy(qweight), "lookup_table": table}
    if density > 0:
        mask = rng.random((out_features, in_features)) < density
        if empty_rows:
            mask[::2] = False
        if full_row:
            mask[-1:] = True
        row, column = np.nonzero(mask)
        values = torch.from_numpy(rng.standard_normal(row.size)).to(TORCH_DTYPES[table_dtype])
        matrix[row, column] += values.double().numpy()
        crow = np.concatenate([[0], np.cumsum(mask.sum(axis=1))]).astype(np.int32)
        stored = (
            column.astype(np.int32) if wide_columns else column.astype(np.uint16).view(np.int16)
        )
        tensors |= {
            "crow_indices": torch.from_numpy(crow),
            "col_indices": torch.from_numpy(stored),
            "values": values,
        }
    return Weight(bits, tensors, matrix, dense)


def make_x(batch: int, in_features: int, dtype: str, seed: int = 1) -> Tensor:
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.standard_normal((batch, in_features)))
    return x.to(TORCH_DTYPES[dtype])


class Product:
    """x W^T + bias in fp64, and how far from it a result may be."""

    def __init__(
        self,
        x: Tensor,
        matrix: NDArray[np.float64],
        bias: NDArray[np.float64] | float = 0.0,
    ) -> None:
        x64 = x.double().numpy()
        self._dtype = x.dtype
        self._expected = x64 @ matrix.T + bias
        scale = np.abs(x64) @ np.abs(matrix).T + np.abs(bias)
        relative, absolute = ROUNDING[x.dtype]
        # 1e-6: where dense and sparse values cancel, fp32 keeps what is left of their sum only.
        self._limit = 1e-5 * scale + 1e-6 + 1.01 * relative * np.abs(self._expected) + absolute

    def check(self, y: Tensor) -> None:
        """y holds the first rows within 1e-5 of the sum of absolute products, and its rounding."""
        rows = slice(0, y.shape[0])
        assert y.dtype == self._dtype
        assert y.shape[1:] == self._expected.shape[1:]
        error = np.abs(y.double().numpy() - self._expected[rows]) / self._limit[rows]
        assert (error <= 1).all(), f"worst error is {error.max():.2f} of the limit"


def assert_linear(
    y: Tensor,
    x: Tensor,
    matrix: NDArray[np.float64],
    bias: NDArray[np.float64] | float = 0.0,
) -> None:
    assert y.shape[0] == x.shape[0]
    Product(x, matrix, bias).check(y)
