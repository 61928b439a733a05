"""Tensor parallelism through transformers' plans (``tp_plan="auto"`` under torchrun).

A plan names a style for each module. Transformers' own styles cut every parameter of a module
alike; ours know that a lookup table belongs to a whole row and that sparse values are counted, not
indexed. While the weights are loaded, indices, tables and biases are DTensors, so that each process
reads its own part of the files alone. The sparse part, a few percent of the bytes, is read whole,
and so are indices whose parts do not start on a word. :func:`localize` then makes an ordinary, but
smaller, layer of what was read.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, TensorParallelLayer

from squeezellm_hf.formats import csr, packing
from squeezellm_hf.integration.checkpoint import check_nnz
from squeezellm_hf.integration.config import ModuleRecord
from squeezellm_hf.integration.placement import PARALLEL_STYLE
from squeezellm_hf.nn import SqueezeLLMLinear
from squeezellm_hf.nn.linear import NAMES, SPARSE
from squeezellm_hf.nn.shards import chunk, columns_start_on_words, take_columns, take_rows

PREFIX = "squeezellm_"


class _SumGradients(torch.autograd.Function):
    """The input is the same everywhere; its gradient is a sum over all processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


class _Sum(torch.autograd.Function):
    """The output is a sum over all processes; each part's gradient is that of the sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class QuantizedParallel(TensorParallelLayer):
    """A style of transformers for modules that may be quantized.

    Args:
        plain: the style for modules that are not.

    Attributes:
        cut: the size of a layer that is cut, "out_features" or "in_features".
    """

    cut: str

    def __init__(self, plain: TensorParallelLayer) -> None:
        self.plain = plain

    def placements(self, layer: SqueezeLLMLinear, parts: int) -> dict[str, Any]:
        """How the tensors of a layer are cut while they are read; those not named are not."""
        raise NotImplementedError

    def take(
        self, layer: SqueezeLLMLinear, whole: Mapping[str, Tensor], start: int, stop: int
    ) -> dict[str, Tensor]:
        """The part of the tensors that were read whole."""
        raise NotImplementedError

    def before(self, x: Tensor, mesh: Any) -> Tensor:
        """The input of this process."""
        return x

    def after(self, y: Tensor, mesh: Any, features: int) -> Tensor:
        """What the module returns; ``features`` is the whole layer's number of outputs."""
        return y

    def validate_param(
        self, module: nn.Module, param: str, mesh: Any, parameter_name: str | None = None
    ) -> None:
        """Called by transformers for each parameter of the module."""
        if isinstance(module, SqueezeLLMLinear):
            for index in range(mesh.size()):
                chunk(getattr(module, self.cut), mesh.size(), index)
        else:
            self.plain.validate_param(module, param, mesh, parameter_name=parameter_name)

    def shard_param(self, module: nn.Module, param: str, mesh: Any) -> None:
        """Called by transformers for each parameter of the module, on meta."""
        if not isinstance(module, SqueezeLLMLinear):
            self.plain.shard_param(module, param, mesh)
            return
        placement = self.placements(module, mesh.size()).get(param)
        tensor = module._parameters.get(param)
        if placement is not None and tensor is not None:
            placed = distribute_tensor(tensor, mesh, [placement], src_data_rank=None)
            module._parameters[param] = nn.Parameter(placed, requires_grad=False)

    def install_forward(self, module: nn.Module, mesh: Any) -> nn.Module:
        """Called by transformers once for the module."""
        if not isinstance(module, SqueezeLLMLinear):
            installed: nn.Module = self.plain.install_forward(module, mesh)
            return installed
        setattr(module, PARALLEL_STYLE, (self, mesh))
        features = module.out_features
        module.register_forward_pre_hook(lambda _, args: (self.before(args[0], mesh), *args[1:]))
        module.register_forward_hook(lambda _, args, y: self.after(y, mesh, features))
        return module


class Colwise(QuantizedParallel):
    """Some of the output features in each process.

    Args:
        plain: see the base class.
        gather: whether each process gets all outputs.
    """

    cut = "out_features"

    def __init__(self, plain: TensorParallelLayer, gather: bool) -> None:
        super().__init__(plain)
        self.gather = gather

    def placements(self, layer: SqueezeLLMLinear, parts: int) -> dict[str, Any]:
        """See the base class."""
        return dict.fromkeys(("qweight", "lookup_table", "bias"), Shard(0))

    def take(
        self, layer: SqueezeLLMLinear, whole: Mapping[str, Tensor], start: int, stop: int
    ) -> dict[str, Tensor]:
        """See the base class."""
        return take_rows(whole, start, stop)

    def before(self, x: Tensor, mesh: Any) -> Tensor:
        """See the base class."""
        if torch.is_grad_enabled() and x.requires_grad:
            x = _SumGradients.apply(x, mesh.get_group())
        return x

    def after(self, y: Tensor, mesh: Any, features: int) -> Tensor:
        """See the base class."""
        if not self.gather:
            return y
        shape = (*y.shape[:-1], features)
        stride = torch.empty(shape, device="meta").stride()
        parts = DTensor.from_local(
            y, mesh, [Shard(y.dim() - 1)], run_check=False, shape=torch.Size(shape), stride=stride
        )
        return parts.redistribute(placements=[Replicate()]).to_local()


class Rowwise(QuantizedParallel):
    """Some of the input features in each process; the outputs are summed.

    Args:
        plain: see the base class.
        split: whether each process gets all inputs.
    """

    cut = "in_features"

    def __init__(self, plain: TensorParallelLayer, split: bool) -> None:
        super().__init__(plain)
        self.split = split

    def placements(self, layer: SqueezeLLMLinear, parts: int) -> dict[str, Any]:
        """See the base class."""
        on_words = columns_start_on_words(layer.in_features, layer.bits, parts)
        return {"qweight": Shard(1)} if on_words else {}

    def take(
        self, layer: SqueezeLLMLinear, whole: Mapping[str, Tensor], start: int, stop: int
    ) -> dict[str, Tensor]:
        """See the base class."""
        taken = take_columns(whole, start, stop, bits=layer.bits)
        if start:  # the sum gets the bias once
            taken.pop("bias", None)
        return taken

    def before(self, x: Tensor, mesh: Any) -> Tensor:
        """See the base class."""
        if self.split:
            placed = DTensor.from_local(x, mesh, [Replicate()], run_check=False)
            x = placed.redistribute(placements=[Shard(x.dim() - 1)]).to_local()
        return x

    def after(self, y: Tensor, mesh: Any, features: int) -> Tensor:
        """See the base class."""
        if torch.is_grad_enabled() and y.requires_grad:
            summed: Tensor = _Sum.apply(y, mesh.get_group())
            return summed
        dist.all_reduce(y, group=mesh.get_group())
        return y


STYLES: dict[str, QuantizedParallel] = {
    "colwise": Colwise(ALL_PARALLEL_STYLES["colwise"], gather=False),
    "colwise_gather_output": Colwise(ALL_PARALLEL_STYLES["colwise_gather_output"], gather=True),
    "colwise_rep": Colwise(ALL_PARALLEL_STYLES["colwise_rep"], gather=True),
    "rowwise": Rowwise(ALL_PARALLEL_STYLES["rowwise"], split=False),
    "rowwise_split_input": Rowwise(ALL_PARALLEL_STYLES["rowwise_split_input"], split=True),
    "rowwise_rep": Rowwise(ALL_PARALLEL_STYLES["rowwise_rep"], split=True),
}
for _name, _style in STYLES.items():
    ALL_PARALLEL_STYLES.register(PREFIX + _name, _style)


def use_our_styles(model: Any) -> None:
    """Have the model's plan use our styles; they leave modules that are not quantized to theirs."""
    for rule, style in (model._tp_plan or {}).items():
        if style in STYLES:
            model._tp_plan[rule] = PREFIX + style


def localize(model: Any, records: Mapping[str, ModuleRecord]) -> set[str]:
    """Make each quantized layer that was cut an ordinary layer of its part.

    Returns:
        The names of those layers.

    Raises:
        ValueError: if a sparse part is not sound, or a layer was cut by a style that does not know
            quantized layers.
    """
    parts = set()
    for name, record in records.items():
        layer = model.get_submodule(name)
        if hasattr(layer, PARALLEL_STYLE):
            style, mesh = getattr(layer, PARALLEL_STYLE)
            _check_whole(layer, record, name)
            _localize(layer, style, mesh)
            parts.add(name)
        elif cut := [key for key, t in layer.named_parameters() if isinstance(t, DTensor)]:
            raise ValueError(
                f"{name}.{cut[0]} was cut by a style of tp_plan that does not know quantized "
                f"layers; use one of {[PREFIX + style for style in STYLES]}"
            )
    for rule, named in (model._tp_plan or {}).items():
        # Transformers asks the plan for "colwise" to size its caches.
        model._tp_plan[rule] = named.removeprefix(PREFIX)
    return parts


def _check_whole(layer: SqueezeLLMLinear, record: ModuleRecord, name: str) -> None:
    """What the layer's own check cannot see any more when it holds a part."""
    if not isinstance(layer.qweight, DTensor):
        packing.check_qweight(layer.qweight, layer.bits, layer.in_features, f"{name}.qweight")
    if layer.nnz:
        csr.check_csr(
            *(getattr(layer, key).detach() for key in SPARSE),
            out_features=layer.out_features,
            in_features=layer.in_features,
            prefix=f"{name}.",
        )
    check_nnz(layer.nnz, record, name)


def _localize(layer: SqueezeLLMLinear, style: QuantizedParallel, mesh: Any) -> None:
    tensors = {name: t.detach() for name in NAMES if (t := getattr(layer, name)) is not None}
    start, stop = chunk(getattr(layer, style.cut), mesh.size(), mesh.get_local_rank())
    own = {name: t.to_local() for name, t in tensors.items() if isinstance(t, DTensor)}
    own |= style.take(
        layer, {name: t for name, t in tensors.items() if name not in own}, start, stop
    )
    if layer.nnz and not own["values"].numel():
        own = {name: t for name, t in own.items() if name not in SPARSE}
    for name in NAMES:
        part = nn.Parameter(own[name], requires_grad=False) if name in own else None
        layer.register_parameter(name, part)
    setattr(layer, style.cut, stop - start)
