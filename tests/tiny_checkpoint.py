"""The tiny Llama with a tokenizer of bytes, as an ordinary checkpoint."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.conftest import tiny_llama

CHAT = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}assistant: "


def byte_level() -> Tokenizer:
    """One token a byte, and nothing else."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """The same with one for padding, on the left, and a chat template."""
    tokenizer = byte_level()
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", padding_side="left", model_max_length=128
    )
    fast.chat_template = CHAT
    return fast


def write(folder: Path, **changes: object) -> Path:
    """Write model and tokenizer; ``changes`` to the model's config."""
    tokenizer = byte_tokenizer()
    model = tiny_llama(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=None,
        **changes,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
