"""Every family: quantized while loading, saved in shards, loaded in a fresh process."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from squeezellm_hf import SqueezeLLMConfig, SqueezeLLMLinear
from tests.families import FAMILIES, Family

ROOT = Path(__file__).parents[2]
SHARD_SIZE = "60KB"

# Loads every folder of a list and runs each model on the inputs that lie in it.
LOADER = """
import json, sys
import torch, transformers, squeezellm_hf
from safetensors.torch import load_file, save_file
torch.set_num_threads(int(sys.argv[2]))
for folder, auto in json.load(open(sys.argv[1])):
    model = getattr(transformers, auto).from_pretrained(folder)
    layers = [m for m in model.modules() if isinstance(m, squeezellm_hf.SqueezeLLMLinear)]
    with torch.no_grad():
        output = next(iter(model(**load_file(f"{folder}/inputs")).values()))
    count = torch.tensor(len(layers))
    save_file({"output": output.contiguous(), "layers": count}, f"{folder}/reloaded")
"""


@dataclass
class Result:
    """What came of a family.

    Attributes:
        sizes: number of values of each parameter before.
        quantized: number of weights of each quantized layer.
        linears: names of the other linear layers.
        original: the first output of the original model.
        output: that of the quantized model.
        folder: where it is saved.
    """

    sizes: dict[str, int]
    quantized: dict[str, int]
    linears: list[str]
    original: Tensor
    output: Tensor
    folder: Path

    @property
    def reloaded(self) -> dict[str, Tensor]:
        return load_file(self.folder / "reloaded")


def first_output(model: Any, family: Family) -> Tensor:
    with torch.no_grad():
        return next(iter(model(**family.inputs()).values()))


def run(family: Family, folder: Path) -> Result:
    original = family.build()
    original.save_pretrained(folder / "original")
    expected = first_output(original, family)
    sizes = {name: p.numel() for name, p in original.named_parameters()}
    config = SqueezeLLMConfig(dataset=family.dataset(), n_samples=4, sequence_length=32)
    auto = getattr(transformers, family.auto)
    model = auto.from_pretrained(folder / "original", quantization_config=config)
    model.save_pretrained(folder / "quantized", max_shard_size=SHARD_SIZE)
    save_file(family.inputs(), folder / "quantized" / "inputs")
    modules = dict(model.named_modules())
    return Result(
        sizes,
        {
            name: m.in_features * m.out_features
            for name, m in modules.items()
            if isinstance(m, SqueezeLLMLinear)
        },
        [name for name, m in modules.items() if isinstance(m, torch.nn.Linear)],
        expected,
        first_output(model, family),
        folder / "quantized",
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """All families, saved; and loaded in one process, for importing takes longer than that."""
    root = tmp_path_factory.mktemp("families")
    found = {family.name: run(family, root / str(number)) for number, family in enumerate(FAMILIES)}
    jobs = [(str(found[family.name].folder), family.auto) for family in FAMILIES]
    (root / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, "-c", LOADER, str(root / "jobs.json"), str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    return found


def each(chosen: list[Family]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("family", chosen, ids=lambda family: family.name)


families = each(FAMILIES)
compiling_families = each([family for family in FAMILIES if family.compiles])
adapted_families = each([family for family in FAMILIES if family.adapts])


@families
def test_quantizes_the_blocks(results: dict[str, Result], family: Family) -> None:
    result = results[family.name]
    parameters, weights = (
        sum(
            size
            for name, size in sizes.items()
            if any(f".{block}." in f".{name}" for block in family.blocks)
        )
        for sizes in (result.sizes, result.quantized)
    )
    assert parameters > weights >= family.fraction * parameters
    assert (family.fraction >= 0.95) != bool(family.reason)


@families
def test_keeps_heads_and_towers(results: dict[str, Result], family: Family) -> None:
    result = results[family.name]
    for module in family.kept:
        assert any(f".{module}." in f".{name}." for name in result.linears), module
        assert not any(f".{module}." in f".{name}." for name in result.quantized), module


@families
def test_output_is_near_the_original(results: dict[str, Result], family: Family) -> None:
    result = results[family.name]
    error = float((result.output - result.original).norm() / result.original.norm())
    assert 0 < error < family.error


@families
def test_reloads_in_a_fresh_process(results: dict[str, Result], family: Family) -> None:
    result = results[family.name]
    assert len(list(result.folder.glob("*.safetensors"))) > 1
    assert int(result.reloaded["layers"]) == len(result.quantized)
    # A matrix product may depend on where in memory its operands lie, by rounding.
    torch.testing.assert_close(result.reloaded["output"], result.output, rtol=1e-5, atol=1e-5)


@compiling_families
def test_compiles_without_graph_break(results: dict[str, Result], family: Family) -> None:
    """Traced as a whole; what a compiler makes of the graph is tested on Llama."""
    model = load(results[family.name], family)
    cache = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        actual = next(iter(compiled(**family.inputs(), **cache).values()))
    torch.testing.assert_close(actual, results[family.name].output, rtol=1e-4, atol=1e-4)


@adapted_families
def test_adapters_learn(results: dict[str, Result], family: Family) -> None:
    peft = pytest.importorskip("peft")
    result = results[family.name]
    model = load(result, family)
    settings = peft.LoraConfig(
        r=2, target_modules="all-linear", exclude_modules=list(family.not_adapted) or None
    )
    adapted = peft.get_peft_model(model, settings)
    outputs = adapted(**family.inputs())
    floats = [t for t in outputs.values() if isinstance(t, Tensor) and t.is_floating_point()]
    torch.testing.assert_close(floats[0], result.output, rtol=1e-4, atol=1e-4)
    torch.stack([t.square().mean() for t in floats]).sum().backward()
    expected = {
        name
        for name in result.quantized
        if not any(f".{part}." in f".{name}." for part in family.not_adapted)
    }
    learning = {
        name.removeprefix("base_model.model.").partition(".lora_B")[0]
        for name, parameter in adapted.named_parameters()
        if ".lora_B." in name and parameter.grad is not None and bool(parameter.grad.any())
    }
    assert expected
    assert learning >= expected


def load(result: Result, family: Family) -> Any:
    return getattr(transformers, family.auto).from_pretrained(result.folder)
