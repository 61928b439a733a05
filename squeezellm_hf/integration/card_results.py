"""Results of an evaluation in the model card that lies with a checkpoint.

They are a section of their own, between two marks, so that a card that is written anew keeps them.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard

CARD = "README.md"
_BEGIN, _END = "<!-- results -->", "<!-- end of results -->"
_SECTION = re.compile(rf"\n?{_BEGIN}.*?{_END}\n?", re.DOTALL)
# Key of a row of `squeezellm eval`: how the card calls it, and its digits.
_COLUMNS = {
    "bits_per_weight": ("bits/weight", 2),
    "perplexity": ("perplexity", 3),
    "ratio": ("/ original", 4),
    "kl_mean": ("KL to the original, nats", 4),
    "top1_agreement": ("same top-1", 4),
}
_METRICS = {"perplexity": "Perplexity", "kl_mean": "KL to the original (nats a token)"}


@dataclass
class Results:
    """What a card says of results.

    Attributes:
        section: of the card's text, or "".
        metadata: the same for the card's ``model-index``, or None.
    """

    section: str = ""
    metadata: list[EvalResult] | None = field(default=None)


def evaluation_results(folder: str | os.PathLike[str] | None) -> Results:
    """What the card in ``folder`` says of results; nothing where there is no such folder."""
    path = Path(folder or "") / CARD
    if not folder or not path.is_file():
        return Results()
    text = path.read_text(encoding="utf-8", errors="replace")
    section = _SECTION.search(text)
    if section is None:
        return Results()
    return Results(
        section.group(), ModelCard(text, ignore_metadata_errors=True).data.get("eval_results")
    )


def write_results(
    folder: str | os.PathLike[str],
    rows: Sequence[Mapping[str, Any]],
    *,
    dataset: str,
    split: str,
    sequence_length: int,
) -> None:
    """Put results into the card that lies with a checkpoint, in place of earlier ones.

    Args:
        folder: of the checkpoint.
        rows: the original's, where it was evaluated, and this checkpoint's last; keys as in
            `squeezellm eval --json`.
        dataset: the text that was predicted, as it is described in checkpoints.
        split: of that data set.
        sequence_length: tokens a window.

    Raises:
        ValueError: if there is no card.
    """
    path = Path(folder) / CARD
    if not path.is_file():
        raise ValueError(f"{str(folder)!r} has no {CARD} to put results into")
    card = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True)
    columns = [key for key in _COLUMNS if any(row.get(key) is not None for row in rows)]
    names = ["original"] * (len(rows) - 1) + ["this model"]
    table = [
        ["", *(_COLUMNS[key][0] for key in columns)],
        ["---"] * (1 + len(columns)),
        *(
            [name, *(_cell(row.get(key), _COLUMNS[key][1]) for key in columns)]
            for name, row in zip(names, rows, strict=True)
        ),
    ]
    lines = "\n".join(f"| {' | '.join(cells)} |" for cells in table)
    section = (
        f"\n{_BEGIN}\n## Results\n\n{dataset} ({split}), windows of {sequence_length} tokens, "
        f"{rows[-1]['n_tokens']:,} tokens:\n\n{lines}\n{_END}\n"
    )
    card.text = _SECTION.sub("", card.text).rstrip() + "\n" + section
    card.data["model_name"] = Path(folder).resolve().name
    card.data["eval_results"] = [
        EvalResult(
            task_type="text-generation",
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_split=split,
            metric_type=key,
            metric_name=name,
            metric_value=float(rows[-1][key]),
        )
        for key, name in _METRICS.items()
        if rows[-1].get(key) is not None
    ]
    card.save(path)


def _cell(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
