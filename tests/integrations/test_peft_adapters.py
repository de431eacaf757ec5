"""Several adapters over one 4-bit model: mixed in a batch, swapped under torch.compile, mixed by X-LoRA; other tuners."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

peft = pytest.importorskip("peft", reason="peft is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from lora_models import (  # noqa: E402
    VOCABULARY,
    fill_adapters,
    lora_layers,
    packed_weights,
    pair,
    tiny_model,
    tokens,
)
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402

import qlora  # noqa: E402
from assertions import assert_close_by_depth, assert_same_tensors  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:lora with eva initialization used with low_cpu_mem_usage=False"),
]


def config(**kwargs: Any) -> LoraConfig:
    return LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **kwargs}
    )


def saved_adapter(directory: Path, seed: int, **kwargs: Any) -> Path:
    """An adapter, not zero, trained over nothing."""
    model = get_peft_model(tiny_model(), config(**kwargs))
    fill_adapters(model, seed)
    model.save_pretrained(directory)
    return directory


def logits(model: Any, ids: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens() if ids is None else ids, **kwargs).logits


# ---------------------------------------------------------------------------------------------------------------------
# Mixed batches


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"lora_bias": False, "lora_dropout": 0.1}])
def test_a_mixed_batch_of_three_adapters_of_different_ranks(options: dict[str, Any]) -> None:
    model = get_peft_model(pair()[0], config(**options), adapter_name="first")
    model.add_adapter("second", config(r=2, **options))
    model.add_adapter("third", config(r=8, lora_alpha=3, target_modules=["q_proj", "up_proj"], **options))
    fill_adapters(model)
    model.eval()
    names = ["second", "first", "__base__", "third", "first"]
    ids = tokens(batch=len(names))
    mixed = logits(model, ids, adapter_names=names)
    for index, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                expected = logits(model, ids[index : index + 1])
        else:
            model.set_adapter(name)
            expected = logits(model, ids[index : index + 1])
        assert_close_by_depth(mixed[index : index + 1], expected)
    generated = model.generate(
        input_ids=ids, adapter_names=names, max_new_tokens=3, min_new_tokens=3, do_sample=False
    )
    model.set_adapter("third")
    alone = model.generate(input_ids=ids[3:4], max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert torch.equal(generated[3:4], alone)


# ---------------------------------------------------------------------------------------------------------------------
# Hot-swap


@pytest.mark.skipif(
    tuple(map(int, peft.__version__.split(".")[:2])) < (0, 19),
    reason="peft 0.18 compiles 16-bit layers again too",
)
def test_hotswap_under_compile_compiles_nothing_again(tmp_path: Path) -> None:
    from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

    paths = [
        saved_adapter(tmp_path / str(rank), seed=rank, r=rank, lora_alpha=alpha)
        for rank, alpha in ((4, 8), (8, 3), (2, 16))
    ]
    model = PeftModel.from_pretrained(pair()[0], paths[0]).eval()
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    expected = [logits(PeftModel.from_pretrained(pair()[0], path).eval()) for path in paths]
    assert not torch.allclose(expected[0], expected[1])
    assert_close_by_depth(logits(compiled), expected[0])
    try:
        with torch.compiler.set_stance("fail_on_recompile"):
            for path, wanted in zip([*paths[1:], paths[0]], [*expected[1:], expected[0]], strict=True):
                hotswap_adapter(model, path, adapter_name="default", torch_device="cpu")
                assert_close_by_depth(logits(compiled), wanted)
    finally:
        torch._dynamo.reset()


# ---------------------------------------------------------------------------------------------------------------------
# X-LoRA


def xlora(base: Any, directory: Path) -> Any:
    adapters = {str(seed): str(directory / f"expert-{seed}") for seed in (0, 1)}  # numbered, as PEFT wants
    settings = peft.XLoraConfig(
        task_type="CAUSAL_LM", hidden_size=64, xlora_depth=2, xlora_size=16, adapters=adapters
    )
    base.config.use_cache = False
    torch.manual_seed(0)
    return get_peft_model(base, settings)


def test_xlora_over_4_bit_layers_mixes_and_trains_as_over_the_dense_ones(tmp_path: Path) -> None:
    for seed in (0, 1):
        saved_adapter(tmp_path / f"expert-{seed}", seed, target_modules=["q_proj", "down_proj"])
    quantized, dense = pair()
    before = packed_weights(quantized)
    ours, theirs = (xlora(base, tmp_path).train() for base in (quantized, dense))
    assert len(lora_layers(ours)) == 4
    losses = []
    for model in (ours, theirs):
        torch.manual_seed(7)  # the classifier drops out
        result = model(input_ids=tokens(), labels=tokens())
        result.loss.backward()
        losses.append(result.loss)
    assert_close_by_depth(losses[0], losses[1])
    gradients = [{n: p.grad for n, p in m.named_parameters() if p.requires_grad} for m in (ours, theirs)]
    assert gradients[0].keys() == gradients[1].keys()
    assert any("xlora_classifier" in name for name in gradients[0])
    assert any(gradient.any() for gradient in gradients[1].values())
    largest = max(gradient.abs().max().item() for gradient in gradients[1].values())
    for name, gradient in gradients[1].items():
        assert_close_by_depth(gradients[0][name], gradient, factor=8, scale=largest)
    base = ours.base_model.lora_model.model
    after = {name.replace(".base_layer", ""): tensor for name, tensor in base.state_dict().items()}
    assert_same_tensors({name: after[name] for name in before}, before)
    ours.eval()
    generated = ours.generate(input_ids=tokens(), max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert generated.shape == (2, 14) and int(generated.max()) < VOCABULARY


# ---------------------------------------------------------------------------------------------------------------------
# LoftQ and merges of initialised adapters


@pytest.mark.parametrize("quant", [{}, {"quant_type": "fp4", "block_size": 128, "double_quant": False}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loftq_in_turns_keeps_block_size_code_scales_and_dtype(
    quant: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    tiny_model(dtype=dtype).save_pretrained(tmp_path)
    model = get_peft_model(pair(dtype=dtype, **quant)[0], config())
    before = {name: layer.base_layer.weight for name, layer in lora_layers(model).items()}
    qlora.loftq_init(model, tmp_path, iterations=3)
    changed = False
    for name, layer in lora_layers(model).items():
        new, old = layer.base_layer.weight, before[name]
        changed |= not torch.equal(new.data, old.data)
        for attribute in ("blocksize", "quant_type", "nested", "dtype", "shape"):
            assert getattr(new.quant_state, attribute) == getattr(old.quant_state, attribute)
        assert (new.dtype, new.shape) == (old.dtype, old.shape)
    assert changed


def test_pefts_own_function_for_loftq_serves_our_layers(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    exact = logits(tiny_model())
    model = get_peft_model(pair()[0], config(r=16))
    other = copy.deepcopy(model)
    before = (logits(model) - exact).norm()
    names = []
    peft.replace_lora_weights_loftq(model, str(tmp_path / "model.safetensors"))
    assert (logits(model) - exact).norm() < 0.8 * before
    peft.replace_lora_weights_loftq(other, str(tmp_path), callback=lambda _, name: names.append(name))
    assert torch.equal(logits(other), logits(get_peft_model(pair()[0], config(r=16))))  # none was kept
    assert len(names) == 14 and names[0] == "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("init", ["pissa", "olora", "eva", "gaussian", "loftq"])
def test_an_initialised_adapter_merges_to_16_bits_and_unmerges_exactly(init: str, tmp_path: Path) -> None:
    extra = {"eva_config": peft.EvaConfig()} if init == "eva" else {}
    model = get_peft_model(pair()[0], config(init_lora_weights=True if init == "loftq" else init, **extra))
    if init == "loftq":
        tiny_model().save_pretrained(tmp_path)
        qlora.loftq_init(model, tmp_path)
    elif init == "eva":
        peft.initialize_lora_eva_weights(model, [{"input_ids": tokens()}] * 2, show_progress_bar=False)
    for layer in lora_layers(model).values():
        layer.lora_B["default"].weight.data.add_(0.01)
    before, expected = packed_weights(model), logits(model)
    model.merge_adapter()
    assert not torch.equal(logits(model), expected)
    model.unmerge_adapter()
    assert_same_tensors(packed_weights(model), before)
    assert_close_by_depth(logits(qlora.merge_and_unload(model, torch.float32)), expected)


# ---------------------------------------------------------------------------------------------------------------------
# PEFT's other tuners

TARGETS = ["q_proj", "down_proj"]
TUNERS = {
    "vera": lambda: peft.VeraConfig(r=8, target_modules=["q_proj"]),
    "oft": lambda: peft.OFTConfig(oft_block_size=8, target_modules=TARGETS, use_cayley_neumann=False),
    "boft": lambda: peft.BOFTConfig(boft_block_size=8, target_modules=TARGETS),
    "miss": lambda: peft.MissConfig(r=4, target_modules=TARGETS),
    "shira": lambda: peft.ShiraConfig(r=4, target_modules=TARGETS, random_seed=1),
    "ia3": lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
    "adalora": lambda: peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=TARGETS),
    "randlora": lambda: peft.RandLoraConfig(r=4, target_modules=["q_proj"]),
    "road": lambda: peft.RoadConfig(group_size=8, target_modules=TARGETS),
    "hira": lambda: peft.HiraConfig(r=4, target_modules=TARGETS),
    "loha": lambda: peft.LoHaConfig(r=4, alpha=8, target_modules=TARGETS),
    "lokr": lambda: peft.LoKrConfig(r=4, alpha=8, target_modules=TARGETS),
    "gralora": lambda: peft.GraloraConfig(r=8, gralora_k=2, target_modules=TARGETS),
    "pvera": lambda: peft.PveraConfig(r=8, target_modules=["q_proj"]),
    "unilora": lambda: peft.UniLoraConfig(r=4, theta_d_length=64, target_modules=TARGETS),
    "waveft": lambda: peft.WaveFTConfig(n_frequency=40, scaling=20.0, target_modules=TARGETS),
    "fourierft": lambda: peft.FourierFTConfig(n_frequency=40, scaling=20.0, target_modules=TARGETS),
}
#: These reach the weight through PEFT's quantisation backends.
BY_BACKEND = ("vera", "oft", "boft", "miss", "shira")


def tuned(base: Any, settings: Any, names: tuple[str, ...] = ("default",)) -> Any:
    """With adapters that are not zero, the same over any base."""
    torch.manual_seed(0)
    model = get_peft_model(base, settings, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, settings)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in sorted(model.named_parameters()):
        if any(f".{adapter}" in name for adapter in names) and "base_layer" not in name:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model.eval()  # PVeRA samples in training


def needs(tuner: str) -> None:
    """Skips where the installed peft is too old for the tuner over 4-bit layers."""
    if tuner in BY_BACKEND:
        pytest.importorskip("peft.utils.quantization_utils", reason="a peft with backends is not installed")
    else:
        pytest.importorskip(f"peft.tuners.{tuner}", reason=f"a peft with {tuner} is not installed")


@pytest.mark.parametrize("tuner", TUNERS)
@pytest.mark.filterwarnings("ignore:.*CUDA")
def test_another_tuner_trains_as_over_the_dense_weights(tuner: str) -> None:
    needs(tuner)
    models = [tuned(base, TUNERS[tuner]()) for base in pair()]
    gradients = []
    for model in models:
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert_close_by_depth(logits(models[0]), logits(models[1]))
    assert gradients[0].keys() == gradients[1].keys()
    largest = max(gradient.abs().max().item() for gradient in gradients[1].values())
    assert largest > 0
    for name, gradient in gradients[1].items():
        assert_close_by_depth(gradients[0][name], gradient, factor=8, scale=largest)


@pytest.mark.parametrize("quant", [{}, {"quant_type": "fp4", "block_size": 32, "double_quant": False}])
@pytest.mark.parametrize("tuner", TUNERS)
@pytest.mark.filterwarnings("ignore:.*CUDA", "ignore:Already following adapters were merged")
def test_another_tuner_merges_into_4_bits_and_unmerges_exactly(tuner: str, quant: dict[str, Any]) -> None:
    needs(tuner)
    # VeRA's and RandLoRA's adapters share their projections; PEFT trains one AdaLoRA at a time.
    names = ("first",) if tuner in ("vera", "pvera", "randlora", "adalora") else ("first", "second")
    model = tuned(pair("qwen2", **quant)[0], TUNERS[tuner](), names)
    before, expected = packed_weights(model), logits(model)
    formats = {n: m.quant_state for n, m in model.named_modules() if isinstance(m, qlora.nn.Linear4bit)}
    for name in names:
        model.merge_adapter([name])
    merged = packed_weights(model)
    assert any(not torch.equal(merged[name], before[name]) for name in before)
    for name, old in formats.items():
        new = model.get_submodule(name).quant_state
        for attribute in ("blocksize", "quant_type", "nested", "dtype", "shape"):
            assert getattr(new, attribute) == getattr(old, attribute)
    model.unmerge_adapter()
    assert_same_tensors(packed_weights(model), before)
    assert torch.equal(logits(model), expected)
    model.merge_adapter([names[0]])
    model.unmerge_adapter()
    assert_same_tensors(packed_weights(model), before)


@pytest.mark.parametrize("tuner", TUNERS)
@pytest.mark.filterwarnings("ignore:.*CUDA")
def test_what_another_tuner_merges_is_quantised_from_the_exact_merge(tuner: str) -> None:
    needs(tuner)
    plain = qlora.QuantConfig(double_quant=False)
    model, exact = (tuned(base, TUNERS[tuner]()) for base in pair("qwen2", double_quant=False))
    model.merge_adapter()
    exact.merge_adapter()
    found = 0
    for name, module in model.named_modules():
        if isinstance(module, qlora.nn.Linear4bit) and name.endswith(".base_layer"):
            merged = exact.get_submodule(name)
            wanted = qlora.quantize_(copy.deepcopy(merged), plain).dequantize()
            # The merged values themselves may differ by rounding, and then a few codes by a step.
            assert ((module.dequantize() - wanted).abs() > 1e-6).float().mean() < 0.01
            if merged.bias is not None:
                assert_close_by_depth(module.bias, merged.bias)
            found += 1
    assert found == (4 if tuner not in ("vera", "pvera", "randlora") else 2)


@pytest.mark.parametrize("tuner", ["ia3", "road", "hira", "loha", "lokr", "gralora", "waveft", "fourierft"])
@pytest.mark.filterwarnings("ignore:Already following adapters were merged")
def test_adapters_of_another_tuner_merged_one_after_the_other_are_quantised_once(tuner: str) -> None:
    needs(tuner)
    together = tuned(pair("qwen2")[0], TUNERS[tuner](), ("first", "second"))
    apart = copy.deepcopy(together)
    before = packed_weights(together)
    together.merge_adapter(["first", "second"])
    apart.merge_adapter(["first"])
    alone = packed_weights(apart)
    apart.merge_adapter(["second"])
    assert_same_tensors(packed_weights(apart), packed_weights(together))
    assert any(not torch.equal(value, alone[name]) for name, value in packed_weights(apart).items())
    apart.unmerge_adapter()
    assert_same_tensors(packed_weights(apart), before)


@pytest.mark.parametrize(
    "tuner",
    [tuner for tuner in TUNERS if tuner not in ("oft", "boft")],  # PEFT's own solvers raise first
)
@pytest.mark.filterwarnings("ignore:.*CUDA", "ignore:Already following adapters were merged")
def test_a_merge_of_another_tuner_that_is_not_finite_changes_nothing(tuner: str) -> None:
    needs(tuner)
    model = tuned(pair("qwen2")[0], TUNERS[tuner]())
    layer = next(module for module in model.modules() if hasattr(module, "merged_adapters"))
    trained = {n: p.detach().clone() for n, p in layer.named_parameters() if p.requires_grad}
    before, expected = packed_weights(layer), logits(model)
    for name in trained:
        layer.get_parameter(name).data.fill_(torch.nan)
    with pytest.raises(ValueError, match="NaN"):
        layer.merge()
    assert not layer.merged
    assert_same_tensors(packed_weights(layer), before)
    for name, value in trained.items():
        layer.get_parameter(name).data.copy_(value)
    layer.merge()
    assert layer.merged
    assert any(not torch.equal(value, before[name]) for name, value in packed_weights(layer).items())
    layer.unmerge()
    assert_same_tensors(packed_weights(layer), before)
    assert torch.equal(logits(model), expected)
