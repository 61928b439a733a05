"""Models to test on: a tiny Llama with random weights, as an ordinary checkpoint."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 128
LINEARS_PER_BLOCK = 7
BLOCKS = 2


def tiny_llama(**changes: object) -> LlamaForCausalLM:
    """A Llama of two blocks, 14 linear layers beside its output head, the same every time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "intermediate_size": 160,
            "num_hidden_layers": BLOCKS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "pad_token_id": 0,
            **changes,
        }
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():  # The usual initialization is so small that rounding hardly shows.
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    return model


@pytest.fixture
def model() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama on disk."""
    path = tmp_path_factory.mktemp("tiny") / "llama"
    tiny_llama().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def token_ids() -> torch.Tensor:
    """Calibration data that needs no tokenizer."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, VOCABULARY, (4, 32), generator=generator)
