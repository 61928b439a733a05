"""What to look for in a graph that torch.compile makes: norms, activations, what is in the way."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

_aten, _prims = torch.ops.aten, torch.ops.prims


def rms_norm(node: Node) -> tuple[Node, Node, Node, float] | None:
    """Of weight * (x32 * rsqrt(mean(x32^2) + eps)), as Llama's norm computes it.

    x32 is x in fp32, and the product in parentheses is rounded to the dtype of x.

    Returns:
        The first node that reads x, x, weight and eps.
    """
    dtype = node.meta["val"].dtype
    for weight, normalized in either_order(node, _aten.mul.Tensor):
        scaled = _before_cast(normalized, dtype)
        for x32, scale in either_order(scaled, _aten.mul.Tensor):
            (shifted,) = arguments(scale, _aten.rsqrt.default, 1)
            mean, eps = arguments(shifted, _aten.add.Tensor, 2)
            squares, dims, kept = arguments(mean, _aten.mean.dim, 3)
            squared, power = arguments(squares, _aten.pow.Tensor_Scalar, 2)
            x = _before_cast(x32, torch.float32)
            if (
                squared is x32
                and (power, dims, kept) == (2, [-1], True)
                and isinstance(eps, float | int)
                and is_alike(x, node)
                and weight.op in ("placeholder", "get_attr")  # there before x is
                and weight.meta["val"].dtype == dtype
                and weight.meta["val"].dim() == 1
                and _sizes(weight) == _sizes(node)[-1:] != []
            ):
                return (squares if x32 is x else x32), x, weight, float(eps)
    return None


def before_silu(node: Node, user: Node) -> Node | None:
    """The y of silu(y), of which nothing but ``user`` has use, nor of what is on the way.

    Inductor decomposes it into y32 / (1 + exp(-y32)), rounded to the dtype of y.
    """
    quotient = _before_cast(node, node.meta["val"].dtype)
    y32, denominator = arguments(quotient, _aten.div.Tensor, 2)
    exponential, one = arguments(denominator, _aten.add.Tensor, 2)
    (negative,) = arguments(exponential, _aten.exp.default, 1)
    (negated,) = arguments(negative, _aten.neg.default, 1)
    y: Node | None = _before_cast(y32, torch.float32)
    if one != 1 or negated is not y32 or y is None:
        return None
    steps = {y, y32, negative, exponential, denominator, quotient, node}
    inside = all(set(step.users) <= steps for step in steps - {node})
    return y if inside and set(node.users) == {user} else None


def _before_cast(node: Any, dtype: torch.dtype) -> Any:
    """What ``node`` is in ``dtype``: itself, where it was of that dtype before."""
    if not is_tensor(node) or node.meta["val"].dtype != dtype:
        return None
    source, to = arguments(node, _prims.convert_element_type.default, 2)
    return node if source is None or to != dtype else source


def arguments(node: Any, target: Any, count: int) -> tuple[Any, ...]:
    """Of a call of ``target``; as many None of anything else."""
    if not isinstance(node, Node) or node.target is not target or node.kwargs:
        return (None,) * count
    return node.args if len(node.args) == count else (None,) * count


def either_order(node: Any, target: Any) -> Iterator[tuple[Node, Node]]:
    first, second = arguments(node, target, 2)
    if is_tensor(first) and is_tensor(second):
        yield first, second
        yield second, first


def is_tensor(node: Any) -> bool:
    return isinstance(node, Node) and isinstance(node.meta.get("val"), Tensor)


def is_alike(node: Any, other: Node) -> bool:
    """Whether both are tensors of one dtype, shape and device, all sizes known."""
    if not is_tensor(node):
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


def is_undisturbed(first: Node, other: Node, last: Node) -> bool:
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
