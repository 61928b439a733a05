"""The tokenizer of a run."""

from typing import Any

from transformers import AutoTokenizer

from squeezellm_hf.calibration import datasets


def tokenizer_for(dataset: Any, tokenizer: Any, model: Any) -> Any:
    """``tokenizer``, or the one of that name, or the model's own; any for token ids.

    Raises:
        ValueError: if one is needed and none can be loaded.
    """
    text = not datasets.is_token_ids(dataset)
    if text and (tokenizer is None or isinstance(tokenizer, str)):
        return _load_tokenizer(tokenizer or model.config.name_or_path)
    return tokenizer


def _load_tokenizer(name: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:
        raise ValueError(
            f"calibration on text needs a tokenizer, and none could be loaded from {name!r} "
            f"({error}); pass SqueezeLLMConfig(tokenizer=...), or dataset= as token ids, or "
            "dataset=None to quantize without calibration"
        ) from error
