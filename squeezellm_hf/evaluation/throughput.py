"""Tokens per second and memory of a model that generates text."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Throughput:
    """Speed of `generate`, greedy, and memory.

    Attributes:
        prefill_tokens_per_s: Prompt tokens a second, up to the first new token.
        decode_tokens_per_s: New tokens a second behind the first, over the whole batch.
        memory_bytes: Bytes of the model's parameters and buffers.
        peak_memory_bytes: Most bytes that torch had allocated on the model's GPU while generating;
            None on a CPU.
    """

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    memory_bytes: int
    peak_memory_bytes: int | None


@torch.inference_mode()
def throughput(
    model: Any,
    input_ids: Tensor,
    *,
    new_tokens: int = 64,
    repeats: int = 3,
) -> Throughput:
    """Time `model.generate` on a prompt: the median of some runs, behind one to warm up.

    One run generates one token, another `new_tokens`; the difference is the time of
    new_tokens - 1 decoding steps. The end-of-text token does not end a run.

    Args:
        model: A causal language model of transformers, in evaluation mode.
        input_ids: Prompts of the same length, int64 [batch, n_tokens].
        new_tokens: Tokens to generate, >= 2.
        repeats: Runs of each kind, >= 1.

    Raises:
        ValueError: An argument is out of range.
    """
    if new_tokens < 2 or repeats < 1:
        raise ValueError(f"new_tokens={new_tokens}, repeats={repeats}: allowed are >= 2 and >= 1")
    if input_ids.dim() != 2 or not input_ids.numel():
        raise ValueError(f"input_ids have the shape {list(input_ids.shape)}, not [batch, n_tokens]")
    input_ids = input_ids.to(model.device)
    on_gpu = input_ids.device.type == "cuda"
    _seconds(model, input_ids, 2)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(input_ids.device)
    # Taken in turns, so that a slow moment of the machine does not fall on one kind only.
    runs = [
        (_seconds(model, input_ids, 1), _seconds(model, input_ids, new_tokens))
        for _ in range(repeats)
    ]
    prefill = statistics.median(first for first, _ in runs)
    whole = statistics.median(whole for _, whole in runs)
    batch, n_tokens = input_ids.shape
    # A clock too coarse for a tiny model must not give a negative speed.
    decode = max(whole - prefill, 1e-9)
    return Throughput(
        prefill_tokens_per_s=batch * n_tokens / prefill,
        decode_tokens_per_s=batch * (new_tokens - 1) / decode,
        memory_bytes=int(model.get_memory_footprint()),
        peak_memory_bytes=torch.cuda.max_memory_allocated(input_ids.device) if on_gpu else None,
    )


def _seconds(model: Any, input_ids: Tensor, new_tokens: int) -> float:
    synchronize = torch.cuda.synchronize if input_ids.device.type == "cuda" else (lambda: None)
    synchronize()
    start = time.perf_counter()
    model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        do_sample=False,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        pad_token_id=0,
    )
    synchronize()
    return time.perf_counter() - start
