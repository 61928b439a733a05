"""How a run is cut into passes over the data, and a pass into parts that are kept when finished.

Hessians are large (822 MB a group for 14,336 inputs), so that those of all layers may not fit in
memory together. Each pass over the calibration data collects those of consecutive layers. The cut
depends on the machine's memory and the plan alone: a run that is resumed makes the same one.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from torch import nn

from squeezellm_hf.calibration.hessian import channel_groups
from squeezellm_hf.pipeline.plan import Plan

# Part of a device's memory, after the model and the Fisher sums, that Hessians may take; the rest
# is for activations, gradients and the solver.
_SHARE = 0.5
_LEAST_BYTES = 1 << 30
# Cells that are solved, and then kept, together; and what a finished part loses to a kill.
_CPU_CELLS = 1 << 24
_DEVICE_CELLS = 1 << 30


@dataclass
class Pass:
    """Layers whose Hessians are in memory together.

    Attributes:
        names: the layers, in the order of the plan.
        groups: by name, for those that need a Hessian: see
            :class:`~squeezellm_hf.calibration.hessian.Hessians`.
        parts: the same layers again, those of a part quantized side by side.
    """

    names: list[str] = field(default_factory=list)
    groups: dict[str, int] = field(default_factory=dict)
    parts: list[list[str]] = field(default_factory=list)


def make_passes(
    plan: Plan,
    linears: Mapping[str, nn.Linear],
    shared: Mapping[str, str],
    budgets: Mapping[torch.device, int],
) -> list[Pass]:
    """Cut a plan into passes: at least one, and as few as the budgets allow.

    Args:
        plan: parameters by module name.
        linears: the layers by name.
        shared: layers with the same input: see
            :func:`~squeezellm_hf.calibration.hessian.shared_inputs`.
        budgets: bytes for Hessians on each device. A layer that needs more gets a pass of its own.
    """
    passes = [Pass()]
    used: dict[torch.device, int] = {}
    counted: set[str] = set()
    for name, parameters in plan.items():
        groups, linear = parameters.hessian_groups, linears[name]
        device = linear.weight.device
        source = name if groups else shared.get(name, name)
        needed = 0 if groups is None else hessian_bytes(linear, groups)
        if source not in counted and used.get(device, 0) + needed > budgets[device] and used:
            passes.append(Pass())
            used, counted = {}, set()
        if groups is not None:
            passes[-1].groups[name] = groups
            if source not in counted:
                used[device] = used.get(device, 0) + needed
                counted.add(source)
        passes[-1].names.append(name)
    for each in passes:
        each.parts = parts_of(each.names, plan, linears)
    return passes


def hessian_bytes(linear: nn.Linear, groups: int) -> int:
    """Bytes of a layer's Hessians; 0 groups: of its plain one."""
    count = len(channel_groups(linear.out_features, max(1, groups)))
    return 4 * count * linear.in_features**2


def hessian_budgets(linears: Mapping[str, nn.Linear], model: nn.Module) -> dict[Any, int]:
    """Bytes that Hessians may take on each device, from its size, not from what is free now."""
    taken: dict[torch.device, int] = {}
    for tensor in model.parameters():
        taken[tensor.device] = taken.get(tensor.device, 0) + tensor.nbytes
    fisher: dict[torch.device, int] = {}
    for linear in linears.values():
        device = linear.weight.device
        fisher[device] = fisher.get(device, 0) + 4 * linear.weight.numel()
    return {
        device: max(_LEAST_BYTES, int(_SHARE * (_memory(device) - taken[device] - bytes_)))
        for device, bytes_ in fisher.items()
    }


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total)


def parts_of(names: Iterable[str], plan: Plan, linears: Mapping[str, nn.Linear]) -> list[list[str]]:
    """Layers that need a Hessian, those of one shape together; the others singly."""
    parts: list[list[str]] = []
    last: dict[Any, list[str]] = {}
    for name in names:
        weight = linears[name].weight
        key = (weight.shape, weight.device, plan[name])
        most = _CPU_CELLS if weight.device.type == "cpu" else _DEVICE_CELLS
        part = last.get(key)
        needs_hessian = plan[name].hessian_groups is not None
        if needs_hessian and part and (len(part) + 1) * weight.numel() <= most:
            part.append(name)
        else:
            last[key] = [name]
            parts.append(last[key])
    return parts
