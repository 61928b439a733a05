import json
from pathlib import Path
from typing import Any

import pytest

from squeezellm_hf.calibration.sources import documents

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

TEXTS = ["first text", "second text", "dritter Text: ä"]


def write(path: Path, content: str) -> Path:
    path.write_text(content, encoding="utf-8")
    return path


def test_txt_is_read_by_paragraphs(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "one\ntwo\n\n\n\nthree\n\n  \n")
    assert list(documents(path)) == ["one\ntwo", "three"]
    assert list(documents(str(path))) == ["one\ntwo", "three"]


@pytest.mark.parametrize("column", ["text", "content"])
def test_jsonl(tmp_path: Path, column: str) -> None:
    lines = [json.dumps({"id": i, column: text}) for i, text in enumerate(TEXTS)]
    path = write(tmp_path / "a.jsonl", "\n".join(lines) + "\n\n")
    assert list(documents(path)) == TEXTS
    assert list(documents(path, text_column=column)) == TEXTS


@pytest.mark.parametrize("column", ["text", "content"])
def test_parquet(tmp_path: Path, column: str) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": [0, 1, 2, 3], column: [*TEXTS, None]}), path)
    assert list(documents(path)) == TEXTS
    assert list(documents(path, text_column=column)) == TEXTS


def test_list_of_strings_without_the_empty_ones() -> None:
    assert list(documents(["a", "", "  ", "b"])) == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"a": "x", "b": "y"}', "no column 'text'.*'a', 'b'"),
        ("a.jsonl", '{"text": "x"}\nnot json', "line 2 is not JSON"),
        ("a.jsonl", "[1]", "line 1 is list"),
        ("a.jsonl", '{"text": 3}', "line 1: column 'text' holds int"),
        ("a.csv", "text\nx", "'.csv' is not one of .txt, .jsonl, .parquet"),
        ("a.parquet", "not parquet", "not a parquet file"),
    ],
)
def test_malformed_files(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=message):
        list(documents(path))


def test_missing_column_names_the_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"title": ["x"], "body": ["y"]}), path)
    with pytest.raises(ValueError, match=r"text_column='text'.*'title', 'body'"):
        list(documents(path, text_column="text"))


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_missing_file(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(ValueError, match="there is no such file"):
        list(documents(tmp_path / f"none{suffix}"))


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_not_utf8(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ValueError, match="not UTF-8"):
        list(documents(path))


@pytest.mark.parametrize("dataset", [3, {"text": ["a"]}, b"bytes", None])
def test_unusable_types(dataset: Any) -> None:
    with pytest.raises(ValueError, match="dataset is of type"):
        list(documents(dataset))


def test_entry_that_is_no_string() -> None:
    with pytest.raises(ValueError, match=r"dataset\[1\] is float"):
        list(documents(["a", 0.5]))  # type: ignore[list-item]


class Hub:
    """Stands in for `datasets.load_dataset`: records its arguments, returns rows."""

    def __init__(self, rows: list[dict[str, Any]], error: Exception | None = None) -> None:
        self.rows, self.error = rows, error
        self.arguments: dict[str, Any] = {}

    def __call__(self, **arguments: Any) -> list[dict[str, Any]]:
        self.arguments = arguments
        if self.error is not None:
            raise self.error
        return self.rows


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    datasets = pytest.importorskip("datasets")
    hub = Hub([{"id": 0, "text": "a"}, {"id": 1, "text": ""}, {"id": 2, "text": "b"}])
    monkeypatch.setattr(datasets, "load_dataset", hub)
    return hub


@pytest.mark.parametrize(
    ("dataset", "config", "split", "expected"),
    [
        ("org/set", None, "train", {"path": "org/set", "name": None, "split": "train"}),
        ("org/set:en", None, "test", {"path": "org/set", "name": "en", "split": "test"}),
        ("set", "en", "test", {"path": "set", "name": "en", "split": "test"}),
        (
            "wikitext2",
            None,
            "test",
            {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "test"},
        ),
        ("c4", None, "test", {"path": "allenai/c4", "split": "validation"}),
    ],
)
def test_hub_arguments(
    hub: Hub, dataset: str, config: str | None, split: str, expected: dict[str, Any]
) -> None:
    assert list(documents(dataset, config=config, split=split)) == ["a", "b"]
    assert expected.items() <= hub.arguments.items()
    assert hub.arguments["streaming"] is True


def test_c4_reads_one_shard(hub: Hub) -> None:
    list(documents("c4"))
    assert isinstance(hub.arguments["data_files"]["train"], str)


def test_hub_missing_column(hub: Hub) -> None:
    hub.rows = [{"question": "q", "answer": "a"}]
    with pytest.raises(ValueError, match="'question', 'answer'"):
        list(documents("org/set"))


@pytest.mark.parametrize(
    ("dataset", "config", "message"),
    [
        ("org/set:en", "fr", "another configuration"),
        ("c4", "en", "config='en'"),
        ("no such set!", None, "neither an existing path nor a Hub id"),
    ],
)
def test_wrong_hub_names(hub: Hub, dataset: str, config: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(documents(dataset, config=config))


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (FileNotFoundError("nothing there"), ValueError, "not found on the Hub: nothing there"),
        (ConnectionError("no route"), ConnectionError, "'builtin' and local files"),
        (ValueError("Unknown split"), ValueError, "split='train': Unknown split"),
    ],
)
def test_hub_errors(hub: Hub, error: Exception, raised: type[Exception], message: str) -> None:
    hub.error = error
    with pytest.raises(raised, match=message):
        list(documents("org/set"))


def test_local_folder_through_the_datasets_library(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    lines = "\n".join(json.dumps({"text": text}) for text in TEXTS)
    write(tmp_path / "train.jsonl", lines)
    write(tmp_path / "test.jsonl", json.dumps({"text": "held out"}))
    assert list(documents(tmp_path)) == TEXTS
    assert list(documents(str(tmp_path), split="test")) == ["held out"]
    with pytest.raises(ValueError, match=r"split='dev'.*(train|test)"):
        list(documents(tmp_path, split="dev"))
