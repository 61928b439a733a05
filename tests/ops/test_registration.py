"""The ops behave as torch expects of them, and the library loads, or not, as told."""

import os
import subprocess
import sys
import warnings

import pytest
import torch

import squeezellm_hf.ops  # noqa: F401
from squeezellm_hf.ops import native
from tests.ops.oracle import make_weight


@pytest.mark.parametrize("density", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(density: float, dtype: torch.dtype) -> None:
    weight = make_weight(9, 40, 4, density=density)
    stored = [
        weight.tensors.get(name)
        for name in ("qweight", "lookup_table", "crow_indices", "col_indices", "values")
    ]
    x = torch.randn(2, 3, 40, dtype=dtype, requires_grad=True)
    bias = torch.randn(9)
    torch.library.opcheck(torch.ops.squeezellm_hf.lut_linear.default, (x, *stored, bias, 4))
    torch.library.opcheck(torch.ops.squeezellm_hf.lut_dequantize.default, (*stored, 4, 40, dtype))
    reference = torch.ops.squeezellm_hf.lut_linear_reference.default
    torch.library.opcheck(reference, (x, *stored, bias, 4))
    reference = torch.ops.squeezellm_hf.lut_dequantize_reference.default
    torch.library.opcheck(reference, (*stored, 4, 40, dtype))


def test_a_missing_library_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_handle", None)
    monkeypatch.setattr(native, "_reason", None)
    monkeypatch.setattr(native, "_LIBRARY", "_absent.so")
    for variable in ("SQUEEZELLM_HF_NATIVE", "SQUEEZELLM_HF_LIBRARY"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.warns(UserWarning, match="PyTorch reference") as told:
        native.load()
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        native.load()
    status = native.status()
    assert not status.loaded
    assert status.path is None
    assert "not built" in str(status.reason)
    with pytest.raises(RuntimeError, match="not loaded"):
        native.set_instruction_set(None)


@pytest.mark.skipif(not native.status().loaded, reason="needs the native library")
def test_a_library_older_than_the_ops_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    for name in ("lut_linear", "lut_linear_no_grad", "lut_dequantize"):
        assert has_kernel(f"squeezellm_hf::{name}", "CPU")
    monkeypatch.setattr(native, "_handle", None)
    monkeypatch.setattr(
        torch._C,
        "_dispatch_has_kernel_for_dispatch_key",
        lambda name, key: not name.endswith("no_grad") and has_kernel(name, key),
    )
    with pytest.warns(UserWarning, match="older than its Python code: .*_no_grad runs"):
        native.load()
    assert native.status().loaded


@pytest.mark.skipif(not native.status().loaded, reason="needs the native library")
def test_unknown_instruction_set() -> None:
    before = native.status().instruction_set
    with pytest.raises(ValueError, match=r"sse9 is unknown .* can run: scalar"):
        native.set_instruction_set("sse9")
    assert native.status().instruction_set == before


def import_ops(**environment: str) -> subprocess.CompletedProcess[str]:
    code = "from squeezellm_hf.ops import native; print(native.status())"
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0", **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.skipif(not native.status().loaded, reason="needs the native library")
def test_environment() -> None:
    off = import_ops(SQUEEZELLM_HF_NATIVE="0")
    assert "loaded=False" in off.stdout
    assert "SQUEEZELLM_HF_NATIVE=0" in off.stdout
    assert off.stderr == ""
    assert "instruction_set='scalar'" in import_ops(SQUEEZELLM_HF_ISA="scalar").stdout
    unknown = import_ops(SQUEEZELLM_HF_ISA="sse9")
    assert unknown.returncode != 0
    assert "ValueError: SQUEEZELLM_HF_ISA=sse9 is unknown" in unknown.stderr
