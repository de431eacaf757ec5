"""qlora.prepare and qlora.add_lora."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

peft = pytest.importorskip("peft", reason="peft is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")
sys.path.insert(0, str(Path(__file__).parent / "integrations"))

from lora_models import fill_adapters, lora_layers, pair, tiny_model, tokens  # noqa: E402
from torch import nn  # noqa: E402

import qlora  # noqa: E402
from assertions import assert_same_tensors  # noqa: E402
from qlora.lazy_logits import LazyHead, LazyLogits  # noqa: E402
from qlora.loss import causal_lm_loss, compiled_causal_lm_loss  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6.*:FutureWarning"),
]


def losses_and_gradients(model, **kwargs):
    loss = model(input_ids=tokens(), labels=tokens(), **kwargs).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_nothing_is_cast_and_everything_is_frozen(dtype):
    model = pair(dtype=dtype)[0]
    before = {name: (p.dtype, p.data.clone()) for name, p in model.named_parameters()}
    assert qlora.prepare(model) is model
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad, name
        assert parameter.dtype == before[name][0] and torch.equal(parameter.data, before[name][1])


def test_adapters_stay_trainable_when_they_come_first():
    model = qlora.prepare(qlora.add_lora(pair()[0], r=4))
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trainable) == 2 * 14 and all("lora_" in name for name in trainable)
    injected = pair()[0]
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"]), injected)
    assert any(p.requires_grad for p in qlora.prepare(injected).parameters())


@pytest.mark.parametrize("order", ["prepare first", "adapter first"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_loss_and_gradients_equal_those_of_an_unprepared_model(order, kind):
    plain = qlora.add_lora(pair(kind)[0], r=4)
    if order == "prepare first":
        prepared = qlora.add_lora(qlora.prepare(pair(kind)[0]), r=4)
    else:
        prepared = qlora.prepare(qlora.add_lora(pair(kind)[0], r=4))
    for model in (plain, prepared):
        model.train()
        fill_adapters(model)
    loss, gradients = losses_and_gradients(prepared)
    expected_loss, expected = losses_and_gradients(plain)
    torch.testing.assert_close(loss, expected_loss)
    assert gradients.keys() == expected.keys()
    for name in expected:
        # Both round 16 products deep in float32.
        bound = 16 * 8 * torch.finfo(torch.float32).eps * expected[name].abs().max()
        assert (gradients[name] - expected[name]).abs().max() <= bound, name


def test_labels_masks_and_item_counts_mean_what_they_mean_to_transformers():
    plain, prepared = pair()[0].train(), qlora.prepare(pair()[0]).train()
    labels = tokens()
    labels[0, :6] = -100
    for extra in ({}, {"num_items_in_batch": torch.tensor(31)}, {"shift_labels": labels.roll(-1)}):
        got = prepared(input_ids=tokens(), labels=labels, **extra).loss
        torch.testing.assert_close(got, plain(input_ids=tokens(), labels=labels, **extra).loss)


def test_training_computes_no_logits_unless_somebody_reads_them():
    model = qlora.prepare(pair()[0]).train()
    model.model.embed_tokens.weight.requires_grad_(True)  # something to have a gradient
    output = model(input_ids=tokens(), labels=tokens())
    assert isinstance(output.logits, LazyLogits) and not output.logits.is_computed
    expected = pair()[0](input_ids=tokens()).logits
    assert torch.equal(output.logits.detach(), expected)
    model.eval()
    assert type(model(input_ids=tokens()).logits) is torch.Tensor


def test_a_softcapped_model_keeps_its_loss():
    """Gemma-2 passes its logits through a tanh, which computes them: correct, and merely not lazy."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        **dict(vocab_size=160, hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=16),
        **dict(num_attention_heads=4, num_key_value_heads=2, final_logit_softcapping=0.5),
    )
    plain = Gemma2ForCausalLM(config).train()
    prepared = qlora.prepare(copy.deepcopy(plain))
    prepared.model.embed_tokens.weight.requires_grad_(True)
    expected, _ = losses_and_gradients(plain)
    got, _ = losses_and_gradients(prepared)
    torch.testing.assert_close(got, expected)


def test_a_trainable_head_gets_its_gradient():
    model = qlora.add_lora(
        qlora.prepare(pair()[0]), r=4, targets=["q_proj"], modules_to_save=["lm_head"]
    ).train()
    expected = qlora.add_lora(pair()[0], r=4, targets=["q_proj"], modules_to_save=["lm_head"]).train()
    for each in (model, expected):
        fill_adapters(each)
    _, gradients = losses_and_gradients(model)
    _, wanted = losses_and_gradients(expected)
    heads = [name for name in wanted if "lm_head" in name]
    assert heads
    for name in heads:
        torch.testing.assert_close(gradients[name], wanted[name], atol=1e-6, rtol=1e-4)


def test_checkpointing_is_non_reentrant_and_only_when_asked():
    model = qlora.prepare(pair()[0])
    layer = model.model.layers[0]
    assert layer.gradient_checkpointing
    assert layer._gradient_checkpointing_func.keywords == {"use_reentrant": False}
    assert not model.config.use_cache
    assert not getattr(model, "_require_grads_hooks", None)
    model = qlora.prepare(pair()[0], gradient_checkpointing=False)
    assert not model.model.layers[0].gradient_checkpointing and model.config.use_cache


@pytest.mark.filterwarnings("ignore:.*use_reentrant.*")
def test_reentrant_checkpointing_gets_inputs_with_gradients():
    plain = qlora.add_lora(qlora.prepare(pair()[0], gradient_checkpointing=False), r=4).train()
    model = qlora.add_lora(qlora.prepare(pair()[0], use_reentrant=True), r=4).train()
    for each in (plain, model):
        fill_adapters(each)
    assert_same_tensors(losses_and_gradients(model)[1], losses_and_gradients(plain)[1])


def test_checkpointing_recomputes_activations():
    model = qlora.add_lora(qlora.prepare(pair()[0]), r=4).train()
    calls = []
    model.base_model.model.model.layers[1].mlp.gate_proj.register_forward_hook(lambda *_: calls.append(1))
    losses_and_gradients(model)
    assert len(calls) == 2


def test_generation_still_uses_a_cache_and_gives_the_same_tokens():
    plain, model = pair()[0], qlora.prepare(pair()[0])
    options = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    output = model.eval().generate(tokens(), return_dict_in_generate=True, **options)
    assert torch.equal(output.sequences, plain.generate(tokens(), **options))
    assert output.past_key_values is not None


def test_the_compiled_loss_of_a_copy_is_still_known():
    model = qlora.prepare(tiny_model(), compile=True)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.loss_function is compiled_causal_lm_loss
        assert qlora.prepare(twin).loss_function is causal_lm_loss


def test_low_memory_loss_can_be_left_out():
    model = qlora.prepare(pair()[0], low_memory_loss=False)
    assert type(model.lm_head) is nn.Linear and not hasattr(model, "_loss_function")


def test_a_copied_and_a_saved_model_keep_working(tmp_path):
    model = qlora.prepare(tiny_model())
    assert type(copy.deepcopy(model).lm_head) is LazyHead
    model.save_pretrained(tmp_path)
    from transformers import AutoModelForCausalLM

    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path).lm_head.weight, model.lm_head.weight)


def test_a_model_without_checkpointing_is_told_so():
    with pytest.raises(
        ValueError, match="gradient_checkpointing: expected a transformers model.*got Sequential"
    ):
        qlora.prepare(nn.Sequential(nn.Linear(2, 2)))
    frozen = qlora.prepare(nn.Sequential(nn.Linear(2, 2)), gradient_checkpointing=False)
    assert not any(p.requires_grad for p in frozen.parameters())


def test_accelerate_autocast_wrapping_computes_no_logits():
    """accelerate casts a model's outputs to float32, which would compute the logits just to cast them."""
    operations = pytest.importorskip("accelerate.utils.operations", reason="accelerate is not installed")
    model = qlora.prepare(pair(dtype=torch.bfloat16)[0]).train()
    model.model.embed_tokens.weight.requires_grad_(True)
    forward = operations.convert_outputs_to_fp32(model.forward)
    output = forward(input_ids=tokens(), labels=tokens())
    assert output.logits.dtype is torch.float32 and not output.logits.is_computed


# ---------------------------------------------------------------------------------------------------------------------
# add_lora


def test_add_lora_targets_every_linear_with_rank_16_and_scale_1():
    model = qlora.add_lora(pair()[0])
    layers = lora_layers(model)
    assert len(layers) == 14
    assert {(layer.r["default"], layer.scaling["default"]) for layer in layers.values()} == {(16, 1.0)}
    assert model.peft_config["default"].task_type == "CAUSAL_LM"


def test_add_lora_passes_its_settings_on():
    model = qlora.add_lora(
        pair()[0], 4, 8, ["q_proj", "self_attn.v_proj"], 0.1, rslora=True, adapter_name="mine", bias="none"
    )
    settings = model.peft_config["mine"]
    assert settings.target_modules == {"q_proj", "self_attn.v_proj"}
    assert (settings.lora_dropout, settings.use_rslora, settings.lora_alpha) == (0.1, True, 8)
    assert next(iter(lora_layers(model).values())).scaling["mine"] == 4.0
    assert len(lora_layers(qlora.add_lora(pair()[0], targets="q_proj"))) == 2
    assert len(lora_layers(qlora.add_lora(pair()[0], targets=r".*layers\.1\..*_proj"))) == 7
    assert lora_layers(qlora.add_lora(pair()[0], dora=True))


@pytest.mark.parametrize("dora", [False, True])
def test_add_lora_keeps_adapters_in_the_dtype_asked_for(dora):
    model = qlora.add_lora(pair(dtype=torch.bfloat16)[0], dtype=torch.bfloat16, dora=dora)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            magnitude = "lora_magnitude" in name
            assert parameter.dtype is (torch.float32 if magnitude else torch.bfloat16)
    losses_and_gradients(model.train())


def test_add_lora_works_on_a_16_bit_model():
    model = qlora.add_lora(tiny_model(), r=2)
    assert not lora_layers(model)
    losses_and_gradients(model.train())


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"r": 0}, ValueError, "r: expected an integer of at least 1, got 0"),
        ({"r": 2.5}, ValueError, "r: expected an integer of at least 1, got 2.5"),
        ({"dtype": torch.int8}, ValueError, "dtype: expected float32"),
        ({"targets": ["q_prj"]}, ValueError, "targets: .* got 'q_prj'; did you mean 'q_proj'"),
        ({"targets": ["q_proj", "gate"]}, ValueError, "got 'gate'; did you mean 'gate_proj'"),
        ({"targets": ["xyz123"]}, ValueError, "got 'xyz123'; it has .*down_proj"),
        ({"targets": "q_prj"}, ValueError, "did you mean 'q_proj'"),
        ({"targets": r".*q_prj$"}, ValueError, "expected a pattern of a whole module path"),
        ({"targets": []}, ValueError, "expected at least one name"),
        (
            {"use_dorra": True},
            TypeError,
            "use_dorra: expected a field of peft.LoraConfig, .*did you mean 'use_dora'",
        ),
        ({"lora_alpha": 3}, TypeError, "lora_alpha: expected as alpha="),
        ({"target_modules": ["q_proj"]}, TypeError, "target_modules: expected as targets="),
    ],
)
def test_add_lora_says_what_is_wrong_and_what_is_near(kwargs, error, message):
    model = pair()[0]
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(error, match=message):
        qlora.add_lora(model, **kwargs)
    assert [name for name, _ in model.named_modules()] == names


VANILLA = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
directory, *names = sys.argv[1:]
ids = torch.load(f"{directory}/ids")
for name in names:
    base = AutoModelForCausalLM.from_pretrained(f"{directory}/base")
    model = PeftModel.from_pretrained(base, f"{directory}/{name}").eval()
    with torch.no_grad():
        torch.save(model(input_ids=ids).logits, f"{directory}/{name}.logits")
assert not any(name.split(".")[0] == "qlora" for name in sys.modules)
"""


def test_peft_without_qlora_loads_the_adapters_and_computes_the_same(tmp_path):
    cases = {"lora": {}, "rslora": {"rslora": True}, "dora": {"dora": True}}
    expected = {}
    for name, options in cases.items():
        quantized, dense = pair("qwen2")
        dense.save_pretrained(tmp_path / "base")
        model = qlora.add_lora(qlora.prepare(quantized), r=4, alpha=8, **options).train()
        fill_adapters(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(2):
            losses_and_gradients(model)
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(tmp_path / name)
        with torch.no_grad():
            expected[name] = model.eval()(input_ids=tokens()).logits
    torch.save(tokens(), tmp_path / "ids")
    subprocess.run([sys.executable, "-c", VANILLA, str(tmp_path), *cases], check=True, cwd=tmp_path)
    for name, wanted in expected.items():
        error = (torch.load(tmp_path / f"{name}.logits") - wanted).abs().max()
        assert error <= 16 * torch.finfo(torch.float32).eps * wanted.abs().max(), name
