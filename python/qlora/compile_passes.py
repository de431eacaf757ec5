"""Changes to a layer's graphs between their tracing and inductor: see regional_compile.py.

What they save is products that nothing needs, and Python's time: a short step waits for its launches.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.utils.checkpoint import CheckpointPolicy

from . import lora_ops

_LORA_LINEAR = torch.ops.qlora.lora_linear_4bit.default
_OUTPUT, _LEFT = 0, 1  # what lora_linear_4bit returns
_RAW = {
    torch.ops.qlora.linear_4bit.default: torch.ops.qlora.linear_4bit.raw,
    torch.ops.qlora.linear_4bit_grad_input.default: torch.ops.qlora.linear_4bit_grad_input.raw,
    _LORA_LINEAR: torch.ops.qlora.lora_linear_4bit.raw,
    torch.ops.qlora.lora_linear_4bit_backward.default: torch.ops.qlora.lora_linear_4bit_backward.raw,
}


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


def name_attention_without_dropout(graph: Graph) -> None:
    """Attention that drops nothing draws no random numbers, whatever its tag says. Torch 2.11 (but not 2.14) goes by the
    tag: where it is computed again it saves and restores the generator's state around it, by a Python operator that
    takes longer than the launch.

    Args:
        graph: a joint graph, before it is partitioned. The calls are of a plain function from here to `call_kernels`.
    """
    for node in graph.nodes:
        if node.op == "call_function" and _draws_nothing(node):
            node.target = _AttentionWithoutDropout(node.target)


class _AttentionWithoutDropout:
    """An attention operator without its tags."""

    def __init__(self, operator: Any) -> None:
        self.operator = operator
        self.__name__ = self.__qualname__ = operator.__name__
        self.__module__ = operator.__module__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.operator(*args, **kwargs)


def _draws_nothing(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    if schema is None or torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    for index, argument in enumerate(schema.arguments):
        if argument.name == "dropout_p":
            given = (
                node.args[index]
                if index < len(node.args)
                else node.kwargs.get("dropout_p", argument.default_value)
            )
            return isinstance(given, float) and given == 0.0
    return False


def call_kernels(graph: Graph) -> None:
    """Has the operators called below their Python autograd formulas, which nothing needs in a graph of one direction.

    Args:
        graph: of the forward or of the backward pass.
    """
    for node in graph.nodes:
        if isinstance(node.target, _AttentionWithoutDropout):
            node.target = node.target.operator
        elif node.op == "call_function" and node.target in _RAW:
            node.target = _RAW[node.target]


def inductor_options() -> dict[str, Any]:
    """Options of torch.compile's inductor backend that apply the passes of this file."""
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    class Pass(CustomGraphPass):
        def __init__(self, *functions: Callable[[Graph], None]) -> None:
            self.functions = functions

        def __call__(self, graph: Graph) -> None:
            for function in self.functions:
                function(graph)

        def uuid(self) -> Any:
            return get_hash_for_files((__file__, lora_ops.__file__))

    _let_inputs_be_shared()
    return {
        "joint_custom_pre_pass": Pass(keep_left_of_last_products),
        "joint_custom_post_pass": Pass(name_attention_without_dropout),
        "post_grad_custom_pre_pass": Pass(call_kernels),
        # Checks of every operand's sizes at every call.
        "size_asserts": False,
        "alignment_asserts": False,
    }


def _let_inputs_be_shared() -> None:
    """Or inductor, which learns that an operator takes tensors from memory when it meets it, has by then planned to
    compute the input of the first few of them (query, key and value) once for each."""
    from torch._inductor.lowering import add_needs_realized_inputs

    add_needs_realized_inputs([*_RAW, *_RAW.values()])  # type: ignore[no-untyped-call]


def failures() -> tuple[type[Exception], ...]:
    """What torch.compile raises where a function cannot be one graph, or would be too many, or no compiler is there."""
    from torch._dynamo import exc

    return exc.TorchDynamoException, exc.FailOnRecompileLimitHit
