"""FSDP2 over 4-bit layers: packed bytes are sharded and come back to the bit, whatever dtype they are kept in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("peft", reason="peft is not installed")

from tiny_models import make_model, training_inputs
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import qlora
from qlora import QuantConfig
from qlora.nn import Linear4bit

WORLD = 2
#: Storage of the packed bytes, and the dtype in which FSDP gathers parameters.
CASES = (("uint8", torch.bfloat16), ("bfloat16", torch.bfloat16), ("bfloat16", None))


def adapted(storage: str) -> torch.nn.Module:
    config = QuantConfig(quant_storage=storage, compute_dtype="bfloat16")
    model = qlora.add_lora(qlora.quantize_(make_model().to(torch.bfloat16), config), r=4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.01)
    return model


def step(model: torch.nn.Module) -> torch.Tensor:
    result = model(**training_inputs("llama"))
    result.loss.backward()
    return result.logits.detach()


def full(tensor: torch.Tensor) -> torch.Tensor:
    assert isinstance(tensor, DTensor)
    return tensor.full_tensor().detach().as_subclass(torch.Tensor)


def process(rank: int, directory: str) -> None:
    """One of WORLD processes with the same batch: their mean gradient is each one's own."""
    store = f"file://{directory}/store"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD)
    for storage, param_dtype in CASES:
        check(storage, param_dtype)
    distributed.destroy_process_group()


def check(storage: str, param_dtype: torch.dtype | None) -> None:
    whole, sharded = adapted(storage), adapted(storage)
    expected = step(whole)
    mesh = init_device_mesh("cpu", (WORLD,))
    policy = MixedPrecisionPolicy(param_dtype=param_dtype)
    for block in sharded.base_model.model.model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(sharded, mesh=mesh, mp_policy=policy)
    assert torch.equal(step(sharded), expected)
    num_packed = num_not_a_number = 0
    sharded_parameters = dict(sharded.named_parameters())
    for name, parameter in whole.named_parameters():
        other = sharded_parameters[name]
        if isinstance(whole.get_submodule(name.rpartition(".")[0]), Linear4bit) and name.endswith(".weight"):
            mine = parameter.detach().as_subclass(torch.Tensor)
            assert other.to_local().shape[0] < mine.shape[0]
            assert torch.equal(full(other).view(torch.uint8), mine.view(torch.uint8)), name
            num_packed += 1
            if storage != "uint8":
                num_not_a_number += int(mine.isnan().sum())
        elif parameter.requires_grad:
            # Gradients travel in param_dtype.
            scale = parameter.grad.abs().max() * torch.finfo(torch.bfloat16).eps
            assert ((full(other.grad) - parameter.grad).abs() <= 2 * scale).all(), name
    assert num_packed == 14
    assert storage == "uint8" or num_not_a_number > 0


@pytest.mark.skipif(not distributed.is_gloo_available(), reason="this torch has no gloo")
def test_packed_bytes_are_sharded_and_come_back_to_the_bit(tmp_path: Path) -> None:
    """bitsandbytes' bytes in bfloat16 lose those that read as NaN; accelerate does not shard its uint8 at all."""
    torch.multiprocessing.spawn(process, (str(tmp_path),), nprocs=WORLD)
