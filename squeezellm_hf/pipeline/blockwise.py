"""Calibrate and quantize a model that does not fit on the device: block by block.

The model stays in CPU memory. First all sequences go forward through one block after the other,
and what each block gets is kept in CPU memory; then their gradients go back, and each block is
quantized as soon as the statistics of its layers are complete. So the device holds one block, its
statistics and the activations of one sequence, and all is computed with the original weights.
"""

from collections.abc import Callable, Mapping
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from squeezellm_hf.calibration.accumulate import FP16_LOSS_SCALE, Statistic, frozen
from squeezellm_hf.calibration.blocks import BlockRunner, find_blocks, on_device, tensors_of
from squeezellm_hf.calibration.fisher import FisherDiagonal
from squeezellm_hf.calibration.hessian import Hessians, shared_inputs
from squeezellm_hf.calibration.objectives import Objective
from squeezellm_hf.calibration.tokens import TokenCounts
from squeezellm_hf.pipeline import siblings
from squeezellm_hf.pipeline.passes import parts_of
from squeezellm_hf.pipeline.plan import Plan

# Part of the free memory that a model and its Fisher sums may take; activations need some, too.
_SHARE = 0.75

# Quantizes some layers, given the Fisher sums of at least these and their Hessians.
Quantize = Callable[[list[str], dict[str, Tensor], dict[str, Tensor]], None]


def fits(model: nn.Module, plan: Plan, device: torch.device) -> bool:
    """Whether a model in CPU memory can be calibrated as a whole on ``device``.

    That takes the model, the Fisher sums of the planned layers and the activations of a sequence.
    """
    needed = sum(4 * _weight(model, name).numel() for name in plan)
    if device.type == "cpu":
        return needed < _SHARE * psutil.virtual_memory().available
    needed += sum(tensor.nbytes for tensor in tensors_of(model))
    if device.type != "cuda":
        return True
    return needed < _SHARE * torch.cuda.mem_get_info(device)[0]


def _weight(model: nn.Module, name: str) -> Tensor:
    weight = model.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight


def quantize_blockwise(
    model: Any,
    plan: Plan,
    linears: Mapping[str, nn.Linear],
    sequences: Tensor,
    objective: Objective,
    device: torch.device,
    unfinished: set[str],
    quantize: Quantize,
    *,
    progress: bool,
) -> None:
    """Take the statistics of all ``unfinished`` layers, and have them quantized on the way.

    Args:
        model: in CPU memory.
        plan: parameters by module name.
        linears: the planned layers by name.
        sequences: token ids, int64 [n_samples, sequence_length].
        objective: what is differentiated.
        device: where everything is computed.
        unfinished: names of the layers that are to be quantized.
        quantize: called with layers of one shape, whose weights and Fisher sums are on the device.
        progress: show progress bars.

    Raises:
        ValueError: if the model's blocks cannot be run one by one; for a loss or a sum that is
            not finite.
    """
    half = any(linear.weight.dtype == torch.float16 for linear in linears.values())
    scale = FP16_LOSS_SCALE if half else 1.0
    path, blocks = find_blocks(model, plan)
    inside = [[n for n in plan if n.startswith(f"{path}.{i}.")] for i in range(len(blocks))]
    outside = [n for n in plan if not n.startswith(f"{path}.")]

    counts: dict[str, Tensor] = {}

    def collect(names: list[str], run: Callable[[], Any]) -> Any:
        """Run with the statistics of some layers, if any is unfinished; then quantize those."""
        if unfinished.isdisjoint(names):
            return run()
        fisher, hessians, tokens = _statistics(plan, linears, names, shared)
        statistics: list[Statistic] = [fisher, tokens]
        statistics += [hessians] if hessians is not None else []
        hooks = [hook for statistic in statistics for hook in statistic.attach(scale)]
        try:
            result = run()
        finally:
            for hook in hooks:
                hook.remove()
            for name in names:
                linears[name].weight.requires_grad_(False)
        for statistic in statistics:
            statistic.check()
        counts.update(tokens.sums)
        siblings.complete(fisher.sums, tokens.sums)
        if hessians is not None:
            siblings.complete(hessians.sums, tokens.sums)
        left = set(names)
        for part in parts_of(names, plan, linears):
            left.difference_update(part)
            if unfinished.isdisjoint(part):
                continue
            own: dict[str, Tensor] = {}
            if hessians is not None:
                # The solver copies what it works on: the originals wait in CPU memory.
                own = {name: hessian.cpu() for name, hessian in hessians.of_each(part).items()}
                hessians.keep(left)
            quantize(part, fisher.sums, own)
        return result

    with frozen(model):
        runner = BlockRunner(model, blocks, sequences, objective, device)
        shared: dict[str, str] = {}
        if any(plan[name].hessian_groups == 0 for name in unfinished):
            with runner.whole_model():
                shared = shared_inputs(model, linears, sequences[0], objective)
        with runner.outer_on_device():
            inputs = [runner.embed()]
        blocks_bar = {"unit": "block", "total": len(blocks), "disable": not progress}
        for index in tqdm(range(len(blocks)), desc="Forward", **blocks_bar):
            inputs.append(runner.forward(index, inputs[-1]))
        with runner.outer_on_device():
            gradients = collect(outside, lambda: runner.head(inputs.pop(), scale))
        for index in tqdm(reversed(range(len(blocks))), desc="Backward, quantizing", **blocks_bar):
            if not any(name in unfinished for names in inside[: index + 1] for name in names):
                break  # all that is left is finished

            def back(index: int = index) -> None:
                for sequence, hidden in enumerate(inputs.pop()):
                    gradients[sequence] = runner.backward(index, hidden, gradients[sequence])

            with on_device(tensors_of(blocks[index]), device):
                collect(inside[index], back)
    siblings.warn(counts)


def _statistics(
    plan: Plan, linears: Mapping[str, nn.Linear], names: list[str], shared: Mapping[str, str]
) -> tuple[FisherDiagonal, Hessians | None, TokenCounts]:
    own = {name: linears[name] for name in names}
    fisher, tokens = FisherDiagonal(own), TokenCounts(own)
    groups = {n: g for n in names if (g := plan[n].hessian_groups) is not None}
    if not groups:
        return fisher, None, tokens
    return fisher, Hessians({name: own[name] for name in groups}, groups, shared), tokens
