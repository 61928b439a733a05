"""The choice of kernels for one model."""

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from squeezellm_hf import SqueezeLLMConfig, quantize_model
from squeezellm_hf.nn.backend import set_backend
from squeezellm_hf.ops import native
from tests.conftest import tiny_llama

needs_kernels = pytest.mark.skipif(not native.status().loaded, reason="needs the native library")


class Recorder(TorchDispatchMode):
    """Names of our ops that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "squeezellm_hf":
            self.names.add(func.name().removeprefix("squeezellm_hf::"))
        return func(*args, **kwargs or {})


def ops_of(model: torch.nn.Module, token_ids: Tensor) -> set[str]:
    with Recorder() as recorder, torch.no_grad():
        model(token_ids)
    return recorder.names


@pytest.fixture(scope="module")
def saved(token_ids: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = SqueezeLLMConfig(
        bits=3, dataset=token_ids, n_samples=4, sequence_length=32, backend="reference"
    )
    model = quantize_model(tiny_llama(mlp_bias=True), None, settings, progress=False)
    assert ops_of(model, token_ids) == {"lut_linear_reference"}
    path = tmp_path_factory.mktemp("backend") / "quantized"
    model.save_pretrained(path)
    return path


def load(path: Path, **fields: object):
    return AutoModelForCausalLM.from_pretrained(
        path, quantization_config=SqueezeLLMConfig(**fields)
    )


def test_is_not_stored(saved: Path, token_ids: Tensor) -> None:
    assert "backend" not in json.loads((saved / "config.json").read_text())["quantization_config"]
    model = AutoModelForCausalLM.from_pretrained(saved)
    assert ops_of(model, token_ids) == {"lut_linear_no_grad"}


def test_while_quantizing_on_load(checkpoint: Path, token_ids: Tensor) -> None:
    model = load(checkpoint, dataset=None, backend="reference")
    assert ops_of(model, token_ids) == {"lut_linear_reference"}


def test_reference_gives_the_same(saved: Path, token_ids: Tensor) -> None:
    model, reference = AutoModelForCausalLM.from_pretrained(saved), load(saved, backend="reference")
    assert ops_of(reference, token_ids) == {"lut_linear_reference"}
    with torch.no_grad():
        torch.testing.assert_close(
            reference(token_ids).logits, model(token_ids).logits, rtol=1e-4, atol=1e-4
        )
    prompt = token_ids[:1, :8]
    generated = reference.generate(prompt, max_new_tokens=8, do_sample=False)
    assert generated.equal(model.generate(prompt, max_new_tokens=8, do_sample=False))


def test_reference_has_gradients(saved: Path, token_ids: Tensor) -> None:
    gradients = []
    for backend in ("auto", "reference"):
        model = load(saved, backend=backend)
        model.model.embed_tokens.weight.requires_grad_(True)
        with Recorder() as recorder:
            model(input_ids=token_ids, labels=token_ids).loss.backward()
        gradients.append(model.model.embed_tokens.weight.grad)
    assert recorder.names == {"lut_linear_reference", "lut_dequantize_reference"}
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_reference_compiles_without_graph_break(saved: Path, token_ids: Tensor) -> None:
    model = load(saved, backend="reference")
    with torch.no_grad():
        expected = model(token_ids, use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(token_ids, use_cache=False).logits, expected)


def test_dequantizes_by_the_reference(saved: Path) -> None:
    with Recorder() as recorder:
        load(saved, backend="reference").dequantize()
    assert recorder.names == {"lut_dequantize_reference"}


def test_copies_keep_it_and_it_can_be_taken_back(saved: Path, token_ids: Tensor) -> None:
    model = load(saved, backend="reference")
    layer = model.model.layers[0].mlp.up_proj
    assert ops_of(copy.deepcopy(model), token_ids) == {"lut_linear_reference"}
    assert pickle.loads(pickle.dumps(layer))._linear is layer._linear
    set_backend(model, "auto")
    assert ops_of(model, token_ids) == {"lut_linear_no_grad"}


@needs_kernels
def test_native_where_there_are_kernels(saved: Path, token_ids: Tensor) -> None:
    assert ops_of(load(saved, backend="native"), token_ids) == {"lut_linear_no_grad"}


def test_native_where_there_are_none(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_handle", None)
    monkeypatch.setattr(native, "_reason", "no compiler")
    with pytest.raises(ValueError, match=r"'native' .* model\.layers\.0.* cpu: no compiler"):
        load(saved, backend="native")
    assert load(saved).is_quantized


def test_an_unknown_backend() -> None:
    with pytest.raises(ValueError, match="backend must be one of auto, native, reference, got 'x'"):
        SqueezeLLMConfig(backend="x")
