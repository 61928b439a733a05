"""Plot what ``kernels.py --device cuda --json FILE`` wrote: speed over the linear layer by batch.

python benchmarks/kernels_plot.py benchmarks/results/kernels-h200.json kernels-h200.png
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot


def plot(document: dict[str, Any], path: Path) -> None:
    """One panel a shape, one line a kind of weight; dashed with a sparse part."""
    results = document["results"]
    shapes = list(dict.fromkeys((r["out_features"], r["in_features"]) for r in results))
    figure, axes = pyplot.subplots(
        1, len(shapes), figsize=(4 * len(shapes), 4), sharey=True, squeeze=False
    )
    for axis, shape in zip(axes[0], shapes, strict=True):
        panel = [r for r in results if (r["out_features"], r["in_features"]) == shape]
        kinds = [kind for kind in dict.fromkeys(r["kind"] for r in panel) if kind != "linear"]
        plain = [kind for kind in kinds if not kind.endswith("+")]
        for kind in kinds:
            points = sorted((r["batch"], r["over_linear"]) for r in panel if r["kind"] == kind)
            axis.plot(
                *zip(*points, strict=True),
                color=f"C{plain.index(kind.rstrip('+'))}",
                linestyle="--" if kind.endswith("+") else "-",
                marker=".",
                label=kind,
            )
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.set_title(f"{shape[0]} x {shape[1]}")
        axis.set_xlabel("batch")
    axes[0][0].set_ylabel(f"times {document['dtype']} linear")
    axes[0][-1].legend()
    figure.suptitle(document["hardware"]["device"])
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("json", type=Path)
    parser.add_argument("image", type=Path)
    args = parser.parse_args()
    plot(json.loads(args.json.read_text()), args.image)


if __name__ == "__main__":
    main()
