import torch

from squeezellm_hf.methods.squeezellm.sparse import exact_residuals


def test_a_farther_entry_is_taken_if_the_nearest_loses_bits() -> None:
    # fp16 numbers all: an odd multiple of 2^-16, less 2^-4 not representable in fp16, less a
    # negative odd multiple of 2^-16 exactly 3 * 2^-6.
    weight = 2.0**-6 + 2.0**-16
    table = torch.tensor([[-(2.0**-5) + 2.0**-16, 2.0**-4]], dtype=torch.float16)
    assert abs(weight - float(table[0, 1])) < abs(weight - float(table[0, 0]))
    index, value = exact_residuals(torch.tensor([weight]), table, torch.float16)
    assert index.tolist() == [0]
    assert value.dtype == torch.float16
    assert float(value) == 3 * 2.0**-6


def test_of_equal_errors_the_nearest_entry_is_taken() -> None:
    table = torch.tensor([[-2.0, 1.0, 4.0, 4.0]], dtype=torch.float16)
    index, value = exact_residuals(torch.tensor([3.0]), table, torch.float16)
    assert (index.tolist(), value.tolist()) == ([2], [-1.0])


def test_overflowing_residuals_are_not_taken() -> None:
    table = torch.tensor([[-60000.0, 60000.0]], dtype=torch.float16)
    index, value = exact_residuals(
        torch.tensor([50000.0, -50000.0]), table.repeat(2, 1), torch.float16
    )
    assert index.tolist() == [1, 0]
    assert value.isfinite().all()


def test_no_cells() -> None:
    index, value = exact_residuals(torch.zeros(0), torch.zeros(0, 4).half(), torch.float16)
    assert index.shape == value.shape == (0,)
