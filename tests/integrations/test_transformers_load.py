"""Loading through transformers: which configurations come here, and what becomes of the model."""

from __future__ import annotations

import logging
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import NAMES, logits, make_model, run_python, saved, tokens

import qlora
from assertions import assert_bitwise_equal
from qlora import QuantConfig, report
from qlora.nn import Embedding4bit, Linear4bit, Params4bit

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
from qlora.integrations import transformers as integration  # noqa: E402

AutoModel = transformers.AutoModelForCausalLM


def linear_names(model: torch.nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, Linear4bit)}


@pytest.mark.parametrize("name", NAMES)
def test_a_quant_config_quantises_all_linear_layers_but_the_head(
    name: str, tmp_path: Path, device: str
) -> None:
    model = AutoModel.from_pretrained(
        saved(tmp_path, name),
        quantization_config=QuantConfig(compute_dtype="float32"),
        device_map={"": device},
    )
    dense = make_model(name)
    expected = {
        module_name
        for module_name, module in dense.named_modules()
        if (isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D")
        and module_name != "lm_head"
    }
    assert linear_names(model) == expected
    assert expected
    for module in model.modules():
        if isinstance(module, Linear4bit):
            assert module.weight.device.type == device
            assert module.quant_state is not None
            assert (
                module.quant_state.quant_type,
                module.quant_state.blocksize,
                module.quant_state.nested,
            ) == (
                *("nf4", 64),
                True,
            )
    change = (logits(model).cpu() - logits(dense)).norm() / logits(dense).norm()
    assert 0 < change < 0.3


def test_the_quantised_weights_are_those_of_quantize(tmp_path: Path, device: str) -> None:
    path = saved(tmp_path)
    loaded = AutoModel.from_pretrained(path, quantization_config=QuantConfig(), device_map={"": device})
    converted = qlora.quantize_(AutoModel.from_pretrained(path), QuantConfig(), device=device)
    a, b = loaded.state_dict(), converted.state_dict()
    assert a.keys() == b.keys()
    for key in a:
        assert_bitwise_equal(a[key], b[key])


@pytest.mark.parametrize(
    "config",
    [
        QuantConfig("fp4", 128, double_quant=False),
        QuantConfig(block_size=32, quant_storage="bfloat16"),
        QuantConfig(compute_dtype="bfloat16"),
    ],
)
def test_settings_reach_the_layers(config: QuantConfig, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(saved(tmp_path), quantization_config=config, dtype=torch.bfloat16)
    layer = model.model.layers[0].mlp.up_proj
    state = layer.quant_state
    assert (state.quant_type, state.blocksize, state.nested) == (
        *(config.quant_type, config.block_size),
        config.double_quant,
    )
    assert (state.dtype, layer.weight.dtype) == (torch.bfloat16, config.torch_quant_storage)
    assert layer.compute_dtype is config.resolve_compute_dtype("cpu")
    assert logits(model).dtype == torch.bfloat16


def test_skip_modules_add_to_the_default_and_the_checkpoint_lists_all(tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(
        saved(tmp_path), quantization_config=QuantConfig(skip_modules=["down_proj"])
    )
    assert {name.rpartition(".")[2] for name in linear_names(model)} == {
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj"),
    }
    assert sorted(model.config.quantization_config.llm_int8_skip_modules) == [
        "lm_head",
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.down_proj",
    ]


def test_head_and_embeddings_are_quantised_on_request_unless_tied(tmp_path: Path) -> None:
    config = QuantConfig(quantize_head=True, quantize_embeddings=True)
    model = AutoModel.from_pretrained(saved(tmp_path), quantization_config=config)
    assert type(model.lm_head) is Linear4bit
    assert type(model.model.embed_tokens) is Embedding4bit
    tied = AutoModel.from_pretrained(saved(tmp_path, "qwen2"), quantization_config=config)
    assert type(tied.lm_head) is torch.nn.Linear
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert "tied to lm_head" in str(report(tied))


def test_conv1d_weights_are_quantised_transposed_and_come_back(tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(saved(tmp_path, "gpt2"), quantization_config=QuantConfig())
    dense = make_model("gpt2").transformer.h[0].attn.c_attn.weight
    layer = model.transformer.h[0].attn.c_attn
    assert layer.weight_shape() == tuple(dense.T.shape)
    assert (layer.dequantize() - dense.T).abs().max() < 0.16 * dense.abs().max()
    plain = model.dequantize()
    assert type(plain.transformer.h[0].attn.c_attn).__name__ == "Conv1D"
    plain.save_pretrained(tmp_path / "plain")
    assert_bitwise_equal(logits(AutoModel.from_pretrained(tmp_path / "plain")), logits(plain))


def test_experts_stay_in_16_bits_and_that_is_said_loudly(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="qlora"):
        model = AutoModel.from_pretrained(saved(tmp_path, "mixtral"), quantization_config=QuantConfig())
    assert "of expert weights are NOT quantised: they are 3-D parameters" in caplog.text
    assert "model.layers.0.mlp.experts.gate_up_proj" in caplog.text
    assert len(report(model).experts) == 4


def test_one_line_says_what_was_quantised(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path)
    capfd.readouterr()
    AutoModel.from_pretrained(path, quantization_config=QuantConfig())
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("qlora:")]
    assert len(lines) == 1
    assert "14 layers, 73.73 k weights in NF4 block 64 double-quantised, 4.14 bits a weight" in lines[0]
    assert "output head 65.54 kB" in lines[0]


def test_modules_that_the_model_wants_in_float32_stay_so(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=128, d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4, decoder_start_token_id=0
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    model = transformers.T5ForConditionalGeneration.from_pretrained(
        tmp_path / "t5", quantization_config=QuantConfig(), dtype=torch.float16
    )
    layer = model.encoder.block[0].layer[1].DenseReluDense
    assert type(layer.wi) is Linear4bit
    assert type(layer.wo) is torch.nn.Linear
    assert layer.wo.weight.dtype == torch.float32
    model.save_pretrained(tmp_path / "t5q")
    again = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "t5q", dtype=torch.float16)
    assert again.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == torch.float32
    assert again.encoder.block[0].layer[0].layer_norm.weight.dtype == torch.float16
    assert_bitwise_equal(again.encoder.block[0].layer[1].DenseReluDense.wo.weight, layer.wo.weight)


# ---------------------------------------------------------------------------------------------------------------------
# Which configurations come here.

BITSANDBYTES = """
import torch, transformers, qlora
from tiny_models import logits
config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_use_double_quant=True)
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=config)
layer = model.model.layers[0].mlp.up_proj
print(type(model.hf_quantizer).__name__, layer.quant_state.quant_type, layer.quant_state.nested, layer.compute_dtype)
print(model.quantization_method.value, hasattr(model, 'is_loaded_in_4bit'), 'bitsandbytes' in str(logits(model)))
"""


def test_an_unchanged_bitsandbytes_config_comes_here_where_bitsandbytes_is_not_installed(
    tmp_path: Path,
) -> None:
    out = run_python(BITSANDBYTES, saved(tmp_path), without=("bitsandbytes",)).splitlines()
    assert out == ["QloraHfQuantizer nf4 True torch.float32", "bitsandbytes False False"]


@pytest.mark.usefixtures("enabled")
def test_a_bitsandbytes_config_comes_here_after_enable(tmp_path: Path) -> None:
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModel.from_pretrained(saved(tmp_path), quantization_config=config)
    assert isinstance(model.hf_quantizer, integration.QloraHfQuantizer)
    assert type(model.model.layers[0].mlp.up_proj) is Linear4bit


def test_an_installed_bitsandbytes_keeps_its_own_config_without_enable() -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    code = (
        "import qlora, transformers\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as m\n"
        "print(m['bitsandbytes_4bit'].__name__); qlora.enable(); print(m['bitsandbytes_4bit'].__name__)"
    )
    assert run_python(code).split() == ["Bnb4BitHfQuantizer", "QloraHfQuantizer"]


@pytest.mark.usefixtures("enabled")
def test_a_skip_list_of_a_bitsandbytes_config_replaces_the_default(tmp_path: Path) -> None:
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["down_proj"])
    model = AutoModel.from_pretrained(saved(tmp_path), quantization_config=config)
    assert type(model.lm_head) is Linear4bit
    assert type(model.model.layers[0].mlp.down_proj) is torch.nn.Linear


@pytest.mark.usefixtures("enabled")
def test_the_one_liner_loads_with_our_defaults(tmp_path: Path) -> None:
    path = saved(tmp_path)
    model = AutoModel.from_pretrained(path, load_in_4bit=True, dtype=torch.bfloat16)
    state = model.model.layers[0].mlp.up_proj.quant_state
    assert (state.quant_type, state.nested, state.dtype) == ("nf4", True, torch.bfloat16)
    model = transformers.LlamaForCausalLM.from_pretrained(path, load_in_4bit=True, bnb_4bit_quant_type="fp4")
    assert model.model.layers[0].mlp.up_proj.quant_state.quant_type == "fp4"
    assert type(AutoModel.from_pretrained(path, load_in_4bit=False).lm_head) is torch.nn.Linear


@pytest.mark.usefixtures("enabled")
def test_the_one_liner_together_with_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="load_in_4bit: expected either load_in_4bit=True or quantization_config"
    ):
        AutoModel.from_pretrained(saved(tmp_path), load_in_4bit=True, quantization_config=QuantConfig())
    with pytest.raises(
        ValueError, match="unknown key 'bnb_4bit_quant_typ': did you mean 'bnb_4bit_quant_type'"
    ):
        AutoModel.from_pretrained(saved(tmp_path), load_in_4bit=True, bnb_4bit_quant_typ="nf4")


# ---------------------------------------------------------------------------------------------------------------------
# What other parts of transformers ask.


def test_the_model_answers_what_trainer_and_generate_ask(tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(saved(tmp_path), quantization_config=QuantConfig())
    assert model.is_quantized
    assert (
        model.quantization_method == transformers.utils.quantization_config.QuantizationMethod.BITS_AND_BYTES
    )
    assert model.hf_quantizer.is_trainable
    assert model.hf_quantizer.is_compileable
    assert model.hf_quantizer.is_serializable()
    assert getattr(model, "is_loaded_in_4bit", False) == transformers.utils.is_bitsandbytes_available()
    assert model.dtype == torch.float32
    assert model.generate(tokens(), max_new_tokens=3, min_new_tokens=3, do_sample=False).shape == (1, 23)
    assert model.to("cpu") is model
    with pytest.raises(ValueError, match="cast"):
        model.to(torch.float16)


@pytest.mark.parametrize("name", NAMES)
def test_num_parameters_counts_weights_and_not_bytes(name: str, tmp_path: Path) -> None:
    dense = make_model(name)
    model = AutoModel.from_pretrained(saved(tmp_path, name), quantization_config=QuantConfig())
    assert model.num_parameters() == dense.num_parameters()
    assert model.num_parameters(exclude_embeddings=True) == dense.num_parameters(exclude_embeddings=True)
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    assert model.num_parameters(only_trainable=True) == model.lm_head.weight.numel()


def test_sizes_for_device_maps_are_those_of_4_bit_weights(tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(saved(tmp_path), quantization_config=QuantConfig())
    name = "model.layers.0.mlp.up_proj.weight"
    assert (
        model.hf_quantizer.param_element_size(model, name, model.lm_head.weight) == 0.5 + (1 + 4 / 256) / 64
    )
    assert model.hf_quantizer.param_element_size(model, "lm_head.weight", model.lm_head.weight) == 4


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_a_peft_model_passes_trainers_check(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from transformers.trainer_utils import validate_quantization_for_training

    model = AutoModel.from_pretrained(saved(tmp_path), quantization_config=QuantConfig())
    with pytest.raises(ValueError, match="adapters"):
        validate_quantization_for_training(model)
    validate_quantization_for_training(
        peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
    )


def test_a_mixed_device_map_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"device_map: expected GPUs only, or the CPU only, got \['cpu', 'disk'\]"
    ):
        AutoModel.from_pretrained(
            saved(tmp_path),
            quantization_config=QuantConfig(),
            device_map={"model.embed_tokens": "cpu", "model": "disk", "lm_head": "cpu"},
        )


@pytest.mark.parametrize("device_map", [None, "auto", {"": "cpu"}])
def test_device_maps_are_taken_as_always(device_map: Any, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = AutoModel.from_pretrained(
        saved(tmp_path), quantization_config=QuantConfig(), device_map=device_map
    )
    assert linear_names(model)
    assert logits(model).isfinite().all()


def test_dequantize_gives_back_an_ordinary_model(tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(saved(tmp_path), quantization_config=QuantConfig())
    model.save_pretrained(tmp_path / "q")  # turns config.dtype into a name
    expected = logits(model)
    plain = model.dequantize()
    assert not linear_names(plain)
    assert not plain.is_quantized
    assert not hasattr(plain, "hf_quantizer")
    assert not getattr(plain, "is_loaded_in_4bit", False)
    torch.testing.assert_close(logits(plain), expected, rtol=1e-5, atol=1e-6)
    plain.save_pretrained(tmp_path / "plain")
    assert_bitwise_equal(logits(AutoModel.from_pretrained(tmp_path / "plain")), logits(plain))


# ---------------------------------------------------------------------------------------------------------------------
# Memory.


def test_no_more_than_one_16_bit_weight_is_alive_while_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path)
    alive: list[weakref.ref[torch.Tensor]] = []
    counts = []
    original = Params4bit.quantize_on

    def counting(self: Params4bit, *args: Any, **kwargs: Any) -> Params4bit:
        alive.append(weakref.ref(self.untyped_storage()))
        counts.append(sum(storage() is not None for storage in alive))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Params4bit, "quantize_on", counting)
    AutoModel.from_pretrained(path, quantization_config=QuantConfig())
    assert counts == [1] * 14


@pytest.mark.gpu
def test_gpu_memory_while_loading_is_the_4_bit_model_and_less_than_one_weight(tmp_path: Path) -> None:
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 6}
    path = saved(tmp_path, **sizes, dtype="bfloat16")
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = AutoModel.from_pretrained(
        path, quantization_config=QuantConfig(), dtype=torch.bfloat16, device_map={"": 0}
    )
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated() - before
    from qlora.integrations.streaming import CHUNK_BYTES, NUM_WORKERS

    found = report(model)
    assert held < 1.05 * (found.num_bytes + found.num_bytes_kept) + 2**22
    # Two chunks a worker, the codes and scales of one, and fp32 scales of the weights under way.
    beside = NUM_WORKERS * (2.4 * CHUNK_BYTES + 8192 * 2048 // 64 * 4)
    assert torch.cuda.max_memory_allocated() - before - held < beside


@pytest.mark.gpu
def test_streamed_weights_equal_those_quantised_in_one_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora.integrations import streaming

    monkeypatch.setattr(streaming, "CHUNK_BYTES", 2**18)
    path = saved(tmp_path, hidden_size=1024, intermediate_size=1536, num_hidden_layers=1)
    config = QuantConfig(quant_storage="bfloat16")
    streamed = AutoModel.from_pretrained(path, quantization_config=config, device_map={"": 0}).state_dict()
    monkeypatch.setattr(streaming.WeightStreamer, "takes", staticmethod(lambda source, device: False))
    whole = AutoModel.from_pretrained(path, quantization_config=config, device_map={"": 0}).state_dict()
    assert streamed.keys() == whole.keys()
    for key in whole:
        assert torch.equal(streamed[key].view(torch.uint8), whole[key].view(torch.uint8)), key
