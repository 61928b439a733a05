"""One quantization run: prepared while the model may still be on meta, then carried out."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer
from transformers.quantizers.base import HfQuantizer

from squeezellm_hf.calibration import datasets
from squeezellm_hf.integration.config import SqueezeLLMConfig
from squeezellm_hf.integration.record import record_layers
from squeezellm_hf.pipeline import Plan, make_plan, quantize_modules


@dataclass
class Run:
    """What is to be done to a model.

    Attributes:
        config: gets the record of the result.
        plan: parameters by module name.
        sequences: token ids, int64 [n_samples, sequence_length], or None without calibration.
    """

    config: SqueezeLLMConfig
    plan: Plan
    sequences: Tensor | None

    def quantize(self, model: Any, progress: bool = True) -> None:
        """Quantize ``model`` in place and record in ``config`` what a reload needs."""
        layers = quantize_modules(
            model, self.plan, self.sequences, work_dir=self.config.work_dir, progress=progress
        )
        record_layers(self.config, layers)


def prepare(model: Any, config: SqueezeLLMConfig, tokenizer: Any = None) -> Run:
    """Choose the layers and read the calibration data; ``model`` may be on meta.

    Raises:
        ValueError: if the model has nothing to quantize, or the data does not suffice.
    """
    skip = HfQuantizer.get_modules_to_not_convert(
        model,
        list(config.modules_to_not_convert or []),
        getattr(model, "_keep_in_fp32_modules", None),
        add_default_skips=True,
    )
    plan = make_plan(model, config.parameters, skip=skip, overrides=config.overrides)
    return Run(config, plan, _sequences(model, config, tokenizer))


def _sequences(model: Any, config: SqueezeLLMConfig, tokenizer: Any) -> Tensor | None:
    if config.dataset is None:
        return None
    tokenizer = tokenizer if tokenizer is not None else config.tokenizer
    text = not datasets.is_token_ids(config.dataset)
    if text and (tokenizer is None or isinstance(tokenizer, str)):
        tokenizer = _load_tokenizer(tokenizer or model.config.name_or_path)
    sequences = datasets.token_batches(
        config.dataset,
        tokenizer,
        n_samples=config.n_samples,
        sequence_length=config.sequence_length,
        seed=config.seed,
        split=config.dataset_split,
        text_column=config.text_column,
        vocab_size=model.get_input_embeddings().num_embeddings,
    )
    return torch.as_tensor(sequences)


def _load_tokenizer(name: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:
        raise ValueError(
            f"calibration on text needs a tokenizer, and none could be loaded from {name!r} "
            f"({error}); pass SqueezeLLMConfig(tokenizer=...), or dataset= as token ids, or "
            "dataset=None to quantize without calibration"
        ) from error
