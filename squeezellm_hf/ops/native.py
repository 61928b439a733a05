"""Loads the compiled kernels, once, and says what became of it.

There are two libraries, so that the CPU's kernels work beside a torch without CUDA.

Environment:
    SQUEEZELLM_HF_NATIVE: ``0`` leaves the libraries alone; the PyTorch reference runs.
    SQUEEZELLM_HF_ISA: ``scalar``, ``avx2``, ``avx512`` or ``avx512_bf16`` forces an instruction
        set; a ValueError if the machine lacks it.
    SQUEEZELLM_HF_LIBRARY, SQUEEZELLM_HF_CUDA_LIBRARY: path of a library to load instead of the
        installed one.
"""

import ctypes
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from squeezellm_hf.ops.schema import (
    LUT_DEQUANTIZE,
    LUT_LINEAR,
    LUT_LINEAR_GROUP,
    LUT_LINEAR_NO_GRAD,
)

_LIBRARY = "_native.so"
_CUDA_LIBRARY = "_native_cuda.so"
_WHY_NOT_BUILT = "native_missing.txt"  # written by csrc/CMakeLists.txt
_WHY_NO_CUDA = "native_cuda_missing.txt"  # likewise, by csrc/cuda/CMakeLists.txt
_HOW = "To build it, reinstall squeezellm_hf where torch and a C++ compiler are"


@dataclass(frozen=True)
class NativeStatus:
    """What became of the compiled kernels.

    Attributes:
        loaded: whether they are in use.
        path: of the library, if there is one.
        reason: why they are not in use, or None.
        instruction_set: what the kernels run on: scalar, avx2, avx512 or avx512_bf16.
        available: the instruction sets this machine can run, slowest first.
        cuda_loaded: whether the CUDA kernels are in use.
        cuda_reason: why they are not, or None.
    """

    loaded: bool
    path: Path | None
    reason: str | None
    instruction_set: str | None
    available: tuple[str, ...]
    cuda_loaded: bool = False
    cuda_reason: str | None = None


_handle: ctypes.CDLL | None = None
_reason: str | None = None
_cuda_loaded = False
_cuda_reason: str | None = None


def _installed(name: str) -> Path | None:
    """A file that the build installed beside this one, or None."""
    # An editable install keeps built files in site-packages and Python files in the checkout; the
    # package's path then has both.
    from squeezellm_hf import ops

    for directory in (Path(__file__).parent, *map(Path, ops.__path__)):
        if (directory / name).is_file():
            return directory / name
    return None


def _library() -> Path | None:
    chosen = os.environ.get("SQUEEZELLM_HF_LIBRARY")
    return Path(chosen).absolute() if chosen else _installed(_LIBRARY)


def _open() -> ctypes.CDLL:
    path = _library()
    if path is None:
        note = _installed(_WHY_NOT_BUILT)
        raise FileNotFoundError(
            f"{_LIBRARY} was not built when squeezellm_hf was installed (pip install -v tells why)"
            if note is None
            else note.read_text().strip()
        )
    torch.ops.load_library(path)
    library = ctypes.CDLL(str(path))
    library.squeezellm_hf_select_instruction_set.argtypes = [ctypes.c_char_p]
    for function in (
        library.squeezellm_hf_select_instruction_set,
        library.squeezellm_hf_instruction_set,
        library.squeezellm_hf_available_instruction_sets,
    ):
        function.restype = ctypes.c_char_p
    return library


def _warn_if_old(key: str) -> None:
    """A library that was built before an op came to ``schema.py`` leaves that op to the reference.

    Args:
        key: the dispatch key that the library serves.
    """
    names = [LUT_LINEAR, LUT_LINEAR_NO_GRAD, LUT_DEQUANTIZE]
    if key == "CUDA":  # elsewhere a group is one call after the other
        names.append(LUT_LINEAR_GROUP)
    missing = [
        name for name in names if not torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
    ]
    if missing:
        warnings.warn(
            f"the {key} kernels of squeezellm_hf are older than its Python code: "
            f"{', '.join(missing)} runs on its slow PyTorch reference. Reinstall squeezellm_hf.",
            stacklevel=4,
        )


def _load_cuda() -> None:
    global _cuda_loaded, _cuda_reason
    if not torch.backends.cuda.is_built():
        _cuda_reason = "this torch has no CUDA"
        return
    chosen = os.environ.get("SQUEEZELLM_HF_CUDA_LIBRARY")
    path = Path(chosen).absolute() if chosen else _installed(_CUDA_LIBRARY)
    note = _installed(_WHY_NO_CUDA)
    if path is not None:
        try:
            torch.ops.load_library(path)
            _cuda_loaded = True
            _warn_if_old("CUDA")
            return
        except OSError as error:
            _cuda_reason = str(error)
    elif note is not None:
        _cuda_reason = note.read_text().strip()
    else:
        _cuda_reason = f"{_CUDA_LIBRARY} was not built when squeezellm_hf was installed"
    if torch.cuda.device_count() > 0:
        warnings.warn(
            f"squeezellm_hf runs on its slow PyTorch reference on CUDA devices: {_cuda_reason}. "
            "To build the kernels, reinstall squeezellm_hf where a CUDA torch and nvcc are.",
            stacklevel=3,
        )


def load() -> None:
    """Register the compiled kernels with torch. Without them, warn; a second call does nothing.

    Raises:
        ValueError: if SQUEEZELLM_HF_ISA names an instruction set that cannot run here.
    """
    global _handle, _reason, _cuda_reason
    if _handle is not None or _reason is not None:
        return
    if os.environ.get("SQUEEZELLM_HF_NATIVE", "1") == "0":
        _reason = _cuda_reason = "switched off by SQUEEZELLM_HF_NATIVE=0"
        return
    _load_cuda()
    try:
        _handle = _open()
    except OSError as error:
        _reason = str(error)
        warnings.warn(
            f"squeezellm_hf runs on its slow PyTorch reference: {_reason}. {_HOW}.", stacklevel=2
        )
        return
    _warn_if_old("CPU")
    set_instruction_set(None)


def set_instruction_set(name: str | None) -> None:
    """Run the kernels on another instruction set, in all threads from their next call on.

    Args:
        name: one of ``status().available``; None for SQUEEZELLM_HF_ISA or else the fastest.

    Raises:
        ValueError: if the machine cannot run it.
        RuntimeError: if the kernels are not loaded.
    """
    if _handle is None:
        raise RuntimeError(f"the native kernels are not loaded: {_reason}")
    error = _handle.squeezellm_hf_select_instruction_set((name or "").encode())
    if error is not None:
        raise ValueError(error.decode())


def status() -> NativeStatus:
    """What became of the compiled kernels."""
    if _handle is None:
        return NativeStatus(False, _library(), _reason, None, (), _cuda_loaded, _cuda_reason)
    return NativeStatus(
        loaded=True,
        path=_library(),
        reason=None,
        instruction_set=_handle.squeezellm_hf_instruction_set().decode(),
        available=tuple(_handle.squeezellm_hf_available_instruction_sets().decode().split()),
        cuda_loaded=_cuda_loaded,
        cuda_reason=_cuda_reason,
    )
