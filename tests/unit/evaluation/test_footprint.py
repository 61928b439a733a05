from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from squeezellm_hf.evaluation.footprint import TensorSize, footprint, model_footprint
from squeezellm_hf.evaluation.headers import checkpoint_sizes
from squeezellm_hf.nn import SqueezeLLMLinear


def layer(bits: int, nnz: int, in_features: int = 64, out_features: int = 8) -> SqueezeLLMLinear:
    return SqueezeLLMLinear(
        in_features, out_features, bits, nnz=nnz, bias=True, dtype=torch.float32
    )


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("nnz", [0, 5])
def test_counts_what_the_tensors_take(bits: int, nnz: int) -> None:
    module = layer(bits, nnz)
    model = nn.ModuleDict({"a": module, "b": nn.Linear(4, 4)})
    result = model_footprint(model)
    (counted,) = result.layers
    stored = sum(
        p.numel() * p.element_size() for name, p in module.named_parameters() if name != "bias"
    )
    assert counted.n_bytes == stored
    assert counted.bits_per_weight == 8 * stored / (64 * 8)
    assert (counted.bits, counted.nnz, counted.in_features, counted.out_features) == (
        bits,
        nnz,
        64,
        8,
    )
    assert result.n_bytes == sum(p.numel() * p.element_size() for p in model.parameters())


def test_nominal_bits_by_hand() -> None:
    # 4 + 16 * 16 / 64 + 32 * 5 / 512 + 32 / 64
    (counted,) = model_footprint(nn.ModuleDict({"a": layer(4, 5)})).layers
    assert counted.nominal_bits_per_weight == 4 + 4 + 0.3125 + 0.5
    # One row pointer more than there are rows is all that this shape adds.
    assert counted.bits_per_weight == counted.nominal_bits_per_weight + 32 / 512
    (dense,) = model_footprint(nn.ModuleDict({"a": layer(3, 0)})).layers
    assert dense.nominal_bits_per_weight == dense.bits_per_weight == 3 + 2


def test_padding_of_rows_is_counted() -> None:
    (counted,) = model_footprint(nn.ModuleDict({"a": layer(3, 0, in_features=1)})).layers
    assert counted.index_bytes == 8 * 4
    assert counted.bits_per_weight == 32 + 16 * 8


def test_totals_are_weighted_by_size() -> None:
    model = nn.ModuleDict({"a": layer(4, 0, in_features=64), "b": layer(2, 3, in_features=320)})
    result = model_footprint(model)
    a, b = result.layers
    assert result.bits_per_weight == pytest.approx((a.bits_per_weight + 5 * b.bits_per_weight) / 6)
    assert result.nominal_bits_per_weight == pytest.approx(
        (a.nominal_bits_per_weight + 5 * b.nominal_bits_per_weight) / 6
    )
    assert result.sparse_fraction == 3 / (8 * 384)


def test_nothing_quantized() -> None:
    result = model_footprint(nn.Linear(3, 5))
    assert result.layers == ()
    assert result.bits_per_weight != result.bits_per_weight
    assert result.n_bytes == 80


@pytest.mark.parametrize("sharded", [False, True])
def test_headers_of_a_checkpoint_give_the_same(tmp_path: Path, sharded: bool) -> None:
    model = nn.ModuleDict({"a": layer(3, 7), "b": layer(4, 0), "norm": nn.LayerNorm(5)})
    state = model.state_dict()
    if sharded:
        names = sorted(state)
        halves = {"x.safetensors": names[::2], "y.safetensors": names[1::2]}
        for file, part in halves.items():
            save_file({name: state[name] for name in part}, tmp_path / file)
        index = ", ".join(f'"{n}": "{f}"' for f, part in halves.items() for n in part)
        (tmp_path / "model.safetensors.index.json").write_text(f'{{"weight_map": {{{index}}}}}')
    else:
        save_file(state, tmp_path / "model.safetensors")
    of_file, of_model = footprint(checkpoint_sizes(tmp_path)), model_footprint(model)
    assert sorted(of_file.layers, key=lambda x: x.name) == list(of_model.layers)
    assert of_file.others == of_model.others


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float8_e4m3fn, torch.int64])
def test_bytes_of_other_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.zeros(3, 5).to(dtype)
    save_file({"t": tensor}, tmp_path / "model.safetensors")
    sizes = checkpoint_sizes(tmp_path)
    assert sizes == {"t": TensorSize((3, 5), tensor.numel() * tensor.element_size())}


def test_truncated_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"t": torch.zeros(100)}, path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        checkpoint_sizes(tmp_path)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="lacks safetensors files"):
        checkpoint_sizes(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "../../gone.safetensors"}}')
    with pytest.raises(OSError, match="lacks gone"):
        checkpoint_sizes(tmp_path)
    index.write_text("[]")
    with pytest.raises(ValueError, match="not an index"):
        checkpoint_sizes(tmp_path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"a.lookup_table": TensorSize((8, 15), 240)}, r"lookup_table has the shape \[8, 15\]"),
        ({"a.lookup_table": TensorSize((7, 16), 224)}, r"lookup_table has the shape \[7, 16\]"),
        ({"a.lookup_table": TensorSize((16,), 32)}, r"must be \[out, words\]"),
        ({"a.qweight": TensorSize((8, 0), 0)}, r"must be \[out, words\]"),
        ({"a.values": TensorSize((3,), 6)}, "only values"),
    ],
)
def test_malformed_layers(changed: dict[str, Any], message: str) -> None:
    sizes = {"a.qweight": TensorSize((8, 8), 256), "a.lookup_table": TensorSize((8, 16), 256)}
    assert len(footprint(sizes).layers) == 1
    with pytest.raises(ValueError, match=message):
        footprint({**sizes, **changed})
