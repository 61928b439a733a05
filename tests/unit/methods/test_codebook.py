import pytest
import torch

from squeezellm_hf.methods.squeezellm.codebook import nearest_entry, table_dtype


@pytest.mark.parametrize(
    ("largest", "dtype"),
    [
        (0.0, torch.float16),
        (1.0, torch.float16),
        (32752.0, torch.float16),
        (32768.0, torch.bfloat16),
        (1e30, torch.bfloat16),
        (2.0**-14, torch.float16),
        (2.0**-15, torch.bfloat16),
        (1e-30, torch.bfloat16),
    ],
)
def test_table_dtype_follows_the_range(largest: float, dtype: torch.dtype) -> None:
    weight = torch.zeros(3, 4)
    weight[1, 2] = -largest
    assert table_dtype(weight) == dtype


def test_ties_go_to_the_lower_entry() -> None:
    table = torch.tensor([[-1.0, 1.0, 3.0, 3.0]])
    values = torch.tensor([[-5.0, 0.0, 0.1, 2.0, 2.5, 3.0]])
    assert nearest_entry(values, table).tolist() == [[0, 0, 1, 1, 2, 2]]


def test_midpoints_do_not_overflow() -> None:
    table = torch.tensor([[2.5e38, 3.0e38]])
    values = torch.tensor([[2.6e38, 2.9e38]])
    assert nearest_entry(values, table).tolist() == [[0, 1]]


def test_all_256_entries_are_reached() -> None:
    table = torch.arange(256.0)[None]
    assert nearest_entry(table, table).tolist() == [list(range(256))]
