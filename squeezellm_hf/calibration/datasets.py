"""Text -> batches of token ids, for calibration and for measuring perplexity.

A tokenizer is anything that, called with a string, returns `input_ids`: those of transformers
are, and so is a plain function.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from squeezellm_hf.calibration import batches
from squeezellm_hf.calibration.sources import FILE_SUFFIXES, documents

Tokenizer = Callable[..., Any]
Dataset = str | os.PathLike[str] | Iterable[str] | Iterable[Iterable[int]] | Tensor

# Windows are drawn from this many times the tokens asked for, so that seeds differ, and a large
# data set is read only as far as that.
_CANDIDATES = 16
_CHARACTERS_PER_TOKEN = 4


def token_batches(
    dataset: Dataset,
    tokenizer: Tokenizer | None = None,
    *,
    n_samples: int,
    sequence_length: int,
    seed: int = 0,
    split: str = "train",
    text_column: str | None = None,
    config: str | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """Cut `n_samples` windows of `sequence_length` tokens out of a data set, at random.

    The documents are joined by an empty line and tokenized as one text, as is usual for
    calibration and for perplexity; windows do not overlap, and stand in the order of the text.
    Of a large data set only the first 16 x n_samples x sequence_length tokens are candidates.

    Args:
        dataset: See `sources.documents`; or token ids, an integer tensor [n, length] or a list of
            lists of int, whose windows never cross from one row to the next. Ids with exactly
            n_samples rows of sequence_length tokens come back as they are.
        tokenizer: Turns a string into `input_ids`. Not needed for token ids.
        n_samples: Number of windows, >= 1.
        sequence_length: Tokens a window, >= 1.
        seed: Which windows are chosen. The same seed gives the same windows.
        split: Split of a Hub or built-in data set.
        text_column: Column that holds the text.
        config: Configuration of a Hub data set.
        vocab_size: If given, larger token ids are an error.

    Returns:
        Token ids, int64 [n_samples, sequence_length], on the CPU.

    Raises:
        ValueError: An argument is out of range, the data set is unknown, malformed, empty or too
            short (the message tells how many tokens were found and how many are needed), the
            tokenizer is missing, or token ids are not integers in [0, vocab_size).
        ConnectionError: The Hub could not be reached.
    """
    for name, value in (("n_samples", n_samples), ("sequence_length", sequence_length)):
        _check_positive(name, value)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"seed={seed!r} is not an integer")
    rows = _token_rows(
        dataset,
        tokenizer,
        max_tokens=_CANDIDATES * n_samples * sequence_length,
        split=split,
        text_column=text_column,
        config=config,
    )
    for row in rows:
        _check_ids(row, vocab_size)
    return _sample_windows(rows, n_samples, sequence_length, seed)


def token_stream(
    dataset: Dataset,
    tokenizer: Tokenizer | None = None,
    *,
    split: str = "test",
    text_column: str | None = None,
    config: str | None = None,
    max_tokens: int | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """Tokenize a data set as one text, from its beginning.

    Args:
        max_tokens: Stop after so many tokens. Default: the whole data set.
        dataset, tokenizer, split, text_column, config, vocab_size: As in `token_batches`.

    Returns:
        Token ids, int64 [n_tokens], on the CPU.

    Raises:
        ValueError, ConnectionError: As `token_batches`.
    """
    if max_tokens is not None:
        _check_positive("max_tokens", max_tokens)
    rows = _token_rows(
        dataset,
        tokenizer,
        max_tokens=max_tokens,
        split=split,
        text_column=text_column,
        config=config,
    )
    stream = torch.cat(rows)[:max_tokens]
    _check_ids(stream, vocab_size)
    return stream


def describe(dataset: Dataset | None) -> str | None:
    """Name a data set for the record in a checkpoint, without giving away its content or its path.

    Returns:
        The name of a built-in or Hub data set as it is; of a local file its name and a hash of
        its bytes ("notes.txt sha256:..."); of strings, token ids or batches their number and a
        hash. None for None.
    """
    if dataset is None:
        return None
    if isinstance(dataset, (str, os.PathLike)):
        path = Path(dataset)
        if path.is_file():
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            return f"{path.name} sha256:{digest[:16]}"
        is_local = path.suffix in FILE_SUFFIXES or path.is_dir()
        return path.name if is_local else os.fspath(dataset)
    if not isinstance(dataset, (Tensor, list, tuple)):
        return type(dataset).__name__
    if not isinstance(dataset, Tensor) and batches.is_batches(dataset):
        return f"{len(dataset)} batches sha256:{batches.digest(dataset).hex()[:16]}"
    if is_token_ids(dataset):
        kind, parts = "token ids", [row.numpy().tobytes() for row in _id_rows(dataset)]
    else:
        kind, parts = "texts", [str(text).encode() for text in dataset]
    hashed = hashlib.sha256()
    for part in parts:
        hashed.update(len(part).to_bytes(8, "little") + part)
    return f"{len(parts)} {kind} sha256:{hashed.hexdigest()[:16]}"


def _check_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r} is not an integer >= 1")


def is_token_ids(dataset: Any) -> bool:
    if isinstance(dataset, Tensor):
        return True
    first = dataset[0] if isinstance(dataset, (list, tuple)) and dataset else None
    return isinstance(first, (list, tuple, int, Tensor))


def _token_rows(
    dataset: Any,
    tokenizer: Tokenizer | None,
    *,
    max_tokens: int | None,
    split: str,
    text_column: str | None,
    config: str | None,
) -> list[Tensor]:
    """Read at least `max_tokens` tokens, or all there are, as int64 rows of 1 dimension."""
    if is_token_ids(dataset):
        return _id_rows(dataset)
    texts = documents(dataset, split=split, text_column=text_column, config=config)
    if tokenizer is None:
        raise ValueError("tokenizer=None: a tokenizer is needed, unless dataset holds token ids")
    rows: list[Tensor] = []
    n_tokens = 0
    for text in _joined(texts, None if max_tokens is None else max_tokens * _CHARACTERS_PER_TOKEN):
        rows.append(_tokenize(tokenizer, text))
        n_tokens += rows[-1].numel()
        if max_tokens is not None and n_tokens >= max_tokens:
            break
    if n_tokens == 0:
        raise ValueError(f"dataset={describe(dataset)!r} is empty: it holds no text")
    # One row: where the text was tokenized piece by piece, windows may still cross the seams.
    return [torch.cat(rows)]


def _joined(texts: Iterator[str], n_characters: int | None) -> Iterator[str]:
    """Join documents by empty lines into pieces of at least `n_characters`; None: into one."""
    for first in texts:
        piece = [first]
        length = len(first)
        for text in () if n_characters is not None and length >= n_characters else texts:
            piece.append(text)
            length += len(text) + 2
            if n_characters is not None and length >= n_characters:
                break
        yield "\n\n".join(piece)


def _tokenize(tokenizer: Tokenizer, text: str) -> Tensor:
    # Transformers' tokenizers warn of a text longer than the model's context. It is cut later.
    is_transformers = hasattr(tokenizer, "model_max_length")
    encoded = tokenizer(text, verbose=False) if is_transformers else tokenizer(text)
    if hasattr(encoded, "input_ids"):
        encoded = encoded.input_ids
    elif hasattr(encoded, "keys") and "input_ids" in encoded:
        encoded = encoded["input_ids"]
    rows = _id_rows(encoded) if len(encoded) else []
    if len(rows) > 1:
        raise ValueError(f"tokenizer returned {len(rows)} rows of input_ids for one text, not 1")
    return rows[0] if rows else torch.empty(0, dtype=torch.int64)


def _id_rows(ids: Any) -> list[Tensor]:
    """Token ids -> int64 rows: of a tensor [n, length] or [length], a list of int, of lists."""
    if isinstance(ids, Tensor):
        rows = [ids]
    else:
        rows = [_as_tensor(row) for row in ([ids] if isinstance(ids[0], int) else ids)]
    for row in rows:
        if row.dtype.is_floating_point or row.dtype.is_complex or row.dtype == torch.bool:
            raise ValueError(f"token ids are {row.dtype}; allowed are integer dtypes")
        if row.dim() not in (1, 2):
            raise ValueError(f"token ids have the shape {list(row.shape)}; allowed is [n, length]")
    matrices = [row.unsqueeze(0) if row.dim() == 1 else row for row in rows]
    return [row for matrix in matrices for row in matrix.detach().to("cpu", torch.int64).unbind()]


def _as_tensor(row: Any) -> Tensor:
    try:
        tensor = torch.as_tensor(row)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"token ids are not a list of lists of int: {error}") from error
    return tensor.to(torch.int64) if tensor.numel() == 0 else tensor


def _check_ids(ids: Tensor, vocab_size: int | None) -> None:
    if not ids.numel():
        return
    lowest, highest = int(ids.min()), int(ids.max())
    if lowest < 0:
        raise ValueError(f"token id {lowest} is negative")
    if vocab_size is not None and highest >= vocab_size:
        raise ValueError(
            f"token id {highest} is outside the model's vocabulary of {vocab_size}: tokenizer and "
            "model do not belong together"
        )


def _sample_windows(rows: list[Tensor], n_samples: int, sequence_length: int, seed: int) -> Tensor:
    """Choose windows that do not overlap: a random offset a row, then random blocks."""
    generator = torch.Generator().manual_seed(seed)
    windows: list[Tensor] = []
    for row in rows:
        n_blocks, slack = divmod(row.numel(), sequence_length)
        if n_blocks:
            offset = int(torch.randint(slack + 1, (1,), generator=generator))
            blocks = row[offset : offset + n_blocks * sequence_length]
            windows.extend(blocks.view(n_blocks, sequence_length).unbind())
    if len(windows) < n_samples:
        found = sum(row.numel() for row in rows)
        raise ValueError(
            f"the data set is too short: found {found} tokens, which is {len(windows)} windows of "
            f"{sequence_length}; {n_samples} x {sequence_length} = {n_samples * sequence_length} "
            "tokens are needed. Lower n_samples or sequence_length, or give more text"
        )
    chosen = torch.randperm(len(windows), generator=generator)[:n_samples].sort().values
    return torch.stack([windows[index] for index in chosen.tolist()])
