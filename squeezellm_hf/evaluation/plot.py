"""A comparison as a picture: how much perplexity rises against bits per weight."""

from __future__ import annotations

import os
from collections.abc import Sequence

from squeezellm_hf.evaluation.cases import OURS
from squeezellm_hf.evaluation.report import Row

_NAMES = {OURS: "SqueezeLLM (this package)", "rtn": "round to nearest", "hqq": "HQQ"}
_NAMES |= {"nf4": "bitsandbytes NF4", "gptq": "GPTQ"}
# The axis is logarithmic, and a text of chance may be easier for a quantized model.
_LEAST_PERCENT = 0.1
_MARKERS = {OURS: "o", "rtn": "v", "hqq": "s", "nf4": "D", "gptq": "^"}


def check_plot(path: str | os.PathLike[str]) -> None:
    """Raise ValueError unless `plot` can write such a file; before hours of work, not after."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(
            f"a plot needs matplotlib: pip install 'squeezellm-hf[plot]' ({error})"
        ) from error
    suffix = os.path.splitext(path)[1].removeprefix(".")
    allowed = sorted(Figure().canvas.get_supported_filetypes())
    if suffix not in allowed:
        raise ValueError(f"plot={os.fspath(path)!r} must end in one of {', '.join(allowed)}")


def plot(path: str | os.PathLike[str], rows: Sequence[Row], title: str) -> None:
    """Draw the cases of a comparison, ours joined by a line.

    Args:
        path: Written in the format of its suffix, .svg or .png for example.
        rows: With "method", "bits_per_weight" and "ratio", as `compare` gives them.
        title: Above the picture.

    Raises:
        ValueError: matplotlib is not installed, or cannot write this format.
    """
    check_plot(path)
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for method in _MARKERS:
        points = sorted(
            (row["bits_per_weight"], max(100 * (row["ratio"] - 1), _LEAST_PERCENT))
            for row in rows
            if row["method"] == method
        )
        if points:
            axes.plot(
                *zip(*points, strict=True),
                marker=_MARKERS[method],
                linestyle="-" if method == OURS else "",
                label=_NAMES[method],
            )
    axes.set(xlabel="bits per weight, all that is stored", yscale="log", title=title)
    axes.set_ylabel("perplexity above the original's, %")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path)
