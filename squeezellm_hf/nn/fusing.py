"""In graphs that torch.compile makes: what stands beside quantized layers becomes part of the call.

Between the quantized layers of a transformer's block stand an RMSNorm, the product of a gated MLP,
and a residual. A kernel for each takes some 2 us, and the layer behind it asks for no weight before
it has ended. ``lut_linear_group`` does them on the way (``squeezellm_hf/ops/schema.py``).
"""

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

LINEAR = torch.ops.squeezellm_hf.lut_linear_no_grad.default
GROUP = torch.ops.squeezellm_hf.lut_linear_group.default
TRACED = "eager_input_vals"  # in a node's meta: its inputs as traced; Inductor lays them out so
BITS = (2, 3, 4)  # that groups have kernels for

_aten, _prims = torch.ops.aten, torch.ops.prims
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
    return node.args[_BITS] in BITS and _is_tensor(x) and suits(x.meta["val"])  # type: ignore[union-attr]


def _with_norm(graph: Graph, call: Node, earlier: set[Node]) -> Node:
    """The call, with the RMSNorm that makes its x and nothing else's."""
    x: Any = call.args[0]
    found = None if len(x.users) > 1 or _makes_x(call) else _rms_norm(x)
    if found is None or not _is_undisturbed(found[0], x, call):
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
    for activated, other in _either_order(x, _aten.mul.Tensor):
        y = _before_silu(activated, x)
        if y is None or other is activated or not _is_alike(y, x) or not _is_alike(other, x):
            continue
        maker, place = (y, 0) if y.target is LINEAR else _arguments(y, operator.getitem, 2)
        if maker is None or not _is_candidate(maker, suits):
            continue
        # A call does silu before it adds a residual.
        if _step(maker, "silu") != -1 or _step(maker, "residual") is not None:
            continue
        if _result(maker, place) is not y or not _is_undisturbed(x, maker, call):
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
    for one, other in _either_order(total, _aten.add.Tensor):
        if one is not y or other not in earlier:
            continue
        if _is_alike(other, y) and _is_alike(total, y) and _is_undisturbed(call, call, total):
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


def _is_undisturbed(first: Node, other: Node, last: Node) -> bool:
    """Whether ``last`` may do what ``first`` does: on its stream, and nothing written between."""
    if len({stream_of(node) for node in (first, other, last)}) > 1:
        return False
    node = last
    while node is not first:
        node = node.prev
        if node.op == "root" or may_write(node):
            return False
    return True


def stream_of(node: Node) -> Any:
    """The stream that a program put the node on, if any."""
    return node.meta.get("custom", {}).get("stream")


def may_write(node: Node) -> bool:
    """Whether the node changes a tensor in place, as far as its schema tells."""
    if node.op != "call_function":
        return node.op in ("call_method", "call_module")
    if isinstance(node.target, torch._ops.OpOverload):
        # Events of streams order what they do not name.
        return node.target._schema.is_mutable or node.target.namespace == "streams"
    return isinstance(node.target, torch._ops.HigherOrderOperator)


def _makes_x(call: Node) -> bool:
    """Whether the call changes x already: it has one such step."""
    return _step(call, "norm_weight") is not None or _step(call, "factor") is not None


def _result(call: Node, place: int) -> Node | None:
    """The result of a weight, if one node stands for it."""
    if call.target is LINEAR:
        return call
    found = [user for user in call.users if _arguments(user, operator.getitem, 2)[1] == place]
    return found[0] if len(found) == 1 else None


def _rms_norm(node: Node) -> tuple[Node, Node, Node, float] | None:
    """Of weight * (x32 * rsqrt(mean(x32^2) + eps)), as Llama's norm computes it.

    x32 is x in fp32, and the product in parentheses is rounded to the dtype of x.

    Returns:
        The first node that reads x, x, weight and eps.
    """
    dtype = node.meta["val"].dtype
    for weight, normalized in _either_order(node, _aten.mul.Tensor):
        scaled = _before_cast(normalized, dtype)
        for x32, scale in _either_order(scaled, _aten.mul.Tensor):
            (shifted,) = _arguments(scale, _aten.rsqrt.default, 1)
            mean, eps = _arguments(shifted, _aten.add.Tensor, 2)
            squares, dims, kept = _arguments(mean, _aten.mean.dim, 3)
            squared, power = _arguments(squares, _aten.pow.Tensor_Scalar, 2)
            x = _before_cast(x32, torch.float32)
            if (
                squared is x32
                and (power, dims, kept) == (2, [-1], True)
                and isinstance(eps, float | int)
                and _is_alike(x, node)
                and weight.op in ("placeholder", "get_attr")  # there before x is
                and weight.meta["val"].dtype == dtype
                and weight.meta["val"].dim() == 1
                and _sizes(weight) == _sizes(node)[-1:] != []
            ):
                return (squares if x32 is x else x32), x, weight, float(eps)
    return None


def _before_silu(node: Node, user: Node) -> Node | None:
    """The y of silu(y), of which nothing but ``user`` has use, nor of what is on the way.

    Inductor decomposes it into y32 / (1 + exp(-y32)), rounded to the dtype of y.
    """
    quotient = _before_cast(node, node.meta["val"].dtype)
    y32, denominator = _arguments(quotient, _aten.div.Tensor, 2)
    exponential, one = _arguments(denominator, _aten.add.Tensor, 2)
    (negative,) = _arguments(exponential, _aten.exp.default, 1)
    (negated,) = _arguments(negative, _aten.neg.default, 1)
    y: Node | None = _before_cast(y32, torch.float32)
    if one != 1 or negated is not y32 or y is None:
        return None
    steps = {y, y32, negative, exponential, denominator, quotient, node}
    inside = all(set(step.users) <= steps for step in steps - {node})
    return y if inside and set(node.users) == {user} else None


def _before_cast(node: Any, dtype: torch.dtype) -> Any:
    """What ``node`` is in ``dtype``: itself, where it was of that dtype before."""
    if not _is_tensor(node) or node.meta["val"].dtype != dtype:
        return None
    source, to = _arguments(node, _prims.convert_element_type.default, 2)
    return node if source is None or to != dtype else source


def _arguments(node: Any, target: Any, count: int) -> tuple[Any, ...]:
    """Of a call of ``target``; as many None of anything else."""
    if not isinstance(node, Node) or node.target is not target or node.kwargs:
        return (None,) * count
    return node.args if len(node.args) == count else (None,) * count


def _either_order(node: Any, target: Any) -> Iterator[tuple[Node, Node]]:
    first, second = _arguments(node, target, 2)
    if _is_tensor(first) and _is_tensor(second):
        yield first, second
        yield second, first


def _is_tensor(node: Any) -> bool:
    return isinstance(node, Node) and isinstance(node.meta.get("val"), Tensor)


def _is_alike(node: Any, other: Node) -> bool:
    """Whether both are tensors of one dtype, shape and device, all sizes known."""
    if not _is_tensor(node):
        return False
    one, two = node.meta["val"], other.meta["val"]
    known = len(_sizes(node)) == one.dim() and len(_sizes(other)) == two.dim()
    return (
        known
        and _sizes(node) == _sizes(other)
        and (one.dtype, one.device) == (two.dtype, two.device)
    )


def _sizes(node: Node) -> list[int]:
    """Of a tensor's sizes those that are known: to compare the others would be a guard."""
    return [size for size in node.meta["val"].shape if isinstance(size, int)]


def _erase(graph: Graph, node: Node) -> None:
    """The node, and what no other needs of what it needed: only steps that are matched above."""
    if node.users or node.op != "call_function" or node._erased:
        return
    inputs = node.all_input_nodes
    graph.erase_node(node)
    for needed in inputs:
        _erase(graph, needed)
