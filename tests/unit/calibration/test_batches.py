"""Calibration data that is no text: arguments of the model's forward."""

import pytest
import torch

from squeezellm_hf.calibration.batches import check_batches, digest, is_batches
from squeezellm_hf.calibration.datasets import describe


def test_what_counts_as_batches() -> None:
    assert is_batches([{"input_ids": torch.ones(1, 2)}])
    assert not any(map(is_batches, ([], None, "builtin", ["text"], [[1, 2]], torch.ones(2, 2))))


def test_batches_come_back_as_they_are_but_detached() -> None:
    given = [{"x": torch.ones(1, 2, requires_grad=True), "flag": True, "name": "a", "none": None}]
    (checked,) = check_batches(given)
    assert checked["x"].equal(given[0]["x"])
    assert not checked["x"].requires_grad
    assert [checked[key] for key in ("flag", "name", "none")] == [True, "a", None]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ("text", r"dataset\[1\] is str, not a mapping"),
        ({1: torch.ones(2)}, r"dataset\[1\] has the key 1"),
        ({"x": [1, 2]}, r"dataset\[1\]\['x'\] is list; allowed are tensors"),
        ({"x": torch.tensor([1.0, float("nan")])}, r"dataset\[1\]\['x'\] holds NaN"),
        ({"x": 3}, r"dataset\[1\] holds no tensor"),
    ],
)
def test_wrong_batches_are_named(batch: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_batches([{"x": torch.ones(2)}, batch])


def test_the_record_tells_data_apart_without_giving_it_away() -> None:
    first = [{"x": torch.ones(1, 2, dtype=torch.bfloat16), "y": torch.tensor(3)}]
    others = [
        [{"x": torch.ones(1, 2), "y": torch.tensor(3)}],
        [{"x": torch.ones(2, 1, dtype=torch.bfloat16), "y": torch.tensor(3)}],
        [{"z": torch.ones(1, 2, dtype=torch.bfloat16), "y": torch.tensor(3)}],
        [{"x": torch.ones(1, 2, dtype=torch.bfloat16), "y": torch.tensor(4)}],
        [{"x": torch.ones(1, 2, dtype=torch.bfloat16), "y": 3}],
        first * 2,
    ]
    described = {describe(data) for data in (first, *others)}
    assert len(described) == 7
    assert describe(first).startswith("1 batches sha256:")
    assert describe([dict(first[0])]) == describe(first)
    assert digest([torch.ones(2)]) != digest([torch.ones(3)])
