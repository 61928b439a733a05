"""Models in fp16, bf16 and fp32: what follows the dtype, and what never does."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from squeezellm_hf import SqueezeLLMConfig, SqueezeLLMLinear, quantize_model
from squeezellm_hf.ops import native
from tests.conftest import tiny_llama

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
NEVER = ("qweight", "lookup_table", "crow_indices", "col_indices", "values")
# Of logits of about 10: the unit roundoff times a few layers.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.4}


def assert_in(model: torch.nn.Module, dtype: torch.dtype) -> None:
    assert model.dtype == dtype
    for name, tensor in model.named_parameters():
        if not name.endswith(NEVER):
            assert tensor.dtype == dtype, name


def stored(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: t for name, t in model.state_dict().items() if name.endswith(NEVER)}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert tensor.equal(theirs[name]), name


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, token_ids: Tensor) -> dict[torch.dtype, Path]:
    """A quantized checkpoint of each dtype, with biases."""
    folder = tmp_path_factory.mktemp("dtypes")
    tiny_llama(mlp_bias=True).save_pretrained(folder / "original")
    paths = {}
    for dtype in DTYPES:
        settings = SqueezeLLMConfig(dataset=token_ids, n_samples=4, sequence_length=32)
        model = AutoModelForCausalLM.from_pretrained(
            folder / "original", dtype=dtype, quantization_config=settings
        )
        assert_in(model, dtype)
        assert sum(isinstance(m, SqueezeLLMLinear) for m in model.modules()) == 14
        paths[dtype] = folder / str(dtype)
        model.save_pretrained(paths[dtype])
    return paths


@pytest.fixture(scope="module")
def logits(saved: dict[torch.dtype, Path], token_ids: Tensor) -> dict[torch.dtype, Tensor]:
    """Of each checkpoint with its weights widened: an oracle without our kernels."""
    result = {}
    for dtype, path in saved.items():
        plain = AutoModelForCausalLM.from_pretrained(
            path, quantization_config=SqueezeLLMConfig(dequantize=True), dtype=torch.float32
        )
        with torch.no_grad():
            result[dtype] = plain.double()(token_ids).logits
    return result


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"dtype": "auto"}])
def test_the_dtype_of_the_checkpoint(
    saved: dict, logits: dict, token_ids: Tensor, dtype: torch.dtype, options: dict
) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved[dtype], **options)
    assert_in(model, dtype)
    with torch.no_grad():
        output = model(token_ids).logits
    assert output.dtype == dtype
    assert (output.double() - logits[dtype]).abs().max() < TOLERANCE[dtype]


@pytest.mark.parametrize("stored_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_another_dtype_on_load(
    saved: dict, logits: dict, token_ids: Tensor, stored_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    """Norms, embeddings, head and biases follow, the tables are what they were."""
    model = AutoModelForCausalLM.from_pretrained(saved[stored_dtype], dtype=dtype)
    assert_in(model, dtype)
    assert_same(stored(model), stored(AutoModelForCausalLM.from_pretrained(saved[stored_dtype])))
    with torch.no_grad():
        output = model(token_ids).logits
    assert (output.double() - logits[stored_dtype]).abs().max() < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_to_changes_all_but_the_tables(
    saved: dict, logits: dict, token_ids: Tensor, tmp_path: Path, dtype: torch.dtype
) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved[torch.float32])
    before = {name: tensor.clone() for name, tensor in stored(model).items()}
    assert model.to(dtype) is model
    assert_in(model, dtype)
    assert_same(stored(model), before)
    with torch.no_grad():
        output = model(token_ids).logits
    assert (output.double() - logits[torch.float32]).abs().max() < TOLERANCE[dtype]
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_in(again, dtype)
    assert_same(stored(again), before)


@pytest.mark.parametrize("method", ["half", "float"])
def test_transformers_refuses_half_and_float(saved: dict, method: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved[torch.bfloat16])
    with pytest.raises(ValueError, match=rf"`\.{method}\(\)` is not supported for quantized"):
        getattr(model, method)()
    assert_in(model, torch.bfloat16)


@pytest.mark.parametrize(
    ("method", "dtype"),
    [("half", torch.float16), ("float", torch.float32), ("bfloat16", torch.bfloat16)],
)
def test_a_layer_alone(method: str, dtype: torch.dtype, token_ids: Tensor) -> None:
    """The methods of a module, for whoever calls them past the model: biases follow alone."""
    model = tiny_llama(mlp_bias=True)
    quantize_model(model, None, SqueezeLLMConfig(dataset=None), progress=False)
    layer = model.model.layers[0].mlp.up_proj
    tables = layer.lookup_table.clone()
    getattr(layer, method)()
    assert layer.bias.dtype == dtype
    assert layer.lookup_table.dtype == tables.dtype
    assert layer.lookup_table.equal(tables)
    assert layer(torch.ones(2, 64, dtype=dtype)).dtype == dtype


@pytest.mark.skipif(not native.status().loaded, reason="needs the native library")
def test_the_kernels_refuse_fp64(saved: dict, token_ids: Tensor) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved[torch.float32]).to(torch.float64)
    with pytest.raises(ValueError, match="float32, bfloat16 or float16"):
        model(token_ids)


# PyTorch's own autocast on a CPU takes no fp16 model.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(saved: dict, logits: dict, token_ids: Tensor, dtype: torch.dtype) -> None:
    """Under autocast the layers compute in what they are given."""
    model = AutoModelForCausalLM.from_pretrained(saved[dtype])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(token_ids).logits
    assert (output.double() - logits[dtype]).abs().max() < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_keeps_the_dtype(saved: dict, dtype: torch.dtype) -> None:
    plain = AutoModelForCausalLM.from_pretrained(saved[dtype]).dequantize()
    assert {tensor.dtype for tensor in plain.parameters()} == {dtype}
