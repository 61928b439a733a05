"""``HfQuantizer`` of SqueezeLLM: the only file that knows transformers' loading hooks.

Works from transformers 5.17 on; arguments that came or went since are taken as ``**kwargs``.
"""

import importlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging

from squeezellm_hf.integration import autoload, expand, saving
from squeezellm_hf.integration.checkpoint import check_files, check_nnz
from squeezellm_hf.integration.config import TABLE_DTYPES, SqueezeLLMConfig
from squeezellm_hf.integration.output_head import forget_ties
from squeezellm_hf.integration.placement import is_tensor_parallel, place, quantization_device
from squeezellm_hf.integration.run import Run, prepare
from squeezellm_hf.nn import Experts, SqueezeLLMLinear, grouping
from squeezellm_hf.nn.backend import set_backend
from squeezellm_hf.nn.mapped import MappedFiles


class SqueezeLLMHfQuantizer(HfQuantizer):
    """Quantizes a model once it is loaded, or builds the skeleton for a quantized checkpoint."""

    requires_calibration = False
    quantization_config: SqueezeLLMConfig
    pre_quantized: bool

    def __init__(self, quantization_config: SqueezeLLMConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._device_map: Any = None
        self._run: Run | None = None
        self._has_experts = False

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Raise ValueError for a checkpoint that says to be quantized but names no module."""
        if self.pre_quantized and not self.quantization_config.modules:
            raise ValueError(
                "quantization_config of the checkpoint has no modules: nothing in it is quantized"
            )

    def update_device_map(self, device_map: Any) -> Any:
        """Load on the CPU what is still to be quantized; it is placed when that is done."""
        if self.pre_quantized:
            return device_map
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError(
                "device_map names 'disk', which a model that is being quantized cannot be "
                "offloaded to: quantize and save it, then load it with this device_map"
            )
        self._device_map = device_map
        return {"": "cpu"}

    def update_weight_conversions(self, weight_conversions: Any, model: Any = None) -> Any:
        """Our tensors are loaded as they are stored."""
        return weight_conversions

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        """True for the tensors of a quantized checkpoint: we judge their shapes ourselves."""
        module = param_name.rpartition(".")[0]
        return self.pre_quantized and isinstance(model.get_submodule(module), SqueezeLLMLinear)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if not self.pre_quantized:
            if is_tensor_parallel(model):
                raise ValueError(
                    "tp_plan needs a model that is quantized already: quantize and save it in one "
                    "process, then load it with tp_plan"
                )
            # Everything that can be wrong with the request is found before the weights are read.
            # (Transformers calls this with meta as the default device.)
            with torch.device("cpu"):
                self._run = prepare(model, self.quantization_config)
            return model
        if is_tensor_parallel(model) and self.quantization_config.dequantize:
            raise ValueError("dequantize=True cannot be used with tp_plan")
        records = self.quantization_config.records
        expand.expand(model, _prefixes(records).__contains__)
        for name, record in records.items():
            linear = _linear(model, name)
            if record.nnz > linear.in_features * linear.out_features:
                raise ValueError(
                    f"quantization_config.modules[{name!r}].nnz={record.nnz} is more than the "
                    f"{linear.out_features} x {linear.in_features} weights of the module"
                )
            layer = SqueezeLLMLinear(
                linear.in_features,
                linear.out_features,
                record.bits,
                nnz=record.nnz,
                bias=linear.bias is not None,
                table_dtype=TABLE_DTYPES[record.table_dtype],
                dtype=linear.weight.dtype,
                device="meta",
            )
            model.set_submodule(name, layer)
        forget_ties(model, records)
        if kwargs.get("checkpoint_files"):
            check_files(kwargs["checkpoint_files"], records)
        if is_tensor_parallel(model):
            _tensor_parallel().use_our_styles(model)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.pre_quantized:
            records = self.quantization_config.records
            parts: set[str] = set()
            if is_tensor_parallel(model):
                parts = _tensor_parallel().localize(model, records)
            mapped = MappedFiles()
            for name, record in records.items():
                layer = model.get_submodule(name)
                layer.requires_grad_(False)
                layer.align(mapped)  # first: what reads a mapped tensor leaves it in memory
                layer.check(f"{name}.")
                if name not in parts:
                    check_nnz(layer.nnz, record, name)
            if is_tensor_parallel(model):
                self._prepare_layers(model)
                saving.refuse(model, "a model loaded with tp_plan holds a part of each layer")
                return model
            if self.quantization_config.dequantize:
                return self._dequantize(model)
        else:
            if self._run is None:
                raise RuntimeError("the model was not preprocessed by this quantizer")
            device = quantization_device(self._device_map)
            progress = logging.is_progress_bar_enabled()
            if self._run.blockwise(model, device):
                self._run.quantize(model, progress, block_device=device)
                model.to(device)
            else:
                model.to(device)
                self._run.quantize(model, progress)
            self._run = None
            place(model, self._device_map)
            self.pre_quantized = True
        self.attach(model)
        return model

    def attach(self, model: Any) -> None:
        """Take charge of a model whose layers are quantized."""
        self._prepare_layers(model)
        saving.attach(model)

    def _prepare_layers(self, model: Any) -> None:
        set_backend(model, self.quantization_config.backend)
        self._has_experts = any(isinstance(module, Experts) for module in model.modules())
        grouping.install()

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        if is_tensor_parallel(model):
            raise ValueError(
                "a model loaded with tp_plan holds a part of each layer and cannot be dequantized"
            )
        names = list(self.quantization_config.records)
        for name in names:
            if any(tensor.is_meta for tensor in model.get_submodule(name).parameters()):
                raise ValueError(
                    f"{name} is offloaded and cannot be dequantized: load the model without "
                    "offload (device_map=None) to dequantize it"
                )
        if not isinstance(dtype, torch.dtype):
            dtype = model.dtype  # save_pretrained turns the config's dtype into a string
        for name in names:
            layer = model.get_submodule(name)
            if isinstance(layer, SqueezeLLMLinear):
                model.set_submodule(name, layer.to_linear(dtype))
        expand.fold(model)
        saving.detach(model)
        return model

    def forget_plain_layers(self, model: Any) -> None:
        """Take layers that have become plain ones out of the record of ``model``.

        With no quantized layer left, it is an ordinary model.
        """
        self.quantization_config.modules = {
            name: record
            for name, record in (self.quantization_config.modules or {}).items()
            if isinstance(model.get_submodule(name), SqueezeLLMLinear)
        }
        expand.fold(model)
        if not self.quantization_config.modules:
            saving.detach(model)
            self.remove_quantization_config(model)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Saved as standard safetensors."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters may be trained on top: the ops have a backward pass."""
        return True

    @property
    def is_compileable(self) -> bool:
        """The ops have fake kernels and cause no graph break; which experts run depends on data."""
        # ``generate`` asks before it compiles, maybe in another thread than the one that loaded.
        grouping.install()
        return not self._has_experts


def _prefixes(names: Iterable[str]) -> set[str]:
    """The names, and those of all modules around them."""
    parts = [name.split(".") for name in names]
    return {".".join(part[:count]) for part in parts for count in range(1, len(part) + 1)}


def _tensor_parallel() -> Any:
    """The module, imported where it is used: a torch without distributed has not what it needs."""
    return importlib.import_module("squeezellm_hf.integration.tensor_parallel")


def _linear(model: nn.Module, name: str) -> nn.Linear:
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise ValueError(
            f"quantization_config.modules names {name!r}, which {type(model).__name__} has not"
        ) from error
    if not isinstance(module, nn.Linear):
        raise ValueError(
            f"quantization_config.modules names {name!r}, which in {type(model).__name__} is a "
            f"{type(module).__name__}, not a linear layer"
        )
    return module


# Importing transformers above may have run its side of the registration before the class existed.
autoload.install()
