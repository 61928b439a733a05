"""Time ``lut_linear`` against torch's own linear layers, one layer at a time.

    python benchmarks/kernels.py --json kernels.json
    python benchmarks/kernels.py --shapes 576x1536 1536x576 --batches 1 2 4 8 16
    python benchmarks/kernels.py --device cuda --json kernels.json --plot kernels.png

Everything is measured in one run, in turns, so that drift of the machine cancels; medians. Weights
come from memory, as they do in a model. Results are checked before they are timed.
"""

import argparse
import json
from pathlib import Path


def shape(text: str) -> tuple[int, int]:
    """OUTxIN."""
    try:
        out_features, in_features = map(int, text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not OUTxIN, as in 4096x14336") from None
    return out_features, in_features


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--shapes", nargs="+", type=shape, metavar="OUTxIN",
                        help="default: those of the documentation's tables")  # fmt: skip
    parser.add_argument("--bits", nargs="+", type=int, default=[2, 3, 4])
    parser.add_argument("--batches", nargs="+", type=int)
    parser.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], default="bf16",
                        help="of the activations")  # fmt: skip
    parser.add_argument("--isa", help="CPU: instruction set (default: the fastest)")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--no-reference", dest="reference", action="store_false",
                        help="CPU: leave out the slow PyTorch reference")  # fmt: skip
    parser.add_argument("--no-peers", dest="peers", action="store_false",
                        help="CUDA: leave out torch's own 4-bit product")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE",
                        help="CUDA: speed over the linear layer; needs matplotlib")  # fmt: skip
    args = parser.parse_args()
    if args.plot and args.device == "cpu":
        parser.error("--plot needs --device cuda")
    return args


def main() -> None:
    args = parse_args()
    if args.device == "cuda":
        import kernels_cuda as device
    else:
        import kernels_cpu as device
    document = device.run(args)
    if args.json is not None:
        args.json.write_text(json.dumps(document, indent=2) + "\n")
    if args.plot is not None:
        import kernels_plot

        kernels_plot.plot(document, args.plot)


if __name__ == "__main__":
    main()
