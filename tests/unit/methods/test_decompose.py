import pytest
import torch

from squeezellm_hf.methods.squeezellm import decompose
from squeezellm_hf.methods.squeezellm.config import SqueezeLLMParameters
from squeezellm_hf.methods.squeezellm.decompose import sparse_mask


def mask_of(weight: list, fisher: list | None, outlier: float, sensitive: float) -> list[bool]:
    parameters = SqueezeLLMParameters(outlier_fraction=outlier, sensitive_fraction=sensitive)
    return sparse_mask(
        torch.tensor([weight]), None if fisher is None else torch.tensor([fisher]), parameters
    )[0].tolist()


def test_sensitive_first_then_outliers_of_the_rest() -> None:
    weight = [9.0, -8.0, 7.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
    fisher = [5.0, 1.0, 1.0, 9.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    # 20 % sensitive: cells 3 and 0; 20 % outliers of the rest: cells 1 and 2.
    assert mask_of(weight, fisher, 0.2, 0.2) == [i in (0, 1, 2, 3) for i in range(10)]


def test_without_fisher_only_outliers() -> None:
    assert mask_of([1.0, -4.0, 2.0, 3.0], None, 0.25, 0.25) == [False, True, False, False]


def test_counts_are_of_the_whole_matrix() -> None:
    weight = torch.ones(4, 100)
    weight[2] = 5.0
    mask = sparse_mask(weight, None, SqueezeLLMParameters(outlier_fraction=0.2))
    assert mask.sum(dim=1).tolist()[2] == 80


@pytest.mark.parametrize(("cells", "expected"), [(9, 1), (5, 1), (4, 0), (25, 3), (24, 2)])
def test_counts_round_half_up(cells: int, expected: int) -> None:
    mask = mask_of([1.0] * cells, None, 0.1, 0.0)
    assert sum(mask) == expected


def test_first_of_equals_is_taken() -> None:
    assert mask_of([1.0, 2.0, 2.0, -2.0], None, 0.49, 0.0) == [False, True, True, False]


def test_nothing_is_worth_keeping_in_zeros() -> None:
    weight, fisher = torch.zeros(10, 10), torch.zeros(10, 10)
    fractions = SqueezeLLMParameters(outlier_fraction=0.1, sensitive_fraction=0.1)
    assert not sparse_mask(weight, fisher, fractions).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    # Rounded, so that there are ties across chunks.
    weight = torch.randn(50, 30, generator=generator).mul(4).round().div(4).to(dtype)
    fisher = torch.randn(50, 30, generator=generator).mul(2).round().exp()
    parameters = SqueezeLLMParameters(outlier_fraction=0.05, sensitive_fraction=0.03)
    whole = sparse_mask(weight, fisher, parameters)
    monkeypatch.setattr(decompose, "_CHUNK", 101)
    assert torch.equal(sparse_mask(weight, fisher, parameters), whole)
    assert int(whole.sum()) == 75 + 45


def test_equals_a_plain_sort() -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(40, 50, generator=generator)
    fisher = torch.rand(40, 50, generator=generator)
    mask = sparse_mask(weight, fisher, SqueezeLLMParameters(4, 0.01, 0.02))
    expected = torch.zeros(2000, dtype=torch.bool)
    expected[fisher.flatten().sort(descending=True).indices[:40]] = True
    magnitude = weight.flatten().abs().masked_fill(expected, -1.0)
    expected[magnitude.sort(descending=True).indices[:20]] = True
    assert torch.equal(mask.flatten(), expected)
