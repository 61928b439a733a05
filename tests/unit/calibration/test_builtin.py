import pytest

from squeezellm_hf.calibration.builtin import builtin_texts


def paragraphs(split: str) -> set[str]:
    return {p.strip() for text in builtin_texts(split) for p in text.split("\n\n")}


def test_no_paragraph_is_in_both_splits() -> None:
    assert not paragraphs("train") & paragraphs("test")


def test_splits_are_large_enough_for_calibration_and_evaluation() -> None:
    assert sum(map(len, builtin_texts("train"))) > 200_000
    assert sum(map(len, builtin_texts("test"))) > 60_000


def test_unknown_split_is_named() -> None:
    with pytest.raises(ValueError, match=r"split='validation'.*'train' and 'test'"):
        builtin_texts("validation")
