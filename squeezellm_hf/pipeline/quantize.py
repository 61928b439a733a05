"""Calibrate, quantize and swap the linear layers of a model, layer by layer."""

import os
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from squeezellm_hf.calibration.fisher import calibrate_fisher
from squeezellm_hf.methods.squeezellm import quantize_weight
from squeezellm_hf.nn import SqueezeLLMLinear
from squeezellm_hf.pipeline.plan import Plan
from squeezellm_hf.pipeline.work_dir import WorkDir, fingerprint


def quantize_modules(
    model: nn.Module,
    plan: Plan,
    sequences: Tensor | None,
    *,
    work_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> dict[str, SqueezeLLMLinear]:
    """Replace the linear layers named in ``plan`` by quantized ones, in place.

    Memory beside the model: the Fisher sum, 4 bytes per planned weight, of which each layer's
    part is dropped once the layer is quantized; the activations of one sequence; the gradient of
    one layer.

    Args:
        model: on its devices; not on meta.
        plan: parameters by module name (:func:`squeezellm_hf.pipeline.make_plan`).
        sequences: token ids, int64 [n_samples, sequence_length], or None to quantize without
            calibration: every weight then counts the same.
        work_dir: where finished work is kept. A run that was killed goes on from there and ends
            in the identical result.
        progress: show progress bars.

    Returns:
        The quantized layers by name.

    Raises:
        ValueError: naming the tensor, if a weight is not finite or lies on the meta device.
    """
    linears: dict[str, Any] = {name: model.get_submodule(name) for name in plan}
    _check_weights(model)
    run = WorkDir(work_dir, fingerprint(model, sequences)) if work_dir is not None else None
    done = _finished(plan, run)
    todo = {name: linear for name, linear in linears.items() if name not in done}
    fisher = _fisher(model, todo, linears, sequences, run, progress) if todo else None
    layers = {}
    bar = tqdm(plan.items(), desc="Quantizing", unit="layer", disable=not progress)
    for name, parameters in bar:
        bar.set_postfix_str(name, refresh=False)
        linear = linears.pop(name)
        tensors = done.get(name)
        if tensors is None:
            sensitivity = fisher.pop(name) if fisher is not None else None
            tensors = quantize_weight(linear.weight.detach(), sensitivity, parameters, name=name)
            del sensitivity
            if run is not None:
                run.save_layer(name, parameters, tensors)
        layers[name] = _swap(model, name, linear, tensors, parameters.bits)
    return layers


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


def _fisher(
    model: nn.Module,
    todo: dict[str, Any],
    linears: dict[str, Any],
    sequences: Tensor | None,
    run: WorkDir | None,
    progress: bool,
) -> dict[str, Tensor] | None:
    """The Fisher sums of the layers that are still to be quantized."""
    if sequences is None:
        return None
    total, first = None, 0
    if run is not None:
        total, first = run.load_fisher(
            {name: layer.weight.device for name, layer in linears.items()}
        )
    n_samples = len(sequences)
    with tqdm(
        total=n_samples, initial=first, desc="Calibrating", unit="sequence", disable=not progress
    ) as bar:

        def after_sequence(count: int, sums: Any) -> None:
            bar.update()
            if run is not None:
                run.save_fisher(sums, count, final=count == n_samples)

        # All layers, also the finished ones: the sums on disk serve other bits, too.
        total = calibrate_fisher(
            model,
            linears,
            list(sequences),
            fisher=total,
            first=first,
            after_sequence=after_sequence,
        )
    return {name: total[name] for name in todo}


def _swap(
    model: nn.Module, name: str, linear: nn.Linear, tensors: dict[str, Tensor], bits: int
) -> SqueezeLLMLinear:
    device = linear.weight.device
    tensors = {key: tensor.to(device) for key, tensor in tensors.items()}
    if linear.bias is not None:
        tensors["bias"] = linear.bias.detach()
    layer = SqueezeLLMLinear.from_tensors(tensors, bits=bits, in_features=linear.in_features)
    layer.train(linear.training)
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)
    # Frees the full-precision weight now, though callers may still hold the module.
    linear.weight = nn.Parameter(torch.empty(0), requires_grad=False)
    return layer
