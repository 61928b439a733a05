"""What a model of Transformers is calibrated on, and for which objective: its own head's."""

import warnings
from typing import Any

from torch import Tensor

from squeezellm_hf.calibration import batches, datasets
from squeezellm_hf.calibration.objectives import (
    CausalLM,
    MaskedLM,
    Objective,
    Outputs,
    Sample,
    SampledLabels,
    Seq2SeqLM,
)
from squeezellm_hf.integration.classes import class_names
from squeezellm_hf.integration.config import SqueezeLLMConfig
from squeezellm_hf.integration.selection import head_name
from squeezellm_hf.integration.tokenizer import tokenizer_for

_DEFAULT_DATASET = "builtin"
_TEXT_INPUT = "input_ids"


def objective_for(model: Any, config: SqueezeLLMConfig, tokenizer: Any = None) -> Objective:
    """The objective that fits the head of ``model``, by its class.

    Next tokens for what has an output head and no encoder (also models that see or hear: text
    suffices for their text part), hidden tokens for masked language models, the second half of a
    text for an encoder-decoder with a head, sampled labels for classifiers, else the outputs.

    Args:
        model: a ``PreTrainedModel``, may be on meta.
        config: its seed counts.
        tokenizer: tells the mask token; may be None.
    """
    name, seed = type(model).__name__, config.seed
    encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
    if encoder_decoder and head_name(model) is not None:
        return Seq2SeqLM(seed)
    if not encoder_decoder and name in class_names("MODEL_FOR_MASKED_LM_MAPPING_NAMES"):
        mask = getattr(_tokenizer(model, config, tokenizer), "mask_token_id", None)
        return MaskedLM(seed, model.get_input_embeddings().num_embeddings, mask)
    classifiers = class_names(
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
        "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
        "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
        "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
    )
    other_loss = getattr(model.config, "problem_type", None) in (
        "regression",
        "multi_label_classification",
    )
    if name in classifiers and model.config.num_labels > 1 and not other_loss:
        return SampledLabels(seed)
    if not encoder_decoder and head_name(model) is not None:
        return CausalLM(seed)
    return Outputs(seed, encoder_decoder)


def calibration_samples(
    model: Any, config: SqueezeLLMConfig, tokenizer: Any = None, *, seed: int | None = None
) -> Tensor | list[Sample] | None:
    """The calibration data: token ids int64 [n_samples, sequence_length], or batches, or None.

    Args:
        model: a ``PreTrainedModel``, may be on meta.
        config: says which data, and how much of it.
        tokenizer: for texts. Default: the config's, or the model's own.
        seed: chooses the sequences, in place of the config's.

    Raises:
        ValueError: if the data does not suffice, or is text and the model does not read text. (Of
            the default data set that is a warning, and nothing is calibrated.)
    """
    dataset = config.dataset
    if dataset is None:
        return None
    if batches.is_batches(dataset):
        return list(batches.check_batches(dataset))
    if model.main_input_name != _TEXT_INPUT:
        message = (
            f"{type(model).__name__} reads {model.main_input_name}, which text does not give it; "
            "calibrate it on a list of batches, as SqueezeLLMConfig(dataset=[{"
            f'"{model.main_input_name}": tensor, ...}}, ...]), with "labels" where it has a loss'
        )
        if dataset != _DEFAULT_DATASET:
            raise ValueError(message)
        warnings.warn(
            f"{message}. It is quantized without calibration now: by k-means (codebook='kmeans'), "
            "and all weights count the same",
            stacklevel=2,
        )
        return None
    return datasets.token_batches(
        dataset,
        tokenizer_for(dataset, tokenizer, model),
        n_samples=config.n_samples,
        sequence_length=config.sequence_length,
        seed=config.seed if seed is None else seed,
        split=config.dataset_split,
        text_column=config.text_column,
        vocab_size=model.get_input_embeddings().num_embeddings,
    )


def _tokenizer(model: Any, config: SqueezeLLMConfig, tokenizer: Any) -> Any:
    """The tokenizer, if the data is text; of token ids, what was given."""
    if config.dataset is None or batches.is_batches(config.dataset):
        return tokenizer
    return tokenizer_for(config.dataset, tokenizer, model)
