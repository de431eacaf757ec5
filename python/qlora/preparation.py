"""`qlora.prepare`: a transformers model made ready for training adapters, with nothing cast to float32."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, TypeVar

from torch import nn

from .checkpointing import layer_checkpoints, use_checkpoints
from .embedding_offload import offload_embeddings
from .lazy_logits import LazyHead
from .lean_mlp import LeanMlps
from .loss import causal_lm_loss, compiled_causal_lm_loss
from .memory_budget import parse_bytes
from .regional_compile import compile_layers

Model = TypeVar("Model", bound=nn.Module)


def prepare(
    model: Model,
    gradient_checkpointing: bool | Literal["offload"] = True,
    *,
    memory_budget: float | str | None = None,
    embedding_offload: bool = False,
    use_reentrant: bool = False,
    low_memory_loss: bool = True,
    compile: bool = False,
) -> Model:
    """Readies a model for training adapters on it; before or after they are added.

    - Every parameter that is not an adapter's is frozen. No dtype changes: norms, embeddings and the head stay in
      16 bit, and with them the residual stream (peft's prepare_model_for_kbit_training makes all of it float32).
    - Gradient checkpointing, non-reentrant. The embeddings' output is made to require a gradient only for the
      reentrant kind, which needs it; here it would only add a backward pass through the first layer's inputs.
    - `config.use_cache` is off for forward passes (neither checkpointing nor compiled layers can fill a cache);
      `generate` still uses one.
    - The loss works in chunks: `model(input_ids=..., labels=...).loss` has transformers' value, but neither float32
      logits nor, while training with a frozen head, the logits themselves exist as a whole (`qlora.loss`,
      `qlora.lazy_logits`). `outputs.logits` still are there for whoever reads them, computed on first use.

    Args:
        model: a transformers model, quantised or not, or a PeftModel around one.
        gradient_checkpointing: recompute the layers' activations in backward: a third more time, far less memory.
            "offload" also keeps the layers' inputs in pinned host memory meanwhile (`qlora.checkpointing`); it costs next
            to no time on a GPU, and is True on a CPU.
        memory_budget: bytes of a GPU, or "24GB": only as many layers are recomputed as needed for torch to allocate no
            more (`qlora.memory_budget`).
        embedding_offload: keeps frozen input embeddings in host memory, from where a GPU reads the rows of a batch
            (`qlora.embedding_offload`). The model is to be on its GPU.
        use_reentrant: the older kind of checkpointing (DeepSpeed ZeRO-3 with PEFT needs it).
        low_memory_loss: the last point above; models whose loss is not the plain next-token one keep theirs.
        compile: compile the decoder layers and the loss for training steps (`qlora.regional_compile`): the first step takes 10 to
            25 s longer, every other is faster.

    Returns:
        The same model.

    Raises:
        ValueError: gradient_checkpointing is asked of a model that has none, compile of one without equal layers, an
            argument is not as said, or the embeddings cannot be offloaded.
    """
    num_bytes = check_checkpointing(gradient_checkpointing, memory_budget, use_reentrant)
    base = _base_model(model)
    if base is model and not _has_adapters(model):
        model.requires_grad_(False)
    _set_use_cache(base, not (gradient_checkpointing or compile))
    if gradient_checkpointing:
        _enable_checkpointing(base, use_reentrant)
        save_memory(base, gradient_checkpointing, num_bytes)
    if embedding_offload:
        offload_embeddings(base)
    if low_memory_loss:
        _use_low_memory_loss(base, compile)
    if compile:
        compile_layers(base)
    return model


def save_memory(
    base: Any, gradient_checkpointing: bool | str, num_bytes: int | None, **stand_ins: Any
) -> None:
    """What "offload" and a memory budget of num_bytes make of checkpointing; stand_ins are for `layer_checkpoints`."""
    is_offloaded = gradient_checkpointing == "offload"
    if is_offloaded or num_bytes is not None:
        make = partial(
            layer_checkpoints, is_offloaded=is_offloaded, num_bytes=num_bytes, lean=LeanMlps(), **stand_ins
        )
        use_checkpoints(base, make)


def check_checkpointing(
    gradient_checkpointing: bool | str, memory_budget: float | str | None, use_reentrant: bool = False
) -> int | None:
    """The budget in bytes, of arguments that go together.

    Raises:
        ValueError: one of them is not as `prepare` says, or not with the others.
    """
    if gradient_checkpointing not in (True, False, "offload"):
        raise ValueError(
            "qlora.prepare: gradient_checkpointing: expected True, False or 'offload', got "
            f"{gradient_checkpointing!r}"
        )
    if use_reentrant and (gradient_checkpointing == "offload" or memory_budget is not None):
        raise ValueError(
            "qlora.prepare: use_reentrant: expected False with gradient_checkpointing='offload' or a memory budget, "
            "got True"
        )
    num_bytes = None if memory_budget is None else parse_bytes(memory_budget)
    if num_bytes is not None and not gradient_checkpointing:
        raise ValueError(
            f"qlora.prepare: memory_budget: expected None without gradient_checkpointing, got {memory_budget!r}"
        )
    return num_bytes


def _base_model(model: nn.Module) -> Any:
    get_base_model = getattr(model, "get_base_model", None)
    return get_base_model() if callable(get_base_model) else model


def _has_adapters(model: nn.Module) -> bool:
    """Whether adapters were injected, so that requires_grad is theirs already."""
    return hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False)


def _set_use_cache(base: Any, use_cache: bool) -> None:
    config = getattr(base, "config", None)
    if config is None or use_cache:
        return
    for part in {id(c): c for c in (config, getattr(config, "get_text_config", lambda: config)())}.values():
        if hasattr(part, "use_cache"):
            part.use_cache = False


def _enable_checkpointing(base: Any, use_reentrant: bool) -> None:
    kwargs = {"use_reentrant": use_reentrant}
    if not getattr(base, "supports_gradient_checkpointing", False):
        raise ValueError(
            f"qlora.prepare: gradient_checkpointing: expected a transformers model that supports it, got "
            f"{type(base).__name__}; pass gradient_checkpointing=False"
        )
    vars(base).pop("_set_gradient_checkpointing", None)  # of an earlier call (checkpointing.use_checkpoints)
    had_hooks = bool(getattr(base, "_require_grads_hooks", None))
    # transformers 5.23 renamed it; the old name goes with transformers 6.
    if hasattr(base, "activation_checkpointing_enable"):
        base.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
    else:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    if use_reentrant:
        base.enable_input_require_grads()
    elif not had_hooks and getattr(base, "_require_grads_hooks", None):
        base.disable_input_require_grads()  # transformers enables it with any checkpointing


def _use_low_memory_loss(base: Any, is_compiled: bool) -> None:
    try:
        from transformers.loss.loss_utils import ForCausalLMLoss
    except ImportError:
        return
    if getattr(base, "loss_function", None) not in (ForCausalLMLoss, causal_lm_loss, compiled_causal_lm_loss):
        return
    base.loss_function = compiled_causal_lm_loss if is_compiled else causal_lm_loss
    head = base.get_output_embeddings()
    # The class is swapped, not the module: hooks, tied weights and the names in the state dict stay.
    if type(head) is nn.Linear:
        head.__class__ = LazyHead
