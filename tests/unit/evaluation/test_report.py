import io
import json
import math
from pathlib import Path

from rich.console import Console

from squeezellm_hf.evaluation.report import (
    Column,
    decimals,
    megabytes,
    percent,
    table,
    write_json,
)

ROWS = [
    {"name": "original", "perplexity": 17.25, "bytes": 269_000_000},
    {"name": "4 bits", "perplexity": 19.5, "bytes": 90_000_000, "sparse": 0.0045, "none": None},
]
COLUMNS = [
    Column("name", "model"),
    Column("perplexity", "perplexity", decimals(2)),
    Column("bytes", "MB", megabytes),
    Column("sparse", "sparse", percent(2)),
    Column("none", "nothing"),
]


def text_of(rows: list[dict[str, object]]) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(table(rows, COLUMNS, title="Results"))
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_table_shows_values_with_their_units() -> None:
    text = text_of(ROWS)
    for part in ("Results", "original", "17.25", "269.0", "90.0", "0.45 %"):
        assert part in text


def test_columns_without_values_are_left_out_and_gaps_are_dashes() -> None:
    text = text_of(ROWS)
    assert "nothing" not in text
    assert "- " in next(line for line in text.splitlines() if "original" in line)


def test_formats() -> None:
    assert decimals(1)(1234.56) == "1,234.6"
    assert percent(0)(0.5) == "50 %"


def test_json_round_trip_and_no_temporary_file_left(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    write_json(path, [{"a": 1, "b": math.inf, "c": [math.nan]}], text="builtin")
    expected = {"text": "builtin", "rows": [{"a": 1, "b": None, "c": [None]}]}
    assert json.loads(path.read_text()) == expected
    assert list(tmp_path.iterdir()) == [path]
