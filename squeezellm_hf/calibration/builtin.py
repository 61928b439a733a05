"""The dataset that needs no network: Python's own help texts (`pydoc_data.topics`)."""

from __future__ import annotations

from functools import cache
from pydoc_data.topics import topics

SPLITS = ("train", "test")

# About a quarter of the text, and enough of it (tens of thousands of tokens), is held out.
_HELD_OUT_EVERY = 4
_HELD_OUT_AT = 2
_SHORTEST = 200


@cache
def _unique_topics() -> list[str]:
    """Every topic without the paragraphs that a longer topic already has.

    The topics overlap: `help("with")` is also a section of `help("compound")`. Without this
    step the held-out part would repeat text of the calibration part.
    """
    seen: set[str] = set()
    unique = []
    for _, text in sorted(topics.items(), key=lambda item: (-len(item[1]), item[0])):
        paragraphs = [p for p in text.split("\n\n") if p.strip() and p.strip() not in seen]
        seen.update(p.strip() for p in paragraphs)
        rest = "\n\n".join(paragraphs)
        if len(rest) >= _SHORTEST:
            unique.append(rest)
    return unique


def builtin_texts(split: str) -> list[str]:
    """Return the help topics of one split, each a string.

    The split depends on nothing but the Python version, whose help texts these are: sorted by
    length, every fourth topic is held out. No paragraph is in both splits.

    Args:
        split: "train" (for calibration, about 270,000 characters) or "test" (held out, about
            90,000 characters).

    Raises:
        ValueError: `split` is neither.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r}: the dataset 'builtin' has 'train' and 'test'")
    held_out = split == "test"
    return [
        text
        for position, text in enumerate(_unique_topics())
        if (position % _HELD_OUT_EVERY == _HELD_OUT_AT) == held_out
    ]
