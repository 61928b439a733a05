"""The command `squeezellm`: one file a subcommand, imported when it is called."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

COMMANDS = {
    "quantize": "Quantize a model and save it as an ordinary checkpoint, or push it to the Hub.",
    "convert": "Turn a .pt checkpoint of the public SqueezeLLM code into an ordinary one.",
    "eval": "Perplexity on a text, and how far predictions are from the original model's.",
    "compare": "Perplexity against bits per weight: us, GPTQ, NF4, HQQ, round to nearest.",
    "inspect": "What a checkpoint holds: bits, sparse values and bytes of every layer.",
    "bench": "Tokens per second and memory, quantized against original.",
    "env": "Installed versions, hardware, and which kernels are active.",
}
_DESCRIPTION = """SqueezeLLM quantization for Hugging Face Transformers.

A model is given as a Hub id or as a local folder. A quantized one loads with plain Transformers:
pipeline("text-generation", model=OUT).

  squeezellm quantize HuggingFaceTB/SmolLM2-135M-Instruct OUT --bits 4
  squeezellm inspect OUT
  squeezellm eval OUT --reference HuggingFaceTB/SmolLM2-135M-Instruct

`squeezellm COMMAND --help` explains a command; `squeezellm --version` prints the version."""


def main(argv: Sequence[str] | None = None, prog: str = "squeezellm") -> int:
    """Run the command line.

    Args:
        argv: Arguments; default: those of the process.
        prog: What the command is called in messages.

    Returns:
        Exit status: 0; 1 for an error in what was asked for (a wrong value, a missing model, no
        network), told in one line; 130 after an interrupt. A malformed command line exits with 2.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments == ["--version"]:
        print(f"squeezellm {_version()}")
        return 0
    if not arguments or arguments[0] not in COMMANDS:
        _overview(arguments or ["--help"])
    name = arguments[0]
    try:
        _command(name, arguments[1:], prog).run()
    except (ValueError, OSError) as error:
        if os.environ.get("SQUEEZELLM_HF_TRACEBACK") == "1":
            raise
        print(f"{prog} {name}: {_one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{prog} {name}: interrupted", file=sys.stderr)
        return 130
    return 0


def _command(name: str, arguments: list[str], prog: str) -> Any:
    """The command with the values of its options; exits where they are malformed."""
    import tyro  # here, and below: Optimum imports this module at each of its starts

    module = importlib.import_module(f"squeezellm_hf.cli.{name}")
    return tyro.cli(
        module.Command,
        prog=f"{prog} {name}",
        description=module.DESCRIPTION,
        args=arguments,
        config=(
            tyro.conf.DisallowNone,
            tyro.conf.FlagCreatePairsOff,
            tyro.conf.OmitArgPrefixes,
            tyro.conf.PositionalMetavarFromFieldName,
        ),
    )


def _overview(arguments: list[str]) -> None:
    """Print the list of commands, or what is wrong with the arguments, and exit."""
    import tyro

    def named(text: str) -> Callable[[], None]:
        def command() -> None: ...

        command.__doc__ = text
        return command

    tyro.extras.subcommand_cli_from_dict(
        {name: named(text) for name, text in COMMANDS.items()},
        prog="squeezellm",
        description=_DESCRIPTION,
        args=arguments,
    )


def _version() -> str:
    try:
        return importlib.metadata.version("squeezellm-hf")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed, run from its sources)"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
