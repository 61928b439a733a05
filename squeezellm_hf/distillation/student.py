"""A quantized model while it is trained: its quantized layers and norms, swapped and put back."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from squeezellm_hf.distillation.linear import TableLinear
from squeezellm_hf.distillation.norm import TrainableNorm
from squeezellm_hf.distillation.settings import DistillationSettings
from squeezellm_hf.nn import SqueezeLLMLinear

State = dict[str, Tensor]


class Student:
    """The trainable modules of a model.

    Attributes:
        layers: by dotted name.
        norms: by dotted name; empty unless they are trained.
    """

    def __init__(self, model: nn.Module, settings: DistillationSettings) -> None:
        self.layers: dict[str, TableLinear] = {}
        self.norms: dict[str, TrainableNorm] = {}
        for name, module in model.named_modules():
            if isinstance(module, SqueezeLLMLinear):
                _check_in_memory(name, module)
                self.layers[name] = TableLinear(
                    module,
                    train_values=settings.train_values,
                    train_indices=settings.train_indices,
                )
            elif settings.train_norms and TrainableNorm.fits(module):
                self.norms[name] = TrainableNorm(module)
        if not self.layers:
            raise ValueError(f"{type(model).__name__} has no quantized layer to distill")

    def groups(self, settings: DistillationSettings) -> list[dict[str, Any]]:
        """Parameters with their peak learning rates, as ``torch.optim`` takes them."""
        by_rate: dict[float, list[nn.Parameter]] = {}
        for layer in self.layers.values():
            group = by_rate.setdefault(settings.learning_rate(layer.bits), [])
            group.extend(p for p in (layer.table, layer.cells) if p is not None and p.requires_grad)
            if layer.shadow is not None:
                rate = settings.index_learning_rate(layer.bits)
                by_rate.setdefault(rate, []).append(layer.shadow)
        rate = settings.learning_rate(max(layer.bits for layer in self.layers.values()))
        norms = [p for norm in self.norms.values() for p in norm.parameters()]
        if norms:
            by_rate.setdefault(rate, []).extend(norms)
        return [{"params": group, "lr": lr} for lr, group in sorted(by_rate.items())]

    def state(self) -> State:
        """Copies of all fp32 masters, by name."""
        return {name: p.detach().clone() for name, p in self._named()}

    @torch.no_grad()
    def load(self, state: State) -> None:
        """Set the masters to a :meth:`state`."""
        for name, parameter in self._named():
            parameter.copy_(state[name])

    def _named(self) -> Iterator[tuple[str, nn.Parameter]]:
        for kind in (self.layers, self.norms):
            for name, module in kind.items():
                for key, parameter in module.named_parameters():
                    if parameter.requires_grad:
                        yield f"{name}.{key}", parameter


@contextlib.contextmanager
def training(model: nn.Module, student: Student) -> Iterator[None]:
    """While it lasts, ``model`` is ``student``, nothing else requires a gradient, and it is in
    evaluation mode: dropout would blur what it is compared with."""
    modules = {**student.layers, **student.norms}
    originals = {name: model.get_submodule(name) for name in modules}
    required = {p: p.requires_grad for p in model.parameters()}
    was_training = model.training
    model.requires_grad_(False)
    model.eval()
    try:
        for name, module in modules.items():
            model.set_submodule(name, module)
        yield
    finally:
        for name, module in originals.items():
            model.set_submodule(name, module)
        for parameter, value in required.items():
            parameter.requires_grad_(value)
        model.train(was_training)


def _check_in_memory(name: str, layer: SqueezeLLMLinear) -> None:
    if layer.qweight.is_meta:
        raise ValueError(
            f"{name} is on the meta device (offloaded?); the quantized model is distilled with all "
            "its tensors in memory"
        )
