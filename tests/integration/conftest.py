"""The real model, quantized once for all tests that need it."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.smollm2 import build
from squeezellm_hf import SqueezeLLMConfig

PROMPT = "The capital of France is"
CONFIG = {"preset": "fast", "bits": 4, "n_samples": 4, "sequence_length": 256}


@dataclass
class SavedSmolLM2:
    """A quantized checkpoint, and the model that it was saved from.

    Attributes:
        path: of the checkpoint, with its tokenizer.
        text: what the model generated before it was saved.
        tensors: what it held then.
    """

    path: Path
    text: str
    tensors: dict[str, torch.Tensor]


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as an ordinary checkpoint."""
    pytest.importorskip("gguf")
    try:
        return build(tmp_path_factory.mktemp("smollm2") / "original")
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def smollm2_quantized(smollm2: Path) -> SavedSmolLM2:
    """The same in 4 bits."""
    path = smollm2.parent / "quantized"
    model = quantize(smollm2, path.parent / "work")
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    text = generate(model, tokenizer)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return SavedSmolLM2(path, text, model.state_dict())


def quantize(original: Path, work_dir: Path):
    config = SqueezeLLMConfig(**CONFIG, work_dir=str(work_dir))
    return AutoModelForCausalLM.from_pretrained(
        original, dtype=torch.bfloat16, quantization_config=config
    )


def generate(model, tokenizer) -> str:
    ids = tokenizer(PROMPT, return_tensors="pt")
    output = model.generate(**ids, max_new_tokens=48, do_sample=False)
    return tokenizer.decode(output[0], skip_special_tokens=True)
