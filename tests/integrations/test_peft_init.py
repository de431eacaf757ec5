"""PEFT's initialisations over 4-bit weights: from the dequantised values, or one clear error; never on packed bytes."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

peft = pytest.importorskip("peft", reason="peft is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from lora_models import fill_adapters, lora_layers, packed_weights, pair, tokens  # noqa: E402
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from peft.tuners.lora.config import CordaConfig  # noqa: E402

from assertions import assert_same_tensors  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:lora with eva initialization used with low_cpu_mem_usage=False"),
]
QUANTS = [{}, {"quant_type": "fp4", "block_size": 32, "double_quant": False}]
TARGETS = ["q_proj", "down_proj"]


def config(init=True, **kwargs):
    return LoraConfig(
        r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM", init_lora_weights=init, **kwargs
    )


def base_weights(model):
    """The packed weights under adapters, by their names without these."""
    names = {
        name: name.replace("base_model.model.", "").replace(".base_layer", "")
        for name in packed_weights(model)
    }
    return {names[name]: tensor for name, tensor in packed_weights(model).items()}


def step_bound(weight, layer):
    """What quantising `weight` again may change: half the widest step times the block's absmax, and, where scales are
    double-quantised, half a step of those (1/16 of their largest distance from the mean at most)."""
    state = layer.base_layer.quant_state
    gap = {"nf4": 1.0 - 0.6961928009986877, "fp4": 1.0 - 0.6666666865348816}[state.quant_type]
    blocks = weight.flatten().view(-1, state.blocksize)
    absmax = blocks.abs().amax(1)
    extra = (absmax - absmax.mean()).abs().max() / 16 if state.nested else 0.0
    return ((gap / 2 * absmax + extra)[:, None].expand_as(blocks)).reshape(weight.shape)


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_the_residual_and_the_adapter_add_up_to_the_dequantised_weight(init, dtype, quant):
    model = pair(dtype=dtype, **quant)[0]
    before = {
        name: m.dequantize(torch.float32) for name, m in model.named_modules() if hasattr(m, "quant_state")
    }
    old = {name: m.weight for name, m in model.named_modules() if hasattr(m, "quant_state")}
    model = get_peft_model(model, config(init))
    for path, layer in lora_layers(model).items():
        name = path.removeprefix("base_model.model.")
        update = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * layer.scaling["default"]
        residual = before[name] - update
        rounding = torch.finfo(dtype).eps * residual.abs()
        error = (layer.base_layer.dequantize(torch.float32) - residual).abs()
        assert (error <= step_bound(residual, layer) + 2 * rounding + 1e-6).all()
        assert update.norm() > 0.05 * before[name].norm()
        new, state = layer.base_layer.weight, old[name].quant_state
        for attribute in ("blocksize", "quant_type", "nested", "dtype", "shape"):
            assert getattr(new.quant_state, attribute) == getattr(state, attribute)
        assert new.dtype == old[name].dtype and new.shape == old[name].shape


def test_pissa_takes_the_largest_singular_directions():
    quantized, dense = pair()
    weight = dense.model.layers[0].self_attn.q_proj.weight.detach()
    layer = next(iter(lora_layers(get_peft_model(quantized, config("pissa"))).values()))
    update = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * layer.scaling["default"]
    u, s, v = torch.linalg.svd(weight)
    torch.testing.assert_close(update, (u[:, :4] * s[:4]) @ v[:4], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal", "eva"])
def test_initialisations_that_leave_the_weight_alone_change_no_byte(init):
    model = pair()[0]
    before = packed_weights(model)
    model = get_peft_model(model, config(init, **({"eva_config": peft.EvaConfig()} if init == "eva" else {})))
    assert_same_tensors(base_weights(model), before)
    layer = next(iter(lora_layers(model).values()))
    assert {p.dtype for p in layer.parameters() if p.requires_grad} == {torch.float32}
    if init != "orthogonal":
        assert not layer.lora_B["default"].weight.any()
    model(input_ids=tokens(), labels=tokens()).loss.backward()


def test_eva_initialises_from_data():
    model = get_peft_model(pair()[0], config("eva", eva_config=peft.EvaConfig(rho=1.0)))
    before = packed_weights(model)
    batches = [{"input_ids": tokens(4, 16, seed=seed)} for seed in range(4)]
    peft.initialize_lora_eva_weights(model, batches, show_progress_bar=False)
    assert_same_tensors(packed_weights(model), before)
    for layer in lora_layers(model).values():
        a = layer.lora_A["default"].weight
        torch.testing.assert_close(a @ a.T, torch.eye(4), atol=1e-4, rtol=0)


@pytest.mark.skipif(not hasattr(peft, "LoraGAConfig"), reason="a peft with LoRA-GA is not installed")
def test_lora_ga_reads_its_gradient_and_leaves_a_residual():
    quantized, dense = pair()
    for base in (quantized.model.layers[0].self_attn.q_proj, dense.model.layers[0].self_attn.q_proj):
        base._peft_loraga_grad = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    settings = config("lora_ga", lora_ga_config=peft.LoraGAConfig())
    settings.target_modules = {"q_proj"}
    before = quantized.model.layers[0].self_attn.q_proj.dequantize(torch.float32)
    layer = next(iter(lora_layers(get_peft_model(quantized, settings)).values()))
    assert not hasattr(layer.base_layer, "_peft_loraga_grad")
    residual = before - layer.get_delta_weight("default").detach()
    error = (layer.base_layer.dequantize(torch.float32) - residual).abs()
    assert (error <= step_bound(residual, layer) + 1e-6).all()
    assert not torch.equal(layer.base_layer.dequantize(torch.float32), before)


@pytest.mark.skipif(
    not hasattr(peft.tuners.lora.LoraLayer, "mica_init"), reason="a peft with MiCA is not installed"
)
@pytest.mark.parametrize("storage", ["uint8", "bfloat16"])
def test_mica_takes_its_directions_from_the_values_whatever_the_storage(storage):
    quantized, dense = pair(quant_storage=storage)
    before = packed_weights(quantized)
    expected = get_peft_model(dense, config("mica")).model.model.layers[0].self_attn.q_proj
    model = get_peft_model(quantized, config("mica"))
    found = model.model.model.layers[0].self_attn.q_proj
    assert torch.equal(found.lora_B["default"].weight, expected.lora_B["default"].weight)
    assert not found.lora_A["default"].weight.any()
    assert_same_tensors(base_weights(model), before)


@pytest.mark.parametrize("storage", ["uint8", "bfloat16"])
def test_corda_reads_what_was_prepared_and_leaves_a_residual(storage):
    """PEFT's preparation reads the weight itself, so it runs on the dequantised model; `eigens` is what it leaves."""
    quantized, dense = pair(quant_storage=storage)
    base = quantized.model.layers[0].self_attn.q_proj
    u, s, v = torch.linalg.svd(dense.model.layers[0].self_attn.q_proj.weight.detach())
    base.eigens = SimpleNamespace(U_WC=u[:, :4].clone(), S_WC=s[:4].clone(), V_WC=v[:4].T.clone())
    settings = config("corda", corda_config=CordaConfig())
    settings.target_modules = {"q_proj"}
    settings.layers_to_transform = [0]
    before = base.dequantize(torch.float32)
    layer = next(iter(lora_layers(get_peft_model(quantized, settings)).values()))
    assert not hasattr(layer.base_layer, "eigens")
    residual = before - layer.get_delta_weight("default").detach()
    error = (layer.base_layer.dequantize(torch.float32) - residual).abs()
    assert (error <= step_bound(residual, layer) + 1e-6).all()
    assert not torch.equal(layer.base_layer.dequantize(torch.float32), before)
    assert layer.base_layer.weight.dtype is getattr(torch, storage)


def test_loftq_is_refused_with_the_way_to_do_it():
    settings = config()
    settings.init_lora_weights, settings.loftq_config = "loftq", {"loftq_bits": 4, "loftq_iter": 1}
    with pytest.raises(ValueError, match=r"expected another initialisation, got 'loftq'.*qlora.loftq_init"):
        get_peft_model(pair()[0], settings)


@pytest.mark.parametrize("option", ["kasa_config", "velora_config", "use_bdlora"])
def test_variants_that_write_to_the_weight_are_refused(option):
    names = {"kasa_config": "KasaConfig", "velora_config": "VeloraConfig", "use_bdlora": "BdLoraConfig"}
    module = __import__("peft.tuners.lora.config", fromlist=["config"])
    if not hasattr(module, names[option]):
        pytest.skip(f"a peft with {names[option]} is not installed")
    extra = {"target_modules_bd_a": ["q_proj"]} if option == "use_bdlora" else {}
    quantized = pair()[0]
    before = packed_weights(quantized)
    with pytest.raises(ValueError, match="expected a 16-bit layer, got 4-bit"):
        get_peft_model(copy.deepcopy(quantized), config(**{option: getattr(module, names[option])(**extra)}))
    assert_same_tensors(packed_weights(quantized), before)


def test_a_weight_with_merged_adapters_is_not_initialised_from():
    model = get_peft_model(pair()[0], config())
    fill_adapters(model)
    model.merge_adapter()
    with pytest.raises(ValueError, match="PiSSA changes the weight: expected no merged adapter"):
        model.add_adapter("second", config("pissa"))


def test_a_saved_pissa_adapter_meets_the_residual_it_was_trained_on(tmp_path):
    """PEFT saves the initialisation's name and repeats it on loading: PiSSA's is the same every time."""
    model = get_peft_model(pair()[0], config("pissa"))
    expected = model(input_ids=tokens()).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(pair()[0], tmp_path)
    torch.testing.assert_close(loaded(input_ids=tokens()).logits, expected)
