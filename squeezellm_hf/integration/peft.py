"""LoRA on quantized layers, through PEFT.

``get_peft_model(model, LoraConfig(...))`` works on a quantized model as on any other: ``autoload``
calls :func:`install` when PEFT is imported. With a layer's quantized weight W, frozen, and the
adapter's A and B (arXiv 2106.09685)::

    y = x W^T + scaling * (x A^T) B^T

Nothing can be added to W in place: a sum would need another table. ``merge_and_unload`` therefore
puts a plain linear layer in its place.
"""

import dataclasses
import functools
import sys
from typing import Any

import torch
from peft.tuners import tuners_utils
from peft.tuners.lora import layer as lora_layer
from peft.tuners.lora.model import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import other
from torch import Tensor, nn

from squeezellm_hf.integration import autoload
from squeezellm_hf.integration.expand import peft as expand_peft
from squeezellm_hf.integration.placement import PARALLEL_STYLE
from squeezellm_hf.integration.quantizer import SqueezeLLMHfQuantizer
from squeezellm_hf.nn import SqueezeLLMLinear

# The others read or change the weight of the base layer.
INITIALIZATIONS = (True, False, "gaussian")


# "Linear" in the name is how PEFT knows a layer that "all-linear" means for a second adapter.
class SqueezeLLMLoraLinear(lora_layer.Linear):
    """A LoRA adapter, or several, on a :class:`SqueezeLLMLinear`."""

    # Of the layer that a merge gives. Set before it: the model knows its dtype, the layer does not.
    merged_dtype: torch.dtype = torch.float32

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        if hasattr(base_layer, PARALLEL_STYLE):
            raise ValueError(
                "a model loaded with tp_plan holds a part of each layer and cannot have adapters; "
                "load it in one process, without tp_plan"
            )
        if kwargs.get("parameter_name") is not None:
            raise ValueError(
                f"target_parameters names {kwargs['parameter_name']!r} of a quantized layer, which "
                "holds packed indices and tables; name the layer in target_modules"
            )
        super().__init__(base_layer, adapter_name, **kwargs)
        # dequantize() gives [out_features, in_features], whatever layer was quantized.
        self.fan_in_fan_out = False

    @property
    def weight(self) -> Tensor:
        """Of the base layer, for models that read it; PEFT would show them packed indices."""
        weight: Tensor = self.get_base_layer().weight
        return weight

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any
    ) -> None:
        """Add an adapter.

        Raises:
            ValueError: for a variant of LoRA or an initialization that needs the base weight.
        """
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            if (field.metadata.get("is_lora_variant") or field.name == "use_qalora") and value:
                raise ValueError(
                    f"LoraConfig.{field.name}={value!r} is not supported on SqueezeLLM layers, "
                    "only plain LoRA is; leave it out, or dequantize() the model first"
                )
        if config.init_lora_weights not in INITIALIZATIONS:
            raise ValueError(
                f"LoraConfig.init_lora_weights={config.init_lora_weights!r} is not supported on "
                f"SqueezeLLM layers; one of {INITIALIZATIONS} is needed, or a model after "
                "dequantize()"
            )
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: a quantized weight cannot hold the sum.

        Raises:
            ValueError: always, unless there is nothing to merge.
        """
        if check_adapters_to_merge(self, adapter_names):
            raise ValueError(
                "a LoRA adapter cannot be merged into a quantized weight; merge_and_unload() "
                "gives a model whose adapted layers are plain (dequantized) linear layers, and "
                "save_pretrained() of the adapter keeps the base quantized"
            )

    @torch.no_grad()
    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The quantized layer, or with ``merge`` a plain one: W + scaling * B A, summed in fp32.

        Args:
            merge: whether to merge.
            safe_merge: whether to check that the result is finite.
            adapter_names: what to merge; default: the active adapters.

        Raises:
            ValueError: if an adapter has a bias and the layer none, or for values not finite.
        """
        base = self.get_base_layer()
        wanted = check_adapters_to_merge(self, adapter_names) if merge else []
        names = [name for name in wanted if name in self.lora_A]
        if not names:
            return base
        linear = base.to_linear(torch.float32)
        for name in names:
            linear.weight += self.get_delta_weight(name)
            if self.lora_bias[name]:
                if linear.bias is None:
                    raise ValueError(
                        f"adapter {name!r} has lora_bias=True on a layer without bias, so it "
                        "cannot be merged"
                    )
                linear.bias += self.lora_B[name].bias * self.scaling[name]
            if safe_merge and not all(bool(t.isfinite().all()) for t in linear.parameters()):
                raise ValueError(f"merging adapter {name!r} gives values that are not finite")
        return linear.to(self.merged_dtype)


def install() -> None:
    """Teach PEFT our layers; a second call changes nothing."""
    if LoraModel._create_new_module is _create_new_module:
        return
    LoraModel._create_new_module = staticmethod(_create_new_module)
    LoraModel._unload_and_optionally_merge = _unload_and_optionally_merge
    other.ModulesToSaveWrapper.check_module = _check_module_to_save
    expand_peft.install(LoraModel)
    replaced = {
        "_maybe_include_all_linear_layers": _include_all_linear,
        "prepare_model_for_kbit_training": prepare_model_for_kbit_training,
    }
    # Several of PEFT's modules have imported them by name already.
    for package, module in list(sys.modules.items()):
        for name in replaced if package.partition(".")[0] == "peft" else ():
            if name in vars(module):
                setattr(module, name, replaced[name])


_CREATE = LoraModel._create_new_module
_UNLOAD = LoraModel._unload_and_optionally_merge
_INCLUDE_ALL_LINEAR = tuners_utils._maybe_include_all_linear_layers
_PREPARE_FOR_TRAINING = other.prepare_model_for_kbit_training
_CHECK_MODULE_TO_SAVE = other.ModulesToSaveWrapper.check_module


@functools.wraps(_CREATE)
def _create_new_module(lora_config: Any, adapter_name: str, target: Any, **kwargs: Any) -> Any:
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if isinstance(base, SqueezeLLMLinear):
        return SqueezeLLMLoraLinear(target, adapter_name, config=lora_config, **kwargs)
    return _CREATE(lora_config, adapter_name, target, **kwargs)


@functools.wraps(_CHECK_MODULE_TO_SAVE)
def _check_module_to_save(self: Any) -> None:
    # PEFT would copy the module and ask for gradients of its packed indices.
    for name, module in self.original_module.named_modules():
        if isinstance(module, SqueezeLLMLinear):
            which = f"whose {name!r} is quantized" if name else "that is quantized"
            raise ValueError(
                f"modules_to_save names a {type(self.original_module).__name__} {which} and "
                "cannot be trained as a whole; name the layer in target_modules, or leave it out "
                "of the quantization with modules_to_not_convert"
            )
    _CHECK_MODULE_TO_SAVE(self)


@functools.wraps(_UNLOAD)
def _unload_and_optionally_merge(self: Any, *args: Any, **kwargs: Any) -> Any:
    dtype = getattr(self.model, "dtype", torch.float32)
    for module in self.model.modules():
        if isinstance(module, SqueezeLLMLoraLinear):
            module.merged_dtype = dtype
    model = _UNLOAD(self, *args, **kwargs)
    quantizer = getattr(model, "hf_quantizer", None)
    if isinstance(quantizer, SqueezeLLMHfQuantizer):
        quantizer.forget_plain_layers(model)
    return model


@functools.wraps(_INCLUDE_ALL_LINEAR)
def _include_all_linear(peft_config: Any, model: nn.Module) -> Any:
    wanted = getattr(peft_config, "target_modules", None)
    peft_config = _INCLUDE_ALL_LINEAR(peft_config, model)
    if not isinstance(wanted, str) or peft_config.target_modules is wanted:
        return peft_config
    head = getattr(model, "get_output_embeddings", lambda: None)()
    # Below an adapter lies its base layer, which PEFT has found by the adapter.
    adapted = [
        f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)
    ]
    peft_config.target_modules |= {
        name
        for name, module in model.named_modules()
        if isinstance(module, SqueezeLLMLinear)
        and module is not head
        and not name.startswith(tuple(adapted))
    }
    return peft_config


@functools.wraps(_PREPARE_FOR_TRAINING)
def prepare_model_for_kbit_training(
    model: Any,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """Freeze a quantized model and switch gradient checkpointing on.

    PEFT's own function, which serves all other models, would widen our tables to fp32, and leave
    checkpointing off.
    """
    if not any(isinstance(module, SqueezeLLMLinear) for module in model.modules()):
        return _PREPARE_FOR_TRAINING(
            model, use_gradient_checkpointing, gradient_checkpointing_kwargs, **kwargs
        )
    model.requires_grad_(False)
    if use_gradient_checkpointing:
        settings = gradient_checkpointing_kwargs or {}
        if settings.get("use_reentrant", True):
            model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
    return model


# Importing PEFT above may have run its side of the installation before the class existed.
autoload.install()
