"""Tell transformers of our configuration and our quantizer."""

from transformers.quantizers import auto

from squeezellm_hf.integration.config import QUANT_METHOD, SqueezeLLMConfig
from squeezellm_hf.integration.quantizer import SqueezeLLMHfQuantizer


def register() -> None:
    """Register once; a second call changes nothing."""
    if QUANT_METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        auto.register_quantization_config(QUANT_METHOD)(SqueezeLLMConfig)
    if QUANT_METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantizer(QUANT_METHOD)(SqueezeLLMHfQuantizer)
    # A fixed tuple in transformers: a class that is not in it has its loading-time fields ignored
    # when it is passed for a repository that is quantized already.
    if SqueezeLLMConfig not in auto.LOADING_ATTRIBUTES_CONFIG_TYPES:
        auto.LOADING_ATTRIBUTES_CONFIG_TYPES += (SqueezeLLMConfig,)
