"""PEFT's tuners that compute with the weight's values or shape in every pass: HiRA, LoHa, LoKr; and FourierFT."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("peft", reason="peft is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from lora_models import packed_weights, pair
from test_peft_adapters import TUNERS, logits, needs, tuned

import qlora
from assertions import assert_close_by_depth, assert_same_tensors

BY_VALUES = ("hira", "loha", "lokr", "fourierft")


def both(tuner: str, names: tuple[str, ...] = ("default",), **settings: Any) -> list[Any]:
    """The tuner over 4-bit layers and over the same values dense."""
    needs(tuner)
    models = []
    for base in pair():
        config = TUNERS[tuner]()
        for name, value in settings.items():
            assert hasattr(config, name)
            setattr(config, name, value)
        models.append(tuned(base, config, names))
    return models


@pytest.mark.parametrize("tuner", BY_VALUES)
def test_it_compiles_without_a_break_and_dense_layers_beside_ours_too(tuner: str) -> None:
    for model in both(tuner):
        model.eval()
        expected = logits(model)
        torch._dynamo.reset()
        assert_close_by_depth(logits(torch.compile(model, backend="eager", fullgraph=True)), expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("tuner", BY_VALUES)
def test_two_active_adapters_and_none(tuner: str) -> None:
    ours, dense = both(tuner, ("first", "second"))
    plain = logits(pair()[0])
    for model in (ours, dense):
        model.base_model.set_adapter(["first", "second"])
    assert_close_by_depth(logits(ours), logits(dense))
    assert not torch.equal(logits(ours), plain)
    ours.merge_adapter()
    with ours.disable_adapter():  # unmerges
        assert torch.equal(logits(ours), plain)


@pytest.mark.parametrize("tuner", BY_VALUES)
def test_merge_and_unload_leaves_4_bit_layers_of_the_merged_values(tuner: str) -> None:
    ours, dense = both(tuner)
    ours.merge_adapter()
    merged = packed_weights(ours)
    ours.unmerge_adapter()
    unloaded = ours.merge_and_unload()
    assert_same_tensors(
        packed_weights(unloaded),
        {n.replace("base_model.model.", "").replace(".base_layer", ""): t for n, t in merged.items()},
    )
    exact = dense.merge_and_unload()
    layer, wanted = (model.model.layers[0].self_attn.q_proj for model in (unloaded, exact))
    assert isinstance(layer, qlora.nn.Linear4bit)
    # Half a step of the coarsest codes, 0.1519 of the block's largest value, and the scales' own 8 bits.
    blocks = wanted.weight.reshape(-1, 64)
    bound = 0.1519 * blocks.abs().amax(1, keepdim=True) * (1 + 1 / 64) + blocks.abs().max() / 64
    assert ((layer.dequantize().reshape(-1, 64) - blocks).abs() <= bound).all()


@pytest.mark.parametrize("options", [{}, {"rank_dropout": 0.5}, {"use_effective_conv2d": True}])
@pytest.mark.parametrize("tuner", ["loha", "lokr"])
def test_an_adapter_has_the_sizes_and_the_dtype_it_has_over_a_dense_layer(
    tuner: str, options: dict[str, Any]
) -> None:
    shapes = [
        {name: (tuple(p.shape), p.dtype) for name, p in model.named_parameters() if p.requires_grad}
        for model in both(tuner, **options)
    ]
    assert shapes[0] == shapes[1] and shapes[0]


def test_hira_keeps_no_dense_weight_for_the_backward_pass() -> None:
    model = both("hira")[0].train()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    kept: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    x = torch.randn(3, layer.in_features, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = layer(x)
    assert max(kept) < layer.in_features * layer.out_features
    result.sum().backward()
    assert x.grad is not None and layer.hira_A["default"].grad.any() and layer.hira_B["default"].grad.any()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_hira_computes_in_the_dtype_of_the_layers_result(dtype: torch.dtype, autocast: bool) -> None:
    needs("hira")
    model = tuned(pair(dtype=dtype)[0], TUNERS["hira"]())
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.hira_A["default"].dtype == torch.float32
    x = torch.randn(3, layer.in_features, dtype=dtype)
    a, b = layer.hira_A["default"], layer.hira_B["default"]
    weight = layer.base_layer.dequantize(torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        result = layer(x)
    computed = torch.bfloat16 if autocast else dtype
    assert result.dtype == computed
    exact = x.float() @ (weight * (1 + b @ a)).t()
    # Roundings of the weight, of the product of A and B, of their product, of x and of the two sums that are added.
    error = (result.float() - exact).abs().max()
    assert error <= 8 * torch.finfo(computed).eps * exact.abs().max() + 1e-6


def test_hira_keeps_no_dense_copy_of_a_merged_weight() -> None:
    model = both("hira")[0]
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.merge()
    assert layer._base_weight_before_merge is None
    layer.hira_A["default"].data.fill_(torch.nan)
    layer.unmerge()
    with pytest.raises(ValueError, match="NaN"):
        layer.merge(safe_merge=True)
    assert layer._base_weight_before_merge is None and not layer.merged
