"""`optimum-cli squeezellm`, as Optimum finds and runs it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from squeezellm_hf import SqueezeLLMLinear
from squeezellm_hf.cli import COMMANDS
from tests.tiny_checkpoint import write

pytest.importorskip("optimum.commands.optimum_cli")

MAIN = "from optimum.commands.optimum_cli import main; main()"


def optimum_cli(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", MAIN, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,  # not the repository: the command comes with the installed package
        env={**os.environ, "COLUMNS": "120"},
    )


def test_quantize_with_options_before_and_behind(tmp_path: Path) -> None:
    write(tmp_path / "original")
    result = optimum_cli(
        *("squeezellm", "quantize", "--bits", "3", "original", "out", "--dataset", "none"),
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert "Saved to out" in result.stdout
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    layers = [m for m in model.modules() if isinstance(m, SqueezeLLMLinear)]
    assert len(layers) == 14
    assert {layer.bits for layer in layers} == {3}


def test_help_is_that_of_the_command(tmp_path: Path) -> None:
    overview = optimum_cli("squeezellm", "--help", cwd=tmp_path)
    assert overview.returncode == 0, overview.stderr
    assert all(f"\n    {name} " in overview.stdout for name in COMMANDS)
    result = optimum_cli("squeezellm", "quantize", "--help", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("usage: optimum-cli squeezellm quantize ")
    assert "--outlier-fraction" in result.stdout


def test_errors(tmp_path: Path) -> None:
    wrong = optimum_cli("squeezellm", "quantize", "/no/such", "out", cwd=tmp_path)
    assert wrong.returncode == 1
    assert wrong.stderr.splitlines()[-1] == (
        "optimum-cli squeezellm quantize: there is no folder '/no/such'"
    )
    assert optimum_cli("squeezellm", "quantize", cwd=tmp_path).returncode == 2


def test_the_start_of_optimum_cli_stays_light(tmp_path: Path) -> None:
    code = (
        "import sys, optimum.commands.register.register_squeezellm;"
        "print(sorted({'torch', 'transformers', 'tyro'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert result.stdout == "[]\n"
