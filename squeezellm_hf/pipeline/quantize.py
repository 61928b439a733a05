"""Calibrate, quantize and swap the linear layers of a model, layer by layer."""

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from squeezellm_hf.calibration.blocks import on_device
from squeezellm_hf.calibration.hessian import shared_inputs
from squeezellm_hf.calibration.objectives import CausalLM, Objective, Sample
from squeezellm_hf.methods.squeezellm import WeightMatrix, quantize_weights
from squeezellm_hf.nn import SqueezeLLMLinear
from squeezellm_hf.pipeline import passes
from squeezellm_hf.pipeline.blockwise import quantize_blockwise
from squeezellm_hf.pipeline.budget import BitAllocator
from squeezellm_hf.pipeline.calibrate import Calibration
from squeezellm_hf.pipeline.plan import Plan, check_calibration
from squeezellm_hf.pipeline.work_dir import WorkDir, fingerprint


def quantize_modules(
    model: nn.Module,
    plan: Plan,
    sequences: Sequence[Sample] | Tensor | None,
    *,
    objective: Objective | None = None,
    work_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
    device: torch.device | None = None,
    hessian_budgets: Mapping[torch.device, int] | None = None,
    allocator: BitAllocator | None = None,
) -> dict[str, SqueezeLLMLinear]:
    """Replace the linear layers named in ``plan`` by quantized ones, in place.

    All statistics are of the original model. Where Hessians are needed and do not fit in memory
    together, there are several passes over the data, and the layers are replaced after the last.

    Memory beside the model: the Fisher sum, 4 bytes per planned weight, of which each layer's
    part is dropped once the layer is quantized; the Hessians of a pass; the activations of one
    sequence; the gradient of one layer.

    Args:
        model: on its devices; not on meta.
        plan: parameters by module name (:func:`squeezellm_hf.pipeline.make_plan`).
        sequences: token ids, int64 [n_samples, sequence_length]; or keyword arguments of the
            model, a mapping each; or None to quantize without calibration: every weight then
            counts the same.
        objective: what is differentiated. Default: the loss of a causal language model.
        work_dir: where finished work is kept. A run that was killed goes on from there and ends
            in the identical result.
        progress: show progress bars.
        device: where to compute; the model is in CPU memory and stays there, and its blocks are
            moved one at a time (:mod:`squeezellm_hf.pipeline.blockwise`). Default: where the
            model is, all of it at once.
        hessian_budgets: bytes for Hessians on each device that holds planned layers. Default:
            :func:`squeezellm_hf.pipeline.passes.hessian_budgets`, half of what model and Fisher
            sums leave.
        allocator: chooses bits and sparse part of the layers, after the first pass over the data,
            which serves both; needs ``sequences``. Its ``report`` then says what came of it.

    Returns:
        The quantized layers by name.

    Raises:
        ValueError: naming the tensor, if a weight is not finite or lies on the meta device; if a
            codebook needs Hessians and there are no ``sequences``.
    """
    linears: dict[str, Any] = {name: model.get_submodule(name) for name in plan}
    _check_weights(model)
    check_calibration(plan, sequences is not None)
    run = (
        WorkDir(work_dir, fingerprint(model, sequences, objective))
        if work_dir is not None
        else None
    )
    if device is not None:
        loss = objective or CausalLM()
        done = _finished(plan, run)
        return _quantize_blocks(model, plan, linears, sequences, loss, device, done, run, progress)
    shared = {}
    if sequences is not None and any(p.hessian_groups == 0 for p in plan.values()):
        shared = shared_inputs(model, linears, sequences[0], objective)
    budgets = hessian_budgets or passes.hessian_budgets(linears, model)
    todo = passes.make_passes(plan, linears, shared, budgets)
    calibration = (
        Calibration(model, linears, sequences, shared, run, progress, len(todo) == 1, objective)
        if sequences is not None
        else None
    )
    if allocator is not None:
        if calibration is None or not isinstance(sequences, Tensor):
            raise ValueError("a bit budget needs calibration data: token ids of one length")
        take = partial(calibration.take, todo[0].groups)
        plan = allocator.choose(model, plan, sequences, take, run=run, progress=progress)
        todo = passes.make_passes(plan, linears, shared, budgets)
    done = _finished(plan, run)
    layers: dict[str, SqueezeLLMLinear] = {}
    with tqdm(total=len(plan), desc="Quantizing", unit="layer", disable=not progress) as bar:
        for number, each in enumerate(todo):
            missing = [part for part in each.parts if not done.keys() >= set(part)]
            fisher, hessians = None, None
            if missing and calibration is not None:
                title = f"Calibrating {number + 1}/{len(todo)}" if len(todo) > 1 else "Calibrating"
                fisher, hessians = calibration.take(each.groups, title)
            is_last = each is todo[-1]
            for part in each.parts:
                bar.set_postfix_str(part[0], refresh=False)
                if part in missing:
                    own = hessians.of_each(part) if hessians is not None else {}
                    done |= _quantize(part, plan, linears, fisher, own, run)
                bar.update(len(part))
                if is_last:
                    _swap_all(model, part, plan, linears, done, layers)
            if calibration is not None:
                calibration.drop(each.groups)
        _swap_all(model, list(plan), plan, linears, done, layers)
    if allocator is not None:
        allocator.measure(model)
    return {name: layers[name] for name in plan}


def _quantize_blocks(
    model: nn.Module,
    plan: Plan,
    linears: dict[str, Any],
    sequences: Sequence[Sample] | Tensor | None,
    objective: Objective,
    device: torch.device,
    done: dict[str, dict[str, Tensor]],
    run: WorkDir | None,
    progress: bool,
) -> dict[str, SqueezeLLMLinear]:
    def quantize(
        part: list[str], fisher: dict[str, Tensor] | None, hessians: Mapping[str, Tensor]
    ) -> None:
        found = _quantize(part, plan, linears, fisher, hessians, run)
        for name, tensors in found.items():
            done[name] = {key: tensor.cpu() for key, tensor in tensors.items()}

    unfinished = {name for name in plan if name not in done}
    if sequences is not None and unfinished:
        if not isinstance(sequences, Tensor):
            raise ValueError(
                "blockwise calibration takes text or token ids, sequences of one length; got a "
                "list of batches; quantize it with blockwise=False"
            )
        quantize_blockwise(
            model, plan, linears, sequences, objective, device, unfinished, quantize,
            progress=progress,
        )  # fmt: skip
    elif unfinished:
        for name in tqdm(sorted(unfinished), desc="Quantizing", unit="layer", disable=not progress):
            with on_device([linears[name].weight], device):
                quantize([name], None, {})
    layers: dict[str, SqueezeLLMLinear] = {}
    _swap_all(model, list(plan), plan, linears, done, layers)
    return layers


def _quantize(
    part: list[str],
    plan: Plan,
    linears: dict[str, Any],
    fisher: dict[str, Tensor] | None,
    hessians: Mapping[str, Tensor],
    run: WorkDir | None,
) -> dict[str, dict[str, Tensor]]:
    """Quantize layers side by side, and keep them. Their part of the Fisher sums is dropped."""
    matrices = [
        _reached(
            WeightMatrix(
                linears[name].weight.detach(),
                fisher.pop(name) if fisher is not None else None,
                plan[name],
                hessians.get(name),
                name,
            )
        )
        for name in part
    ]
    found = dict(zip(part, quantize_weights(matrices), strict=True))
    if run is not None:
        for name, tensors in found.items():
            run.save_layer(name, plan[name], tensors)
    return found


def _reached(matrix: WeightMatrix) -> WeightMatrix:
    """Without statistics that are all zero, for the data never came by this layer.

    A layer whose weight the model reads without calling it (Mamba's ``dt_proj``) has gradients, but
    no inputs.
    """
    hessian = matrix.hessian
    if hessian is not None and not bool(hessian.diagonal(dim1=1, dim2=2).any()):
        plain = replace(matrix.parameters, codebook="kmeans")
        matrix = matrix._replace(hessian=None, parameters=plain)
    if matrix.fisher is not None and not bool(matrix.fisher.any()):
        warnings.warn(
            f"calibration did not reach {matrix.name}: all of its weights count the same",
            stacklevel=2,
        )
        matrix = matrix._replace(fisher=None)
    return matrix


def _swap_all(
    model: nn.Module,
    names: list[str],
    plan: Plan,
    linears: dict[str, Any],
    done: dict[str, dict[str, Tensor]],
    layers: dict[str, SqueezeLLMLinear],
) -> None:
    """Replace those of the layers that still are the original ones."""
    for name in names:
        if name not in layers:
            layers[name] = _swap(model, name, linears.pop(name), done.pop(name), plan[name].bits)


def _check_weights(model: nn.Module) -> None:
    for name, tensor in model.named_parameters():
        if tensor.is_meta:
            raise ValueError(
                f"{name} is on the meta device (offloaded?); a model is quantized with all its "
                "weights in memory"
            )
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} holds NaN or infinite values and cannot be quantized")


def _finished(plan: Plan, run: WorkDir | None) -> dict[str, dict[str, Tensor]]:
    if run is None:
        return {}
    found = {name: run.load_layer(name, parameters) for name, parameters in plan.items()}
    return {name: tensors for name, tensors in found.items() if tensors is not None}


def _swap(
    model: nn.Module, name: str, linear: nn.Linear, tensors: dict[str, Tensor], bits: int
) -> SqueezeLLMLinear:
    device, dtype = linear.weight.device, linear.weight.dtype
    tensors = {key: tensor.to(device) for key, tensor in tensors.items()}
    if linear.bias is not None:
        tensors["bias"] = linear.bias.detach()
    layer = SqueezeLLMLinear.from_tensors(
        tensors, bits=bits, in_features=linear.in_features, dtype=dtype
    )
    layer.train(linear.training)
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)
    # Frees the full-precision weight now, though callers may still hold the module.
    linear.weight = nn.Parameter(torch.empty(0), requires_grad=False)
    return layer
