"""Quantize a mixture of experts, and look at what became of its experts.

    python examples/moe.py                                   a tiny random model, in seconds
    python examples/moe.py allenai/OLMoE-1B-7B-0924 OLMoE-3bit

A router sends each token to a few experts: the more text calibration sees, the fewer experts it
misses. Attention is a small part of such a model, and sees every token: it gets more bits.
"""

import sys
from collections import Counter
from pathlib import Path
from tempfile import mkdtemp

import torch
from transformers import AutoModelForCausalLM, OlmoeConfig

from squeezellm_hf import SqueezeLLMConfig
from squeezellm_hf.nn import Experts

PROMPT = [[5, 17, 42, 8]]


def tiny_checkpoint() -> str:
    """A random OLMoE: 16 experts in each of 2 blocks, 4 of them for a token."""
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_experts=16, num_experts_per_tok=4, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    path = mkdtemp(prefix="tiny-olmoe-")
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def main(source: str | None = None, target: str = "") -> None:
    """Quantize, save, reload, and count which experts a few tokens use."""
    config = SqueezeLLMConfig(
        bits=3,
        overrides={"self_attn": {"bits": 4}},
        # Random token ids are enough for a random model.
        dataset="builtin" if source else torch.randint(3, 256, (16, 64)),
        n_samples=64 if source else 16,
        sequence_length=512 if source else 64,
    )
    source = source or tiny_checkpoint()
    target = target or f"{source}-3bit"
    AutoModelForCausalLM.from_pretrained(
        source, dtype="auto", device_map="auto", quantization_config=config
    ).save_pretrained(target)
    size = sum(path.stat().st_size for path in Path(target).glob("*.safetensors"))
    print(f"{target}: {size / 1e6:,.1f} MB")

    # Each expert is two linear layers; their tensors are model...experts.<number>.<layer>.qweight.
    model = AutoModelForCausalLM.from_pretrained(target, device_map="auto")
    used: Counter[str] = Counter()
    for block, experts in [item for item in model.named_modules() if isinstance(item[1], Experts)]:
        for number, expert in enumerate(experts):
            expert[experts.down].register_forward_hook(
                lambda *_, name=f"{block}.{number}": used.update([name])
            )
    model.generate(torch.tensor(PROMPT, device=model.device), max_new_tokens=8, do_sample=False)
    total = sum(len(module) for module in model.modules() if isinstance(module, Experts))
    print(f"8 tokens of text used {len(used)} of {total} experts")


if __name__ == "__main__":
    main(*sys.argv[1:])
