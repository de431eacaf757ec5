"""qlora.merge: a 16-bit checkpoint of base and adapter, and its report."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

peft = pytest.importorskip("peft", reason="peft is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
sys.path.insert(0, str(Path(__file__).parent / "integrations"))

from lora_models import fill_adapters, pair, tiny_model, tokens  # noqa: E402
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

import qlora  # noqa: E402
from qlora import checkpoint_writer  # noqa: E402
from qlora.merging import merge  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*`lora_bias=True` was passed but the targeted layer.*has no bias"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'. .* LoRA tensor.s. have invalid shape.*"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
]


def saved(tmp_path, kind="llama", dtype=torch.float32, scale=0.05, targets="all-linear", **options):
    """(base directory, adapter directory, PEFT model over the 16- or 32-bit base)."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model = tiny_model(kind, dtype)
    if options.pop("tied", False):
        model.config.tie_word_embeddings = True
        model.tie_weights()
    model.save_pretrained(base)
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", **options)
    model = get_peft_model(model, settings)
    fill_adapters(model, scale=scale)
    for name, parameter in model.named_parameters():
        if "lora_magnitude" in name:
            parameter.data *= 1.2
        elif "modules_to_save" in name:
            parameter.data += 0.01
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(adapter)
    return base, adapter, model


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=tokens()).logits


def assert_near(got, expected, roundings=16):
    bound = roundings * torch.finfo(torch.float32).eps * expected.abs().max()
    assert (got - expected).abs().max() <= bound


CASES = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "bias": {"kind": "qwen2", "lora_bias": True, "targets": ["q_proj", "v_proj"]},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.0.mlp.down_proj": 3}},
    "modules_to_save": {"modules_to_save": ["lm_head"], "targets": ["q_proj"]},
    "trained biases": {"kind": "qwen2", "bias": "all", "targets": ["q_proj"]},
    "embedding": {"targets": ["embed_tokens", "q_proj"]},
    "dora on an embedding": {"use_dora": True, "targets": ["embed_tokens", "q_proj"]},
    "tied head saved": {"tied": True, "modules_to_save": ["lm_head"], "targets": ["q_proj"]},
}


@pytest.mark.parametrize("case", CASES)
def test_merged_checkpoint_computes_what_the_adapter_computed(case, tmp_path):
    base, adapter, model = saved(tmp_path, **CASES[case])
    report = merge(adapter, out=tmp_path / "out", dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_near(logits(merged), logits(model))
    assert report.base == str(base) and report.num_tensors == len(
        load_file(tmp_path / "out" / "model.safetensors")
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_output_has_the_dtype_and_loses_one_rounding(dtype, tmp_path):
    _, adapter, model = saved(tmp_path)
    report = merge(adapter, out=tmp_path / "out", dtype=dtype)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == str(dtype).removeprefix("torch.")
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    exact = layer.base_layer.weight + layer.get_delta_weight("default")
    got = tensors["model.layers.0.self_attn.q_proj.weight"].float()
    unit = torch.finfo(dtype)
    assert ((got - exact).abs() <= unit.eps / 2 * exact.abs() * 1.01 + unit.smallest_normal * unit.eps).all()
    for found in report.layers:
        assert 0 < found.rounding_error < 1


def test_dequantized_mode_is_the_model_that_was_trained(tmp_path):
    _, adapter, _ = saved(tmp_path)
    report = merge(adapter, out=tmp_path / "out", dtype=torch.float32, mode="dequantized")
    trained = PeftModel.from_pretrained(pair()[0], adapter)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_near(logits(merged), logits(trained))
    assert all(layer.quantization_error > 0.01 for layer in report.layers)


def test_dequantized_mode_covers_layers_without_an_adapter(tmp_path):
    _, adapter, _ = saved(tmp_path, targets=["q_proj"])
    config = qlora.QuantConfig(quant_type="fp4", block_size=32)
    merge(adapter, out=tmp_path / "out", dtype=torch.float32, mode="dequantized", quant_config=config)
    trained = PeftModel.from_pretrained(pair(quant_type="fp4", block_size=32)[0], adapter)
    assert_near(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(trained))


def test_a_4bit_base_is_dequantised(tmp_path):
    _, adapter, _ = saved(tmp_path)
    quantized = pair(dtype=torch.float32)[0]
    directory = tmp_path / "base4"
    directory.mkdir()
    from safetensors.torch import save_file

    save_file(
        {k: v.contiguous() for k, v in quantized.state_dict().items()}, str(directory / "model.safetensors")
    )
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="mode: expected 'dequantized'.*got 'original'"):
        merge(adapter, directory, out=tmp_path / "out", dtype=torch.float32)
    report = merge(adapter, directory, out=tmp_path / "out", dtype=torch.float32, mode="dequantized")
    assert all(layer.quantization_error is None for layer in report.layers)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    trained = PeftModel.from_pretrained(quantized, adapter)
    assert_near(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(trained))


def test_report_measures_update_and_quantisation_error(tmp_path):
    _, adapter, model = saved(tmp_path)
    report = merge(adapter, out=tmp_path / "out")
    assert len(report.layers) == 14
    found = next(layer for layer in report.layers if layer.name == "model.layers.1.mlp.up_proj.weight")
    layer = model.base_model.model.model.layers[1].mlp.up_proj
    weight, update = layer.base_layer.weight, layer.get_delta_weight("default")
    assert found.update == pytest.approx((update.norm() / weight.norm()).item(), rel=1e-4)
    linear = torch.nn.Linear(*reversed(weight.shape), bias=False)
    linear.weight = layer.base_layer.weight
    error = (qlora.quantize_(linear).dequantize() - weight).norm() / weight.norm()
    assert found.quantization_error == pytest.approx(error.item(), rel=1e-4)
    assert found.error_to_update == pytest.approx(found.quantization_error / found.update)
    text = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert len(text["layers"]) == 14 and text["mode"] == "original"
    assert "merged 14 layers" in report.summary() and "times the update" in report.summary()
    assert merge(adapter, out=tmp_path / "out2", check=False).layers[0].quantization_error is None


def test_large_checkpoints_are_written_in_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_writer, "_SHARD_BYTES", 50_000)
    _, adapter, model = saved(tmp_path)
    merge(adapter, out=tmp_path / "out", dtype=torch.float32)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 2 and files == {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    assert_near(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model))


def test_tokenizer_files_come_from_the_adapter_where_it_has_them(tmp_path):
    base, adapter, _ = saved(tmp_path)
    (base / "tokenizer.json").write_text("base")
    (base / "vocab.txt").write_text("base")
    (adapter / "tokenizer.json").write_text("adapter")
    merge(adapter, out=tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "adapter"
    assert (tmp_path / "out" / "vocab.txt").read_text() == "base"
    assert not list((tmp_path / "out").glob("adapter*"))


@pytest.mark.parametrize("failure", ["nan", "disk full"])
def test_a_failed_merge_leaves_nothing(tmp_path, monkeypatch, failure):
    _, adapter, _ = saved(tmp_path)
    if failure == "nan":
        tensors = load_file(adapter / "adapter_model.safetensors")
        next(iter(tensors.values()))[0] = float("nan")
        from safetensors.torch import save_file

        save_file(tensors, str(adapter / "adapter_model.safetensors"))
    else:

        def full(*_, **__):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("safetensors.torch.save_file", full)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises((ValueError, OSError), match="expected finite values|No space left"):
        merge(adapter, out=tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_an_existing_directory_is_replaced_only_when_asked(tmp_path):
    _, adapter, _ = saved(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(FileExistsError, match="out: expected a new directory"):
        merge(adapter, out=tmp_path / "out")
    assert (tmp_path / "out" / "precious").exists()
    merge(adapter, out=tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "precious").exists() and (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda base, adapter: (adapter / "adapter_config.json").unlink(), "expected a saved adapter"),
        (
            lambda base, adapter: (adapter / "adapter_model.safetensors").unlink(),
            "expected adapter_model.safetensors",
        ),
        (lambda base, adapter: (base / "config.json").unlink(), "expected a model checkpoint"),
        (
            lambda base, adapter: (base / "model.safetensors").unlink(),
            "expected weights in model.safetensors",
        ),
        (lambda base, adapter: truncate(adapter / "adapter_model.safetensors"), "damaged or truncated"),
        (lambda base, adapter: truncate(base / "model.safetensors"), "damaged or truncated"),
        (lambda base, adapter: edit(adapter, peft_type="IA3"), "expected peft_type LORA, got 'IA3'"),
        (lambda base, adapter: edit(adapter, init_lora_weights="pissa"), "initialised by 'pissa'"),
        (lambda base, adapter: edit(adapter, target_parameters=["x"]), "cannot be merged into a checkpoint"),
        (lambda base, adapter: edit(adapter, base_model_name_or_path=None), "base: expected a base model"),
        (lambda base, adapter: rename_a_key(adapter), "are not in .* such as 'model.layers.9"),
        (lambda base, adapter: drop_a_key(adapter), "expected both matrices"),
    ],
)
def test_what_does_not_fit_gives_one_clear_error_and_no_output(tmp_path, break_it, message):
    base, adapter, _ = saved(tmp_path)
    break_it(base, adapter)
    with pytest.raises(ValueError, match=message):
        merge(adapter, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def edit(adapter, **values):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def rewrite(adapter, change):
    from safetensors.torch import save_file

    path = adapter / "adapter_model.safetensors"
    save_file(change(load_file(path)), str(path))


def rename_a_key(adapter):
    rewrite(adapter, lambda tensors: {name.replace("layers.0", "layers.9"): t for name, t in tensors.items()})


def drop_a_key(adapter):
    rewrite(adapter, lambda tensors: dict(list(tensors.items())[1:]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": torch.int8}, "dtype: expected bfloat16"),
        ({"mode": "nearest"}, "mode: expected 'original' or 'dequantized', got 'nearest'"),
    ],
)
def test_bad_arguments_say_what_came(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        merge(tmp_path, out=tmp_path / "out", **arguments)


def test_loftq_brings_the_model_nearer_to_the_16_bit_one(tmp_path):
    base, _, _ = saved(tmp_path)
    exact = logits(tiny_model())
    model = qlora.add_lora(pair()[0], r=16)
    plain = (logits(model) - exact).norm()
    packed = {name: p.clone() for name, p in model.named_parameters() if name.endswith("base_layer.weight")}
    errors = qlora.loftq_init(model, base)
    assert len(errors) == 14 and all(after < 0.8 * before for before, after in errors.values())
    assert (logits(model) - exact).norm() < 0.8 * plain
    assert all(torch.equal(p, packed[name]) for name, p in model.named_parameters() if name in packed)
    again = qlora.loftq_init(model, base, iterations=4)
    assert sum(after for _, after in again.values()) < sum(after for _, after in errors.values())


def test_loftq_takes_back_what_is_not_kept(tmp_path):
    base, _, _ = saved(tmp_path)
    model = qlora.add_lora(pair()[0], r=4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    qlora.loftq_init(model, base, iterations=2, keep=lambda model, name: False)
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("mode", ["original", "dequantized"])
def test_gpt2_whose_layers_are_stored_transposed(tmp_path, mode):
    """GPT-2's attention output is square, so that a wrong orientation would show in no shape."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=160, n_positions=64, n_embd=64, n_layer=2, n_head=4)
    base = transformers.GPT2LMHeadModel(config).eval()
    base.save_pretrained(tmp_path / "base")
    quantized = qlora.quantize_(base)
    model = qlora.add_lora(quantized, r=4, targets=["attn.c_proj", "c_fc"])
    fill_adapters(model)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["fan_in_fan_out"]
    merge(tmp_path / "adapter", out=tmp_path / "out", dtype=torch.float32, mode=mode)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    if mode == "dequantized":
        assert_near(logits(merged), logits(model))
    else:
        exact = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
        )
        assert_near(logits(merged), logits(exact))
    in_memory = qlora.merge_and_unload(model, torch.float32)
    assert type(in_memory.transformer.h[0].attn.c_proj).__name__ == "Conv1D"
