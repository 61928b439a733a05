"""CSR against scipy-free brute force, and every lie that a file can tell."""

import pytest
import torch

from squeezellm_hf.formats import csr


def example() -> tuple[torch.Tensor, torch.Tensor, csr.CSR]:
    torch.manual_seed(0)
    mask = torch.rand(5, 40) < 0.2
    mask[2] = False
    dense = torch.randn(5, 40).half()
    return mask, dense, csr.csr_from_dense(mask, dense)


def check(tensors: csr.CSR) -> None:
    csr.check_csr(*tensors, out_features=5, in_features=40, prefix="layer.")


def test_entries_in_row_major_order() -> None:
    mask, dense, sparse = example()
    check(sparse)
    triples = [(r, c, dense[r, c]) for r in range(5) for c in range(40) if mask[r, c]]
    rows = csr.row_indices(sparse.crow_indices, sparse.values.numel()).tolist()
    columns = csr.decode_columns(sparse.col_indices).tolist()
    assert list(zip(rows, columns, sparse.values.tolist(), strict=True)) == [
        (r, c, float(v)) for r, c, v in triples
    ]


def test_columns_above_int16_survive() -> None:
    columns = torch.tensor([0, 32767, 32768, 65535])
    stored = csr.encode_columns(columns, 65536)
    assert stored.dtype == torch.int16
    assert csr.decode_columns(stored).equal(columns)


def test_long_rows_take_int32() -> None:
    columns = torch.tensor([0, 65536, 70000])
    stored = csr.encode_columns(columns, 70001)
    assert stored.dtype == torch.int32
    assert csr.decode_columns(stored).equal(columns)


def test_a_value_of_zero_is_kept() -> None:
    sparse = csr.csr_from_dense(torch.tensor([[True, False]]), torch.zeros(1, 2).half())
    assert sparse.values.tolist() == [0.0]


def changed(field: str, index: int, value: int) -> csr.CSR:
    _, _, sparse = example()
    tensor = getattr(sparse, field).clone()
    tensor[index] = value
    return sparse._replace(**{field: tensor})


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (changed("crow_indices", 0, 1), "layer.crow_indices must start at 0"),
        (changed("crow_indices", -1, 10_000), "layer.crow_indices must start at 0 and end at nnz"),
        (changed("crow_indices", 2, -5), "layer.crow_indices must never decrease"),
        (changed("crow_indices", 1, 10_000), "layer.crow_indices must never decrease"),
        (changed("col_indices", 0, 40), "layer.col_indices must lie in"),
        (changed("col_indices", 0, -1), "layer.col_indices must lie in"),  # 65535 as uint16
        (changed("col_indices", 1, 0), "layer.col_indices must ascend"),
        (example()[2]._replace(values=torch.zeros(3).half()), "layer.values must be"),
        (example()[2]._replace(values=example()[2].values.int()), "layer.values must be"),
        (
            example()[2]._replace(col_indices=example()[2].col_indices.int()),
            "layer.col_indices must be torch.int16",
        ),
        (
            example()[2]._replace(crow_indices=example()[2].crow_indices[1:]),
            r"layer.crow_indices must be int32 \[6\]",
        ),
        (
            example()[2]._replace(crow_indices=example()[2].crow_indices.long()),
            "layer.crow_indices must be int32",
        ),
    ],
)
def test_lies_are_named(tensors: csr.CSR, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(tensors)


def test_mask_must_fit() -> None:
    with pytest.raises(ValueError, match="mask must be bool"):
        csr.csr_from_dense(torch.ones(2, 3), torch.ones(2, 3))
