"""Where calibration text comes from: a built-in set, the Hub, a local file, a list of strings."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from squeezellm_hf.calibration.builtin import builtin_texts

FILE_SUFFIXES = (".txt", ".jsonl", ".parquet")

# One shard of C4 is more text than any calibration reads, and the whole set is 300 GB.
_SHORTCUTS: dict[str, dict[str, Any]] = {
    "wikitext2": {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1"},
    "c4": {
        "path": "allenai/c4",
        "data_files": {
            "train": "en/c4-train.00000-of-01024.json.gz",
            "validation": "en/c4-validation.00000-of-00008.json.gz",
        },
    },
}
_SPLIT_OF_SHORTCUT = {("c4", "test"): "validation"}
_HUB_ID = re.compile(r"(?P<id>[\w.-]+(/[\w.-]+)?)(:(?P<config>[\w.-]+))?", re.ASCII)


def documents(
    dataset: str | os.PathLike[str] | Iterable[str],
    *,
    split: str = "train",
    text_column: str | None = None,
    config: str | None = None,
) -> Iterator[str]:
    """Iterate over the documents of a data set, in its own order, empty ones left out.

    Args:
        dataset: "builtin" (Python's help texts, no network), "wikitext2" or "c4", a Hub data set
            as "id" or "id:config", a folder that `datasets.load_dataset` reads, a local .txt
            (its documents are its paragraphs), .jsonl or .parquet file, or a list of strings.
        split: Split of a Hub or built-in data set. Local files and lists have none, so it is not
            looked at for them.
        text_column: Column that holds the text. Default: "text", or the only column of strings.
        config: Configuration of a Hub data set, as an alternative to "id:config".

    Returns:
        An iterator of non-empty strings. Hub data sets are streamed: only what is read is
        downloaded.

    Raises:
        ValueError: Unknown data set or split, missing file or column, malformed file, an entry
            that is no string.
        ConnectionError: The Hub could not be reached.
    """
    return (text for text in _documents(dataset, split, text_column, config) if text.strip())


def _documents(
    dataset: Any, split: str, text_column: str | None, config: str | None
) -> Iterable[str]:
    if isinstance(dataset, (str, os.PathLike)):
        name = os.fspath(dataset)
        if name == "builtin":
            return builtin_texts(split)
        path = Path(name)
        if path.suffix in FILE_SUFFIXES or path.is_file():
            return _file_documents(path, text_column)
        return _hub_documents(name, split, text_column, config)
    if isinstance(dataset, Iterable) and not isinstance(dataset, (bytes, Mapping)):
        return _checked_strings(dataset, "dataset")
    raise ValueError(
        f"dataset is of type {type(dataset).__name__}; allowed are a name, a path, a list of "
        "strings, or token ids (an integer tensor [n, length] or a list of lists of int)"
    )


def _checked_strings(texts: Iterable[Any], where: str) -> Iterator[str]:
    for position, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"{where}[{position}] is {type(text).__name__}, not a string")
        yield text


def _file_documents(path: Path, text_column: str | None) -> Iterator[str]:
    if not path.is_file():
        raise ValueError(f"dataset={str(path)!r}: there is no such file")
    if path.suffix == ".txt":
        return _paragraphs(path)
    if path.suffix == ".jsonl":
        return _jsonl_documents(path, text_column)
    if path.suffix == ".parquet":
        return _parquet_documents(path, text_column)
    raise ValueError(
        f"dataset={str(path)!r}: suffix {path.suffix!r} is not one of {', '.join(FILE_SUFFIXES)}"
    )


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8") as lines:
            yield from lines
    except UnicodeDecodeError as error:
        raise ValueError(f"dataset={str(path)!r} is not UTF-8 text: {error}") from error


def _paragraphs(path: Path) -> Iterator[str]:
    """Read a text file by paragraphs, so that of a large one only the part needed is read."""
    paragraph: list[str] = []
    for line in _lines(path):
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            yield "".join(paragraph).removesuffix("\n")
            paragraph = []
    yield "".join(paragraph).removesuffix("\n")


def _jsonl_documents(path: Path, text_column: str | None) -> Iterator[str]:
    column = None
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        where = f"dataset={str(path)!r}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where} is {type(row).__name__}, not a JSON object")
        if column is None:
            column = _choose_column(row, text_column, str(path))
        yield _text_of(row, column, where)


def _parquet_documents(path: Path, text_column: str | None) -> Iterator[str]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ValueError(
            f"dataset={str(path)!r}: reading .parquet needs pyarrow (pip install datasets)"
        ) from error
    try:
        table = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"dataset={str(path)!r} is not a parquet file: {error}") from error
    with table:
        schema = table.schema_arrow
        columns = {
            field.name: ""
            if pa.types.is_string(field.type) or pa.types.is_large_string(field.type)
            else None
            for field in schema
        }
        column = _choose_column(columns, text_column, str(path))
        number = 0
        for batch in table.iter_batches(columns=[column]):
            for text in batch.column(0).to_pylist():
                yield _text_of({column: text}, column, f"dataset={str(path)!r}, row {number}")
                number += 1


def _hub_documents(
    name: str, split: str, text_column: str | None, config: str | None
) -> Iterator[str]:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"dataset={name!r} needs the datasets library (pip install datasets)"
        ) from error
    arguments, split = _hub_arguments(name, split, config)
    try:
        rows = datasets.load_dataset(**arguments, split=split, streaming=True)
    except FileNotFoundError as error:
        raise ValueError(
            f"dataset={name!r} is no built-in name (builtin, wikitext2, c4), no local file, and "
            f"was not found on the Hub: {error}"
        ) from error
    except ConnectionError as error:
        raise ConnectionError(
            f"dataset={name!r} could not be fetched from the Hub: {error}; the data set 'builtin' "
            "and local files need no network"
        ) from error
    except ValueError as error:
        raise ValueError(f"dataset={name!r}, split={split!r}: {error}") from error
    column = None
    for number, row in enumerate(rows):
        if column is None:
            column = _choose_column(row, text_column, name)
        yield _text_of(row, column, f"dataset={name!r}, row {number}")


def _hub_arguments(name: str, split: str, config: str | None) -> tuple[dict[str, Any], str]:
    if name in _SHORTCUTS:
        if config is not None:
            raise ValueError(f"config={config!r}: the data set {name!r} has none to choose")
        return _SHORTCUTS[name], _SPLIT_OF_SHORTCUT.get((name, split), split)
    if Path(name).is_dir():
        return {"path": name, "name": config}, split
    match = _HUB_ID.fullmatch(name)
    if match is None:
        raise ValueError(
            f"dataset={name!r} is neither an existing path nor a Hub id ('id' or 'id:config')"
        )
    if config is not None and match["config"] not in (None, config):
        raise ValueError(f"dataset={name!r} names another configuration than config={config!r}")
    return {"path": match["id"], "name": match["config"] or config}, split


def _choose_column(row: Mapping[str, Any], text_column: str | None, name: str) -> str:
    """Choose the text column by a first row, or by a mapping of column to "" for strings."""
    present = ", ".join(map(repr, row)) or "none"
    if text_column is not None:
        if text_column not in row:
            raise ValueError(
                f"text_column={text_column!r}: dataset {name!r} has the columns {present}"
            )
        return text_column
    if "text" in row:
        return "text"
    strings = [column for column, value in row.items() if isinstance(value, str)]
    if len(strings) != 1:
        raise ValueError(
            f"dataset {name!r} has no column 'text'; choose one by text_column: it has {present}"
        )
    return strings[0]


def _text_of(row: Mapping[str, Any], column: str, where: str) -> str:
    text = row.get(column)
    if text is None:
        return ""
    if not isinstance(text, str):
        raise ValueError(f"{where}: column {column!r} holds {type(text).__name__}, not a string")
    return text
