"""`optimum-cli squeezellm`: the commands of `squeezellm`, where Optimum looks for commands.

Optimum imports every file of this namespace at each start, so nothing heavy is imported here. No
`__init__.py` may lie beside this file or above it: other packages have parts of the namespace.
"""

import argparse

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from squeezellm_hf.cli import COMMANDS, main


class _Command(BaseOptimumCLICommand):
    """One command of `squeezellm`, with that command's own options."""

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        # Nothing begins with such a character: what follows is never an option to this parser, and
        # goes as it is to the one that knows the options.
        parser.prefix_chars = "\0"
        parser.add_argument("arguments", nargs=argparse.REMAINDER)

    def run(self) -> None:
        raise SystemExit(
            main([self.COMMAND.name, *self.args.arguments], prog="optimum-cli squeezellm")
        )


class SqueezeLLMCommand(BaseOptimumCLICommand):
    """The group of these commands; by itself it prints their list."""

    COMMAND = CommandInfo("squeezellm", help="SqueezeLLM's dense-and-sparse quantization.")
    SUBCOMMANDS = tuple(
        CommandInfo(name, help=text, subcommand_class=_Command) for name, text in COMMANDS.items()
    )


REGISTER_COMMANDS = [SqueezeLLMCommand]
