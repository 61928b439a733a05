"""Quantizing a model block by block, each with the inputs that the quantized ones before give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from squeezellm_hf.calibration.hessian import Hessians, shared_inputs
from squeezellm_hf.evaluation.peers.peer import Stored


@torch.no_grad()
def quantize_blocks(
    model: Any,
    names: Sequence[str],
    sequences: Tensor,
    quantize: Callable[[Sequence[Tensor], Tensor], Sequence[Stored]],
    *,
    progress: bool = False,
) -> int:
    """Quantize all layers of a block at once, then go on to the next, in place.

    Args:
        model: A causal language model of transformers.
        names: Linear layers, all of them within the model's blocks.
        sequences: Token ids, int64 [n_samples, sequence_length].
        quantize: Given the weights of layers with the same inputs X, and X^T X, fp32
            [in_features, in_features].
        progress: Show a progress bar.

    Returns:
        Bits that are stored for all these weights.

    Raises:
        ValueError: There is no list of blocks that holds all layers, or a block's input is not
            the output of the one before.
    """
    prefix, blocks = _blocks(model, names)
    layers = {name: model.get_submodule(name) for name in names}
    shared = shared_inputs(model, layers, sequences[0])
    states, arguments = _first_inputs(model, blocks, sequences)
    n_bits = 0
    for index, block in enumerate(tqdm(blocks, desc="GPTQ", unit="block", disable=not progress)):
        inner = f"{prefix}.{index}."
        linears = {name: layer for name, layer in layers.items() if name.startswith(inner)}
        hessians = Hessians(linears, dict.fromkeys(linears, 0), shared)
        with ExitStack() as hooks:
            for hook in hessians.attach(1.0):
                hooks.callback(hook.remove)
            for state in states:
                block(state, **arguments[index])
        for name in hessians.sums:
            together = [linears[n] for n in linears if shared.get(n, n) == name]
            weights = [linear.weight for linear in together]
            for weight, stored in zip(
                weights, quantize(weights, hessians.of(name)[0]), strict=True
            ):
                weight.copy_(stored.weight)
                n_bits += stored.n_bits
        states = [_hidden(block(state, **arguments[index])) for state in states]
    return n_bits


def _blocks(model: nn.Module, names: Sequence[str]) -> tuple[str, nn.ModuleList]:
    found = [
        (prefix, module)
        for prefix, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and all(n.startswith(f"{prefix}.") for n in names)
    ]
    if not found:
        raise ValueError(f"{type(model).__name__} has no list of blocks that holds all its layers")
    return found[0]


class _EnoughError(Exception):
    """The first block's input is known."""


def _first_inputs(
    model: Any, blocks: nn.ModuleList, sequences: Tensor
) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Return the inputs of the first block, a sequence each, and each block's other arguments."""
    states: list[Tensor] = []
    arguments: list[dict[str, Any]] = []
    outputs: list[Tensor] = []

    def note(_: nn.Module, inputs: tuple[Any, ...], others: dict[str, Any]) -> None:
        others = dict(others)
        state = inputs[0] if inputs else others.pop("hidden_states")
        if len(inputs) > 1 or (outputs and not state.equal(outputs[-1])):
            raise ValueError(
                f"the blocks of {type(model).__name__} do not simply follow one another, which "
                "going through them one by one needs"
            )
        arguments.append(others)

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        outputs[:] = [_hidden(output)]

    def stop(_: nn.Module, inputs: tuple[Any, ...], others: dict[str, Any]) -> None:
        states.append(inputs[0] if inputs else others["hidden_states"])
        raise _EnoughError

    with ExitStack() as hooks:
        for block in blocks:
            hooks.callback(block.register_forward_pre_hook(note, with_kwargs=True).remove)
            hooks.callback(block.register_forward_hook(keep).remove)
        _run(model, sequences[0])
    with ExitStack() as hooks:
        hooks.callback(blocks[0].register_forward_pre_hook(stop, with_kwargs=True).remove)
        for sequence in sequences:
            try:
                _run(model, sequence)
            except _EnoughError:
                continue
    return states, arguments


def _run(model: Any, sequence: Tensor) -> None:
    model(input_ids=sequence.unsqueeze(0).to(model.device), use_cache=False)


def _hidden(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden
