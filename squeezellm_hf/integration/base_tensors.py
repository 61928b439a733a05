"""Some tensors of a model, without the rest of it in memory."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM


def read_base_tensors(
    name: str, names: Collection[str], skip: Collection[str], **options: Any
) -> dict[str, Tensor]:
    """Read tensors of a base model under the names that its modules have in memory.

    Args:
        name: Hub id or folder of a causal language model.
        names: which tensors.
        skip: modules whose weights stay on disk.
        options: of ``from_pretrained``, as revision, token and trust_remote_code.

    Returns:
        The tensors in the dtypes of the checkpoint; without those that the model has not.

    Raises:
        OSError: if the model cannot be found.
    """
    config = AutoConfig.from_pretrained(name, **options)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(
            config, trust_remote_code=options.get("trust_remote_code", False)
        )
    # Disk offload refers to the safetensors files as they lie, so that nothing is read for it. A
    # device for every single module: of nested entries accelerate follows the outer one.
    device_map = {
        module: "disk" if module in skip else "cpu"
        for module, layer in skeleton.named_modules()
        if module and _owns_tensors(layer)
    }
    model = AutoModelForCausalLM.from_pretrained(
        name, dtype="auto", device_map=device_map, **options
    )
    tensors = model.state_dict(keep_vars=True)
    return {key: tensors[key].detach() for key in names if key in tensors}


def _owns_tensors(layer: nn.Module) -> bool:
    own = (*layer.parameters(recurse=False), *layer.buffers(recurse=False))
    return bool(own) or not any(layer.children())
