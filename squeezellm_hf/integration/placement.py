"""Where a model is quantized, and where it goes afterwards."""

from typing import Any

import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import get_balanced_memory

# Attribute of a layer that holds a part of the features: its style and device mesh.
PARALLEL_STYLE = "_squeezellm_parallel"


def is_tensor_parallel(model: Any) -> bool:
    """Whether the model is loaded for more than one tensor-parallel process."""
    config = getattr(model.config, "distributed_config", None)
    return (getattr(config, "tp_size", None) or 1) > 1


def quantization_device(device_map: Any) -> torch.device:
    """The first accelerator that ``device_map`` names, else the CPU.

    ``device_map`` is what was passed to ``from_pretrained``: None, a device, "auto" and its
    relatives, or a dictionary from module names to devices.
    """
    if isinstance(device_map, dict):
        targets = [target for target in device_map.values() if target not in ("cpu", "disk")]
        return _device(targets[0]) if targets else torch.device("cpu")
    if device_map is None:
        return torch.device("cpu")
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return torch.device("cpu") if accelerator is None else torch.device(accelerator.type, 0)
    return _device(device_map)


def place(model: Any, device_map: Any) -> None:
    """Put ``model``, which is on its :func:`quantization_device`, as ``device_map`` says."""
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        if torch.accelerator.device_count() < 2:
            return
        split = getattr(model, "_no_split_modules", None)
        memory = get_balanced_memory(
            model, no_split_module_classes=split, low_zero=device_map == "balanced_low_0"
        )
        model.to("cpu")
        device_map = infer_auto_device_map(model, max_memory=memory, no_split_module_classes=split)
    if isinstance(device_map, dict) and len(set(map(str, device_map.values()))) > 1:
        model.to("cpu")
        dispatch_model(model, device_map)


def _device(target: Any) -> torch.device:
    if isinstance(target, int):
        accelerator = torch.accelerator.current_accelerator()
        return torch.device("cpu" if accelerator is None else accelerator.type, target)
    return torch.device(target)
