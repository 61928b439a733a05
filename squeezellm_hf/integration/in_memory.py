"""Quantize a model that is in memory already."""

from typing import Any

import torch

from squeezellm_hf.integration.config import SqueezeLLMConfig
from squeezellm_hf.integration.quantizer import SqueezeLLMHfQuantizer
from squeezellm_hf.integration.run import prepare


def quantize_model(
    model: Any, tokenizer: Any, config: SqueezeLLMConfig | None = None, *, progress: bool = True
) -> Any:
    """Quantize a Transformers model in place, on the devices that it is on.

    Args:
        model: a ``PreTrainedModel`` that is not quantized yet.
        tokenizer: for the calibration data; may be None where ``config.dataset`` holds token ids
            or is None.
        config: default: 4 bits with the paper's sparse part.
        progress: show progress bars.

    Returns:
        ``model``, ready to generate, ``save_pretrained`` and ``push_to_hub``.

    Raises:
        ValueError: if the model is quantized already, is not in CPU memory though ``blockwise`` is
            set, has nothing to quantize, holds a weight that is not finite, or the calibration
            data does not suffice.
    """
    config = SqueezeLLMConfig() if config is None else config
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        method = quantizer.quantization_config.quant_method
        raise ValueError(
            f"the model is quantized already ({getattr(method, 'value', method)}); load the "
            "original, or rebuild it from its config and state_dict if it was dequantized"
        )
    run = prepare(model, config, tokenizer)
    run.quantize(model, progress, block_device=_block_device(model, config))
    mark_quantized(model, config)
    return model


def _block_device(model: Any, config: SqueezeLLMConfig) -> torch.device | None:
    """Where to compute block by block, if that is asked for."""
    if not config.blockwise:
        return None
    elsewhere = next((n for n, p in model.named_parameters() if p.device.type != "cpu"), None)
    if elsewhere is not None:
        raise ValueError(f"blockwise=True needs the model in CPU memory; {elsewhere} is not")
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def mark_quantized(model: Any, config: SqueezeLLMConfig) -> None:
    """Make a model with quantized layers what ``from_pretrained`` would have given.

    Args:
        model: a ``PreTrainedModel`` whose layers are quantized.
        config: with the record of these layers.
    """
    quantizer = SqueezeLLMHfQuantizer(config, pre_quantized=True)
    model.hf_quantizer = quantizer
    model.config.quantization_config = config
    model.quantization_method = config.quant_method
    model.is_quantized = True
    quantizer.attach(model)
