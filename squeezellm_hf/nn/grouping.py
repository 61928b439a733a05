"""In graphs that torch.compile makes: quantized layers of one input as one call.

A kernel that multiplies one row by a small weight takes some 3 us beside its bytes, more where the
kernel before it does not say that it ends. Of a transformer's block, the query, key and value
projections share an input, and so do the two halves of a gated MLP. What stands between such calls
becomes part of them, too (:mod:`squeezellm_hf.nn.fusing`).

Inductor runs :class:`GroupLinears` as ``torch._inductor.config.post_grad_custom_pre_pass``, its
hook for passes of others. There is one, which is left alone where it is taken.

Environment:
    SQUEEZELLM_HF_GROUP_LINEARS: ``0``: the pass is not installed, nothing is grouped or fused.
"""

import operator
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

from squeezellm_hf.nn import fusing, matching
from squeezellm_hf.nn.fusing import GROUP, LINEAR, TRACED
from squeezellm_hf.nn.matching import may_write, stream_of
from squeezellm_hf.ops import native

MOST = 4  # weights that share a launch: kMostGrouped in csrc/cuda/weight.h


def is_one_launch(x: Tensor) -> bool:
    """Whether several weights by ``x`` can be one launch: see ``linear_streamed_group.cu``."""
    return (
        x.device.type == "cuda"
        and x.dtype in (torch.float16, torch.bfloat16)
        # A size that is not known is never 1.
        and all(isinstance(size, int) and size == 1 for size in x.shape[:-1])
        and torch.cuda.get_device_capability(x.device)[0] >= 9
    )


class GroupLinears(CustomGraphPass):
    """Puts one ``lut_linear_group`` for several ``lut_linear_no_grad`` with one x and one width.

    It stands where the first of them stood; calls that need what is computed later, or that come
    after something is written in place, are none of its group. Then what stands beside the calls
    becomes part of them.

    Args:
        suits: whether calls with this x, a fake tensor, are to be grouped.
    """

    def __init__(self, suits: Callable[[Tensor], bool] = is_one_launch) -> None:
        self._suits = suits

    def __call__(self, graph: Graph) -> None:
        position = {node: index for index, node in enumerate(graph.nodes)}
        for group in self._groups(graph, position):
            _replace(graph, group, position)
        fusing.fuse(graph, self._suits)

    def uuid(self) -> Any:
        """What Inductor's caches know the pass by; None: compiled graphs are not cached."""
        if self._suits is not is_one_launch:
            return None
        return get_hash_for_files((__file__, fusing.__file__, matching.__file__))

    def _groups(self, graph: Graph, position: Mapping[Node, int]) -> list[list[Node]]:
        groups: list[list[Node]] = []
        latest: dict[tuple[Any, ...], list[Node]] = {}
        for node in graph.nodes:
            if may_write(node):
                latest.clear()
            if not self._is_candidate(node):
                continue
            kind = _kind(node)
            group = latest.get(kind)
            if group is None or len(group) == MOST or _needs_later(node, group[0], position):
                group = latest[kind] = []
                groups.append(group)
            group.append(node)
        return [group for group in groups if len(group) > 1]

    def _is_candidate(self, node: Node) -> bool:
        if node.op != "call_function" or node.target is not LINEAR or node.kwargs:
            return False
        x = node.args[0]
        return (
            isinstance(x, Node)
            and isinstance(x.meta.get("val"), Tensor)
            and "val" in node.meta
            and len(node.args) == len(LINEAR._schema.arguments)
            and self._suits(x.meta["val"])
        )


def _kind(node: Node) -> tuple[Any, ...]:
    """What calls of a group must have in common: x, stream, and what makes them one launch."""
    x, _, table, pointers, columns, values, _, bits = node.args
    dtypes = (
        tensor.meta["val"].dtype if isinstance(tensor, Node) and "val" in tensor.meta else None
        for tensor in (table, pointers, columns, values)
    )
    return (x, bits, stream_of(node), *dtypes)


def _needs_later(node: Node, place: Node, position: Mapping[Node, int]) -> bool:
    """Whether the node needs what ``place`` or one behind it computes; constants may be earlier."""
    return any(
        position[needed] >= position[place] and needed.op != "get_attr"
        for needed in node.all_input_nodes
    )


def _replace(graph: Graph, group: list[Node], position: dict[Node, int]) -> None:
    first = group[0]
    for node in group[1:]:
        for needed in node.all_input_nodes:
            if position.get(needed, -1) > position[first]:  # a constant
                first.prepend(needed)
                position[needed] = position[first]  # not to be moved again, behind its use here
    with graph.inserting_before(first):
        call = graph.call_function(GROUP, _together([node.args for node in group]))
        results = [graph.call_function(operator.getitem, (call, i)) for i in range(len(group))]
    call.meta = {**first.meta, "val": [node.meta["val"] for node in group]}
    # The inputs as they were traced: Inductor lays out the new call's as these were.
    traced = [call.meta.pop(TRACED, None), *(node.meta.get(TRACED) for node in group[1:])]
    if None not in traced:
        call.meta[TRACED] = (_together([args for args, _ in traced]), {})
    for node, result in zip(group, results, strict=True):
        result.meta = {key: value for key, value in node.meta.items() if key != TRACED}
        node.replace_all_uses_with(result)
        graph.erase_node(node)


def _together(calls: Sequence[Sequence[Any]]) -> tuple[Any, ...]:
    """Arguments of ``lut_linear_group`` from those of ``lut_linear_no_grad``."""
    x, *tensors, bits = zip(*calls, strict=True)
    return (x[0], *map(list, tensors), bits[0])


_PASS = GroupLinears()
_disabled = False


def install() -> None:
    """Have what this thread compiles from now on group its layers, where CUDA kernels are loaded.

    torch 2.13 keeps Inductor's settings by thread. Does nothing where there is another pass; takes
    ours out after :func:`disable`, which may have been called in another thread.
    """
    wanted = not _disabled and os.environ.get("SQUEEZELLM_HF_GROUP_LINEARS", "1") != "0"
    if wanted and native.status().cuda_loaded and config.post_grad_custom_pre_pass is None:
        config.post_grad_custom_pre_pass = _PASS
    elif not wanted and config.post_grad_custom_pre_pass is _PASS:
        config.post_grad_custom_pre_pass = None


def disable() -> None:
    """Undo :func:`install`, in other threads where they call it again, until :func:`enable`."""
    global _disabled
    _disabled = True
    install()


def enable() -> None:
    """:func:`install`, and undo :func:`disable`."""
    global _disabled
    _disabled = False
    install()
