"""Changes to a layer's graphs between their tracing and inductor: see regional_compile.py."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.utils.checkpoint import CheckpointPolicy

from . import lora_ops

_LORA_LINEAR = torch.ops.qlora.lora_linear_4bit.default
_OTHERS = (
    torch.ops.qlora.lora_linear_4bit_backward.default,
    torch.ops.qlora.linear_4bit.default,
    torch.ops.qlora.linear_4bit_grad_input.default,
)
_OUTPUT, _LEFT = 0, 1  # what lora_linear_4bit returns


def keep_left_of_last_products(graph: Graph) -> None:
    """Keeps the small `left` of those products that nothing in the backward pass needs otherwise.

    Under checkpointing the backward pass computes a layer again. What its last product, the MLP's down projection,
    returns goes into the residual stream alone, which is over by then; but its second result, `left`, is needed for the
    gradient of B, and would bring the whole product with it: a quarter of the layer's. `left` is 128 bytes a token.

    Args:
        graph: a joint graph of forward and backward, before it is partitioned; tags in it are changed.
    """
    needed = _needed_by_backward(graph)
    for node in graph.find_nodes(op="call_function", target=_LORA_LINEAR):
        parts = {user.args[1]: user for user in node.users if user.target is operator.getitem}
        if "recompute" not in node.meta or _LEFT not in parts or parts[_LEFT] not in needed:
            continue
        if _OUTPUT in parts and parts[_OUTPUT] in needed:
            continue
        node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
        for part in parts.values():
            part.meta.pop("recompute", None)


def _needed_by_backward(graph: Graph) -> set[Node]:
    """The nodes of the forward pass that the backward pass is computed from, itself or by way of others."""
    backward: set[Node] = set()
    pending: list[Node] = []
    for node in graph.nodes:
        is_tangent = node.op == "placeholder" and "tangent" in str(node.target)
        follows = node.op != "output" and any(source in backward for source in node.all_input_nodes)
        if is_tangent or follows:
            backward.add(node)
            pending += [source for source in node.all_input_nodes if source not in backward]
    needed: set[Node] = set()
    while pending:
        node = pending.pop()
        if node not in needed:
            needed.add(node)
            pending += node.all_input_nodes
    return needed


def inductor_options() -> dict[str, Any]:
    """Options of torch.compile's inductor backend that apply the passes of this file."""
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    class KeepLeft(CustomGraphPass):
        def __call__(self, graph: Graph) -> None:
            keep_left_of_last_products(graph)

        def uuid(self) -> Any:
            return get_hash_for_files((__file__, lora_ops.__file__))

    _let_inputs_be_shared()
    return {"joint_custom_pre_pass": KeepLeft()}


def _let_inputs_be_shared() -> None:
    """Or inductor, which learns that an operator takes tensors from memory when it meets it, has by then planned to
    compute the input of the first few of them (query, key and value) once for each."""
    from torch._inductor.lowering import add_needs_realized_inputs

    add_needs_realized_inputs([_LORA_LINEAR, *_OTHERS])  # type: ignore[no-untyped-call]
