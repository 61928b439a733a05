from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from squeezellm_hf.calibration.datasets import describe, token_batches, token_stream


def codepoints(text: str) -> list[int]:
    return [ord(character) for character in text]


WORDS = [" ".join(f"w{i}-{j}" for j in range(50)) for i in range(20)]


@given(
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=5),
    n_samples=st.integers(1, 12),
    sequence_length=st.integers(1, 20),
    seed=st.integers(0, 2**31),
)
def test_windows_are_disjoint_pieces_of_the_rows(
    lengths: list[int], n_samples: int, sequence_length: int, seed: int
) -> None:
    # Every id occurs once, so a window tells where it was cut.
    ends = torch.tensor(lengths).cumsum(0).tolist()
    rows = [list(range(end - length, end)) for end, length in zip(ends, lengths, strict=True)]
    arguments = {"n_samples": n_samples, "sequence_length": sequence_length, "seed": seed}
    if sum(length // sequence_length for length in lengths) < n_samples:
        with pytest.raises(ValueError, match=f"found {sum(lengths)} tokens|empty"):
            token_batches(rows, **arguments)
        return
    batches = token_batches(rows, **arguments)
    assert batches.shape == (n_samples, sequence_length)
    assert batches.dtype == torch.int64
    assert torch.equal(batches, token_batches(rows, **arguments))
    flat = batches.flatten().tolist()
    assert len(set(flat)) == len(flat), "windows overlap"
    assert flat == sorted(flat), "windows are not in the order of the text"
    for window in batches.tolist():
        assert any(set(window) <= set(row) for row in rows), "a window crosses two rows"


def test_windows_come_from_the_joined_text() -> None:
    joined = "\n\n".join(WORDS)
    batches = token_batches(WORDS, codepoints, n_samples=8, sequence_length=100, seed=3)
    for window in batches.tolist():
        assert "".join(map(chr, window)) in joined


def test_seed_chooses_the_windows() -> None:
    batches = [
        token_batches(WORDS, codepoints, n_samples=4, sequence_length=32, seed=seed)
        for seed in (0, 0, 1)
    ]
    assert torch.equal(batches[0], batches[1])
    assert not torch.equal(batches[0], batches[2])


def test_ids_of_the_right_shape_come_back_as_they_are() -> None:
    ids = torch.randint(0, 100, (5, 7), dtype=torch.int32)
    assert torch.equal(token_batches(ids, n_samples=5, sequence_length=7), ids.long())
    assert torch.equal(token_batches(ids.tolist(), n_samples=5, sequence_length=7), ids.long())


def test_large_data_sets_are_not_read_to_their_end(tmp_path: Path) -> None:
    path = tmp_path / "large.txt"
    path.write_text("\n\n".join(["abcdefgh" * 10] * 10_000))
    read = 0

    def counting(text: str) -> list[int]:
        nonlocal read
        read += len(text)
        return codepoints(text)

    token_batches(path, counting, n_samples=2, sequence_length=16)
    assert 16 * 2 * 16 <= read < 10_000


@pytest.mark.parametrize(
    "tokenizer",
    [
        codepoints,
        lambda text: {"input_ids": codepoints(text)},
        lambda text: SimpleNamespace(input_ids=torch.tensor([codepoints(text)])),
    ],
)
def test_tokenizers(tokenizer: Any) -> None:
    expected = torch.tensor(codepoints("\n\n".join(WORDS)))
    assert torch.equal(token_stream(WORDS, tokenizer), expected)


def test_transformers_tokenizers_do_not_warn_of_the_length() -> None:
    class Tokenizer:
        model_max_length = 8

        def __call__(self, text: str, verbose: bool = True) -> dict[str, list[int]]:
            assert not verbose
            return {"input_ids": codepoints(text)}

    assert token_stream(["abc"], Tokenizer()).tolist() == codepoints("abc")


def test_builtin_splits_differ() -> None:
    streams = [token_stream("builtin", codepoints, split=split) for split in ("train", "test")]
    assert streams[0].numel() > 2 * streams[1].numel() > 100_000


def test_stream_is_the_beginning_of_the_text() -> None:
    whole = token_stream("builtin", codepoints)
    assert torch.equal(token_stream("builtin", codepoints, max_tokens=1000), whole[:1000])


@pytest.mark.parametrize("name", ["n_samples", "sequence_length"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, None])
def test_counts_must_be_positive(name: str, value: Any) -> None:
    arguments = {"n_samples": 1, "sequence_length": 1, name: value}
    with pytest.raises(ValueError, match=f"{name}={value}"):
        token_batches("builtin", codepoints, **arguments)


def test_seed_must_be_an_integer() -> None:
    with pytest.raises(ValueError, match="seed="):
        token_batches(WORDS, codepoints, n_samples=1, sequence_length=1, seed=0.5)  # type: ignore[arg-type]


def test_too_short_says_what_was_found_and_what_is_needed() -> None:
    with pytest.raises(ValueError, match=r"found 10 tokens, which is 2 windows.*3 x 4 = 12"):
        token_batches(["0123456789"], codepoints, n_samples=3, sequence_length=4)


def test_missing_tokenizer() -> None:
    with pytest.raises(ValueError, match="tokenizer=None"):
        token_batches("builtin", n_samples=1, sequence_length=1)


@pytest.mark.parametrize("dataset", [[], ["", " \n"]])
def test_empty_set(dataset: list[str]) -> None:
    with pytest.raises(ValueError, match="is empty"):
        token_batches(dataset, codepoints, n_samples=1, sequence_length=1)


def test_empty_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    with pytest.raises(ValueError, match="is empty"):
        token_batches(tmp_path / "a.txt", codepoints, n_samples=1, sequence_length=1)


def test_ids_outside_the_vocabulary() -> None:
    ids = torch.tensor([[1, 2, 30]])
    assert token_batches(ids, n_samples=1, sequence_length=3, vocab_size=31).shape == (1, 3)
    with pytest.raises(ValueError, match=r"token id 30.*vocabulary of 30"):
        token_batches(ids, n_samples=1, sequence_length=3, vocab_size=30)
    with pytest.raises(ValueError, match="token id -1 is negative"):
        token_batches([[1, -1]], n_samples=1, sequence_length=2)


@pytest.mark.parametrize(
    "ids",
    [
        torch.zeros(2, 3),
        torch.zeros(2, 3, dtype=torch.bool),
        torch.zeros(2, 3, 4, dtype=torch.int64),
        torch.tensor(3),
        [[0.5, 1.5]],
        [["a", "b"]],
        [[1, 2], "text"],
    ],
)
def test_ids_of_wrong_type_or_shape(ids: Any) -> None:
    with pytest.raises(ValueError, match="token ids"):
        token_batches(ids, n_samples=1, sequence_length=1)


def test_tokenizer_that_returns_several_rows() -> None:
    with pytest.raises(ValueError, match="2 rows"):
        token_stream(["abc"], lambda text: [[1], [2]])


def test_describe_never_writes_token_ids_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A million of them, each as text, would take a minute, and a config is described often."""

    def refuse(self: torch.Tensor, **_: object) -> str:
        raise AssertionError("token ids were written out")

    monkeypatch.setattr(torch.Tensor, "__repr__", refuse)
    monkeypatch.setattr(torch.Tensor, "__format__", refuse)
    assert "1 token ids sha256:" in str(describe(torch.arange(1000)))
    assert "3 token ids sha256:" in str(describe(torch.arange(30).view(3, 10)))


def test_describe_names_but_does_not_tell(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("secret")
    assert describe(None) is None
    assert describe("builtin") == "builtin"
    assert describe("org/set:en") == "org/set:en"
    of_file = describe(path)
    assert of_file is not None
    assert of_file.startswith("notes.txt sha256:")
    assert str(tmp_path) not in of_file
    of_texts = describe(["secret", "text"])
    assert of_texts is not None
    assert of_texts.startswith("2 texts sha256:")
    assert "secret" not in of_texts
    assert of_texts != describe(["secre", "ttext"])
    ids = torch.tensor([[1, 2], [3, 4]])
    assert describe(ids) == describe(ids.tolist()) != describe(ids.T)
