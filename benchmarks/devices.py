"""Hold a quantized model on one device against itself in fp32 on another, usually the CPU.

    python benchmarks/devices.py record CHECKPOINT expected.json
    python benchmarks/devices.py compare CHECKPOINT expected.json --device cuda --json devices.json

``record`` generates greedily from a few prompts and measures the perplexity of a text (the topics
of Python's own help, unless a file is given) with fp32 activations. ``compare`` does so on another
machine or device: the same text has to come out with fp32 activations, and the perplexity with
fp16 and bf16 activations within 0.3 %, for every number of tokens that the model sees at a time
and so for every kind of kernel. It exits with 1 if that is not so. Token ids are recorded, so
``compare`` needs no tokenizer.
"""

import argparse
import json
import math
import pydoc_data.topics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import hardware
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from squeezellm_hf.evaluation.perplexity import PerplexityMeter

PROMPTS = [
    "The capital of France is",
    "Water boils at a lower temperature on a mountain because",
    "Once upon a time, a girl found a small door behind the old oak tree.",
]
NEW_TOKENS = 64
WINDOW = 512
LIMIT = 0.003  # of the perplexity
# Tokens at a time, and how many windows of text: the fewer tokens, the longer it takes.
CHUNKS = {512: 8, 128: 8, 32: 8, 8: 8, 1: 2}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Comparison:
    """Perplexity of the first windows of the text, ``tokens`` at a time, against fp32's."""

    dtype: str
    tokens: int
    windows: int
    perplexity: float
    expected: float

    @property
    def difference(self) -> float:
        """Relative."""
        return self.perplexity / self.expected - 1


def load(checkpoint: str, dtype: str, device: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=DTYPES[dtype])
    return model.to(device).eval()


def greedy(model: Any, prompt: list[int]) -> list[int]:
    """The prompt and what follows."""
    ids = torch.tensor([prompt], device=model.device)
    text = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS, pad_token_id=0,
    )  # fmt: skip
    return text[0].tolist()


def window_nll(model: Any, window: Tensor, tokens: int) -> float:
    """Mean negative log-likelihood of a window that the model reads ``tokens`` at a time."""
    meter = PerplexityMeter()
    cache = None
    logits = []
    for chunk in window.split(tokens):
        output = model(chunk[None], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits[0])
    meter.update(torch.cat(logits)[:-1], window[1:])
    return meter.result().nll


def nlls(model: Any, text: Tensor, tokens: int, windows: int) -> list[float]:
    return [window_nll(model, w, tokens) for w in text.to(model.device).split(WINDOW)[:windows]]


def perplexity(of_windows: list[float]) -> float:
    return math.exp(sum(of_windows) / len(of_windows))


def record(args: argparse.Namespace) -> None:
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    text = args.text.read_text() if args.text else "\n\n".join(pydoc_data.topics.topics.values())
    windows = max(CHUNKS.values())
    ids = tokenizer(text)["input_ids"][: windows * WINDOW]
    model = load(args.checkpoint, "fp32", args.device)
    continuations = [greedy(model, tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]
    of_windows = nlls(model, torch.tensor(ids), WINDOW, windows)
    document = {
        "hardware": hardware.stamp(args.device),
        "prompt_lengths": [len(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS],
        "continuations": continuations,
        "text": ids,
        "nlls": of_windows,
    }
    args.expected.write_text(json.dumps(document) + "\n")
    for continuation in continuations:
        print(tokenizer.decode(continuation))
    print(f"perplexity {perplexity(of_windows):.4f}")


def compare(args: argparse.Namespace) -> bool:
    expected = json.loads(args.expected.read_text())
    torch.set_float32_matmul_precision("highest")
    model = load(args.checkpoint, "fp32", args.device)
    same = []
    for length, continuation in zip(
        expected["prompt_lengths"], expected["continuations"], strict=True
    ):
        same.append(greedy(model, continuation[:length]) == continuation)
    print(f"greedy text with fp32 activations: {sum(same)} of {len(same)} the same", flush=True)

    comparisons = []
    text = torch.tensor(expected["text"])
    for dtype in args.dtypes:
        model = load(args.checkpoint, dtype, args.device)
        for tokens in args.chunks:
            windows = CHUNKS.get(tokens, 1)
            comparison = Comparison(
                dtype, tokens, windows,
                perplexity(nlls(model, text, tokens, windows)),
                perplexity(expected["nlls"][:windows]),
            )  # fmt: skip
            comparisons.append(comparison)
            print(
                f"{dtype}, {tokens:3} tokens at a time: perplexity {comparison.perplexity:.4f}, "
                f"{comparison.difference:+.3%} of {comparison.expected:.4f} "
                f"({windows} x {WINDOW} tokens)",
                flush=True,
            )
    if args.json is not None:
        document = {
            "hardware": hardware.stamp(args.device),
            "expected_from": expected["hardware"],
            "same_text": same,
            "perplexities": [
                asdict(comparison) | {"difference": comparison.difference}
                for comparison in comparisons
            ],
        }
        args.json.write_text(json.dumps(document, indent=2) + "\n")
    return all(same) and all(abs(comparison.difference) < LIMIT for comparison in comparisons)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=["record", "compare"])
    parser.add_argument("checkpoint", help="a quantized model")
    parser.add_argument("expected", type=Path, help="JSON that record writes and compare reads")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES),
                        help="of activations, to compare")  # fmt: skip
    parser.add_argument("--chunks", nargs="+", type=int, default=list(CHUNKS),
                        help="tokens at a time, to compare")  # fmt: skip
    parser.add_argument("--text", type=Path, help="to record the perplexity of")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(arguments)
    with torch.no_grad():
        if args.action == "record":
            record(args)
        elif not compare(args):
            sys.exit(1)


if __name__ == "__main__":
    main()
