"""Which code computes a model's quantized layers: compiled kernels, or plain PyTorch."""

from torch import nn

from squeezellm_hf.nn.linear import SqueezeLLMLinear
from squeezellm_hf.ops import lut_dequantize_reference, lut_linear_reference, native

BACKENDS = ("auto", "native", "reference")


def check_backend(backend: object) -> None:
    """Raise ValueError unless ``backend`` is one of ``BACKENDS``."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")


def set_backend(model: nn.Module, backend: str) -> None:
    """Choose what computes the quantized layers of ``model``, from the next call on.

    Args:
        model: with its layers where they are to run; layers on the meta device (offloaded to
            disk) are taken as they are.
        backend: "auto": compiled kernels, where they are loaded for the device of the input, and
            PyTorch elsewhere; "native": the same, but an error here where they are not loaded;
            "reference": plain PyTorch, slow, on every device.

    Raises:
        ValueError: for another ``backend``, or if "native" is not to be had.
    """
    check_backend(backend)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, SqueezeLLMLinear)}
    if backend == "native":
        for name, layer in layers.items():
            _check_native(name, layer.qweight.device.type)
    for layer in layers.values():
        for attribute, function in (
            ("_linear", lut_linear_reference),
            ("_dequantize", lut_dequantize_reference),
        ):
            layer.__dict__.pop(attribute, None)
            if backend == "reference":
                setattr(layer, attribute, function)


def _check_native(name: str, device: str) -> None:
    status = native.status()
    loaded = {"meta": True, "cpu": status.loaded, "cuda": status.cuda_loaded}.get(device, False)
    if not loaded:
        reasons = {"cpu": status.reason, "cuda": status.cuda_reason}
        raise ValueError(
            f"backend='native' is not to be had for {name} on the device {device}: "
            f"{reasons.get(device, 'there are kernels for cpu and cuda alone')}"
        )
