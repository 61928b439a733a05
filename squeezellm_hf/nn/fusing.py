"""In graphs that torch.compile makes: what stands beside quantized layers becomes part of the call.

Between the quantized layers of a transformer's block stand an RMSNorm, the product of a gated MLP,
and a residual. A kernel for each takes some 2 us, and the layer behind it asks for no weight before
it has ended. ``lut_linear_group`` does them on the way (``squeezellm_hf/ops/schema.py``).
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from squeezellm_hf.nn.matching import (
    arguments,
    before_silu,
    either_order,
    is_alike,
    is_tensor,
    is_undisturbed,
    rms_norm,
)

LINEAR = torch.ops.squeezellm_hf.lut_linear_no_grad.default
GROUP = torch.ops.squeezellm_hf.lut_linear_group.default
TRACED = "eager_input_vals"  # in a node's meta: its inputs as traced; Inductor lays them out so
BITS = (2, 3, 4)  # that groups have kernels for

_aten = torch.ops.aten
_PLACE = {argument.name: i for i, argument in enumerate(GROUP._schema.arguments)}
_BITS = _PLACE["bits"]
_STEPS = tuple(argument.default_value for argument in GROUP._schema.arguments[_BITS + 1 :])


def fuse(graph: Graph, suits: Callable[[Tensor], bool]) -> None:
    """Make what stands before and behind calls part of them.

    Args:
        graph: of aten and prims ops, as Inductor has it.
        suits: whether calls with this x, a fake tensor, are to be changed.
    """
    earlier: set[Node] = set()
    for node in list(graph.nodes):
        if not _is_candidate(node, suits):
            earlier.add(node)
            continue
        call = _with_norm(graph, node, earlier)
        call = _with_product(graph, call, earlier, suits)
        call = _with_residual(graph, call, earlier)
        earlier |= {call, *call.users}


def _is_candidate(node: Node, suits: Callable[[Tensor], bool]) -> bool:
    if node.op != "call_function" or node.target not in (LINEAR, GROUP):
        return False
    if node.kwargs or len(node.args) <= _BITS or "val" not in node.meta:
        return False
    x = node.args[0]
    return node.args[_BITS] in BITS and is_tensor(x) and suits(x.meta["val"])  # type: ignore[union-attr]


def _with_norm(graph: Graph, call: Node, earlier: set[Node]) -> Node:
    """The call, with the RMSNorm that makes its x and nothing else's."""
    x: Any = call.args[0]
    found = None if len(x.users) > 1 or _makes_x(call) else rms_norm(x)
    if found is None or not is_undisturbed(found[0], x, call):
        return call
    _, source, weight, eps = found
    call = _changed(graph, call, earlier, x=source, norm_weight=weight, norm_eps=eps)
    _erase(graph, x)
    return call


def _with_product(
    graph: Graph, call: Node, earlier: set[Node], suits: Callable[[Tensor], bool]
) -> Node:
    """The call, with the product silu(y) * z that is its x, where y is the result of a call."""
    x: Any = call.args[0]
    if len(x.users) > 1 or _makes_x(call):
        return call
    for activated, other in either_order(x, _aten.mul.Tensor):
        y = before_silu(activated, x)
        if y is None or other is activated or not is_alike(y, x) or not is_alike(other, x):
            continue
        maker, place = (y, 0) if y.target is LINEAR else arguments(y, operator.getitem, 2)
        if maker is None or not _is_candidate(maker, suits):
            continue
        # A call does silu before it adds a residual.
        if _step(maker, "silu") != -1 or _step(maker, "residual") is not None:
            continue
        if _result(maker, place) is not y or not is_undisturbed(x, maker, call):
            continue
        maker = _changed(graph, maker, earlier, silu=place)
        call = _changed(graph, call, earlier, x=other, factor=_result(maker, place))
        _erase(graph, x)
        break
    return call


def _with_residual(graph: Graph, call: Node, earlier: set[Node]) -> Node:
    """The call, with the sum that its result is for and nothing else's; the rest is computed."""
    single = call.target is LINEAR or len(call.meta["val"]) == 1
    y = _result(call, 0) if single and _step(call, "residual") is None else None
    if y is None or len(y.users) != 1:
        return call
    (total,) = y.users
    for one, other in either_order(total, _aten.add.Tensor):
        if one is not y or other not in earlier:
            continue
        if is_alike(other, y) and is_alike(total, y) and is_undisturbed(call, call, total):
            call = _changed(graph, call, earlier, residual=other)
            total.replace_all_uses_with(_result(call, 0))  # type: ignore[arg-type]
            graph.erase_node(total)
            break
    return call


def _changed(graph: Graph, call: Node, earlier: set[Node], **changes: Any) -> Node:
    """``lut_linear_group`` for the call, with these arguments."""
    if call.target is LINEAR:
        x, *tensors, bits = call.args
        with graph.inserting_before(call):
            group = graph.call_function(GROUP, (x, *([tensor] for tensor in tensors), bits))
            result = graph.call_function(operator.getitem, (group, 0))
        group.meta = {**call.meta, "val": [call.meta["val"]]}
        result.meta = {key: value for key, value in call.meta.items() if key != TRACED}
        call.replace_all_uses_with(result)
        graph.erase_node(call)
        if call in earlier:
            earlier |= {group, result}
        call = group
    call.args = (*call.args, *_STEPS[len(call.args) - _BITS - 1 :])
    for name, value in changes.items():
        call.update_arg(_PLACE[name], value)
    call.meta.pop(TRACED, None)
    if all("val" in node.meta for node in call.all_input_nodes):
        call.meta[TRACED] = (map_arg(call.args, lambda node: node.meta["val"]), {})
    return call


def _step(call: Node, name: str) -> Any:
    place = _PLACE[name]
    return call.args[place] if place < len(call.args) else _STEPS[place - _BITS - 1]


def _makes_x(call: Node) -> bool:
    """Whether the call changes x already: it has one such step."""
    return _step(call, "norm_weight") is not None or _step(call, "factor") is not None


def _result(call: Node, place: int) -> Node | None:
    """The result of a weight, if one node stands for it."""
    if call.target is LINEAR:
        return call
    found = [user for user in call.users if arguments(user, operator.getitem, 2)[1] == place]
    return found[0] if len(found) == 1 else None


def _erase(graph: Graph, node: Node) -> None:
    """The node, and what no other needs of what it needed: only steps that are matched above."""
    if node.users or node.op != "call_function" or node._erased:
        return
    inputs = node.all_input_nodes
    graph.erase_node(node)
    for needed in inputs:
        _erase(graph, needed)
