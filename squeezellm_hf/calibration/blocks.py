"""Run a model one block at a time on a device that the whole of it does not fit on.

The model lies in CPU memory. What is not a block (embeddings, last norm, head) runs by the model's
own code; of the blocks, each lies on the device only while it runs. What a block is called with
besides the hidden states (masks, position embeddings) is noted once: all sequences have one length.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from squeezellm_hf.calibration.accumulate import check_loss
from squeezellm_hf.calibration.objectives import Objective

HIDDEN = "hidden_states"
# What a block may be called with that keeps something from one call to the next.
_CACHES: dict[str, Any] = {"past_key_values": None, "past_key_value": None, "use_cache": False}


class _ReachedBlocks(Exception):
    """Ends a forward pass at the first block."""


@dataclass(frozen=True)
class BlockCall:
    """How the model calls a block, and what comes back.

    Attributes:
        args: the positional arguments after the hidden states.
        kwargs: the others; tensors on the device.
        by_keyword: whether the hidden states are a keyword argument.
        in_tuple: whether they come back as the first of several.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    by_keyword: bool
    in_tuple: bool

    def __call__(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The hidden states behind the block."""
        if self.by_keyword:
            result = block(*self.args, **{HIDDEN: hidden}, **self.kwargs)
        else:
            result = block(hidden, *self.args, **self.kwargs)
        return result[0] if self.in_tuple else result


def find_blocks(model: nn.Module, names: Iterable[str]) -> tuple[str, nn.ModuleList]:
    """The list of blocks that holds most of the layers ``names``, and its name.

    Raises:
        ValueError: if no ``nn.ModuleList`` holds any.
    """
    names = list(names)
    best, found = 0, None
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            held = sum(name.startswith(f"{path}.") for name in names)
            if held > best:
                best, found = held, (path, module)
    if found is None:
        raise ValueError(
            f"blockwise: {type(model).__name__} has no list of blocks with layers to quantize; "
            "quantize it with blockwise=False"
        )
    return found


@contextmanager
def on_device(tensors: Iterable[Tensor], device: torch.device) -> Iterator[None]:
    """Keep ``tensors`` on ``device``; afterwards they are as before, whatever was done to them."""
    kept = [(tensor, tensor.data) for tensor in {id(t): t for t in tensors}.values()]
    try:
        for tensor, data in kept:
            tensor.data = data.to(device, non_blocking=True)
        yield
    finally:
        for tensor, data in kept:
            tensor.data = data


def tensors_of(block: nn.Module) -> list[Tensor]:
    """Parameters and buffers."""
    return [*block.parameters(), *block.buffers()]


class BlockRunner:
    """Runs a model in CPU memory on a device, block by block.

    Args:
        model: with all its weights in CPU memory.
        blocks: those of :func:`find_blocks`.
        sequences: token ids, int64 [n, sequence_length].
        objective: calls the model, and says what is differentiated.
        device: where everything is computed.

    Raises:
        ValueError: if the blocks do not follow one another, each on the hidden states of the one
            before, with arguments that are the same for all sequences.
    """

    def __init__(
        self,
        model: Any,
        blocks: nn.ModuleList,
        sequences: Tensor,
        objective: Objective,
        device: torch.device,
    ) -> None:
        self._model = model
        self._objective = objective
        self.blocks = list(blocks)
        self._sequences = sequences
        self.device = device
        in_blocks = {id(tensor) for block in self.blocks for tensor in tensors_of(block)}
        self._outer = [t for t in tensors_of(model) if id(t) not in in_blocks]
        with self.outer_on_device():
            self._calls = self._note_calls()

    def outer_on_device(self) -> Any:
        """A context in which all but the blocks lies on the device."""
        return on_device(self._outer, self.device)

    @contextmanager
    def whole_model(self) -> Iterator[None]:
        """Whatever runs the model now moves each block to the device while it runs."""
        with self.outer_on_device(), ExitStack() as cleanup:
            for block in self.blocks:
                cleanup.enter_context(_moved_when_run(block, self.device))
            yield

    def embed(self) -> list[Tensor]:
        """What the first block gets, in CPU memory: [1, sequence_length, hidden_size] each."""
        found: list[Tensor] = []

        def stop(*args: Any, **kwargs: Any) -> None:
            found.append((args[0] if args else kwargs[HIDDEN]).detach().cpu())
            raise _ReachedBlocks

        with torch.no_grad(), _replaced([self.blocks[0]], [stop]):
            for index in range(len(self._sequences)):
                with suppress(_ReachedBlocks):
                    self._loss(index)
        return found

    def forward(self, index: int, hidden: Sequence[Tensor]) -> list[Tensor]:
        """Through one block: one tensor a sequence, in CPU memory."""
        block = self.blocks[index]
        with torch.no_grad(), on_device(tensors_of(block), self.device):
            return [self._calls[index](block, h.to(self.device)).cpu() for h in hidden]

    def head(self, hidden: Sequence[Tensor], loss_scale: float) -> list[Tensor]:
        """Gradients of the loss times ``loss_scale`` with respect to the last block's outputs.

        Raises:
            ValueError: if a loss is not finite.
        """
        gradients = []
        for index, h in enumerate(hidden):
            leaf = h.to(self.device).requires_grad_()
            with torch.enable_grad(), _replaced(self.blocks, self._skips(leaf)):
                loss = self._loss(index)
                check_loss(loss, index)
                (loss * loss_scale).backward()
            assert leaf.grad is not None
            gradients.append(leaf.grad.cpu())
        return gradients

    def backward(self, index: int, hidden: Tensor, gradient: Tensor) -> Tensor:
        """Back through one block, which is on the device, for one sequence.

        Args:
            index: of the block.
            hidden: what it gets.
            gradient: of the loss with respect to what it gives.

        Returns:
            The gradient with respect to what it gets, in CPU memory.
        """
        leaf = hidden.to(self.device).requires_grad_()
        with torch.enable_grad():
            output = self._calls[index](self.blocks[index], leaf)
            output.backward(gradient.to(self.device))
        assert leaf.grad is not None
        return leaf.grad.cpu()

    def _loss(self, index: int) -> Tensor:
        return self._objective(self._model, self._sequences[index].to(self.device), index)

    def _skips(self, last: Tensor) -> list[Callable[..., Any]]:
        """Forward functions that do nothing, but for the last, which gives ``last``."""

        def skip(call: BlockCall, result: Tensor | None) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden = result
                if hidden is None:
                    hidden = kwargs[HIDDEN] if call.by_keyword else args[0]
                return (hidden,) if call.in_tuple else hidden

            return forward

        skips = [skip(call, None) for call in self._calls[:-1]]
        return [*skips, skip(self._calls[-1], last)]

    def _note_calls(self) -> list[BlockCall]:
        """Run two sequences through the whole model and look at how its blocks are called."""
        first, second = (self._traced(index) for index in (0, len(self._sequences) - 1))
        for index, (a, b) in enumerate(zip(first, second, strict=True)):
            leaves, others = (
                tree_flatten((a.args, a.kwargs))[0],
                tree_flatten((b.args, b.kwargs))[0],
            )
            if len(leaves) != len(others) or not all(
                x.equal(y) for x, y in zip(leaves, others, strict=True) if isinstance(x, Tensor)
            ):
                raise ValueError(
                    f"blockwise: block {index} of {type(self._model).__name__} is called with "
                    "arguments that depend on the text; quantize it with blockwise=False"
                )
        return first

    def _traced(self, index: int) -> list[BlockCall]:
        calls: list[BlockCall] = []
        state: dict[str, Any] = {"hidden": None}
        order = {id(block): index for index, block in enumerate(self.blocks)}

        def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs.get(HIDDEN)
            last = state["hidden"]
            if (
                order[id(block)] != len(calls)
                or not isinstance(hidden, Tensor)
                or not (last is None or hidden is last or hidden.equal(last))
            ):
                raise ValueError(
                    f"blockwise: the blocks of {type(self._model).__name__} do not simply follow "
                    "one another; quantize it with blockwise=False"
                )
            state["call"] = (args, kwargs)

        def after(block: nn.Module, _: Any, output: Any) -> None:
            args, kwargs = state["call"]
            others = {
                key: _CACHES.get(key, value)
                for key, value in kwargs.items()
                if key != HIDDEN or args
            }
            in_tuple = isinstance(output, tuple)
            state["hidden"] = output[0] if in_tuple else output
            kept = tree_map(lambda v: v.detach() if isinstance(v, Tensor) else v, others)
            calls.append(BlockCall(args[1:], kept, not args, in_tuple))

        with torch.no_grad(), ExitStack() as cleanup:
            for block in self.blocks:
                cleanup.enter_context(_moved_when_run(block, self.device))
                for handle in (
                    block.register_forward_pre_hook(before, with_kwargs=True),
                    block.register_forward_hook(after),
                ):
                    cleanup.callback(handle.remove)
            self._loss(index)
        if len(calls) != len(self.blocks):
            raise ValueError(
                f"blockwise: {type(self._model).__name__} ran {len(calls)} of its "
                f"{len(self.blocks)} blocks; quantize it with blockwise=False"
            )
        return calls


@contextmanager
def _moved_when_run(block: nn.Module, device: torch.device) -> Iterator[None]:
    with ExitStack() as running:

        def enter(*_: Any) -> None:
            running.enter_context(on_device(tensors_of(block), device))

        def leave(*_: Any) -> None:
            running.pop_all().close()

        hooks = [
            block.register_forward_pre_hook(enter),
            block.register_forward_hook(leave, always_call=True),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


@contextmanager
def _replaced(
    blocks: Sequence[nn.Module], forwards: Sequence[Callable[..., Any]]
) -> Iterator[None]:
    """Run ``forwards`` in place of the blocks' own."""
    own: list[Any] = [vars(block).get("forward") for block in blocks]
    for block, forward in zip(blocks, forwards, strict=True):
        block.forward = forward
    try:
        yield
    finally:
        for block, method in zip(blocks, own, strict=True):
            if method is None:
                del block.forward
            else:
                block.forward = method
