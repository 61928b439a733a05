"""What a model card says of a model's task, and how to load it."""

from typing import Any

from squeezellm_hf.integration.classes import class_names

_TASKS = {
    "automatic-speech-recognition": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "fill-mask": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "text-classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "token-classification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "image-text-to-text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
}
_GENERATE = "text-generation"

_TEXT_GENERATION = """
from transformers import pipeline

generate = pipeline("text-generation", model="{repository}")
print(generate("The capital of France is", max_new_tokens=20)[0]["generated_text"])
"""
_ANY = """
from transformers import {kind}

model = {kind}.from_pretrained("{repository}")
"""


def task(model: Any) -> str | None:
    """The Hub's name for what a model does, or None if it is none of the common ones."""
    name = type(model).__name__
    encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
    for title, mapping in _TASKS.items():
        # Some encoder-decoder models are listed among the masked ones.
        if name in class_names(mapping) and not (encoder_decoder and title == "fill-mask"):
            return title
    return _GENERATE if model.can_generate() and not encoder_decoder else None


def usage(model: Any, repository: str) -> str:
    """Python that loads the model from ``repository``."""
    body = _TEXT_GENERATION if task(model) == _GENERATE else _ANY
    return body.format(repository=repository, kind=type(model).__name__).strip()
