"""QuantConfig(calibration=...) in transformers: what is needed before the load, what is done after it, and a checkpoint.

A calibration runs the 16-bit model, so the weights cannot be quantised one by one as they are read: the model is loaded
in 16 bits into host memory, fitted decoder layer by decoder layer on its device, and moved there in 4 bits.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..calibration import CALIBRATED_ATTRIBUTE, Calibrated, calibrate_, token_windows, write_report
from ..config import Calibration, QuantConfig
from ..files import whole_directory


def only_device(device_map: Any, default: torch.device | str | int) -> torch.device:
    """The device of a device map; `default` for none and for one that is to be made.

    Raises:
        ValueError: it names several.
    """
    if not isinstance(device_map, dict):
        device_map = {"": default}
    found = {str(value): value for value in device_map.values()}
    if len(found) != 1:
        raise ValueError(f"qlora: device_map: expected one device for a calibration, got {sorted(found)}")
    return torch.empty(0, device=next(iter(found.values()))).device


def dense_config(name: str, **options: Any) -> Any:
    """The configuration of a model that can be calibrated; `options` are those of from_pretrained.

    Raises:
        ValueError: it is quantised already. OSError: it is not there.
    """
    from transformers import AutoConfig

    model_config = AutoConfig.from_pretrained(name, **options)
    if getattr(model_config, "quantization_config", None) is not None:
        raise ValueError(f"qlora: calibration: expected a model in 16 or 32 bit, got a quantised one: {name}")
    return model_config


def read_windows(calibration: Calibration, model_config: Any) -> Tensor:
    """The tokens of a calibration, with the tokenizer that the checkpoint brings unless another is given.

    Raises:
        ValueError, TypeError, OSError: as `calibration.token_windows` says, or there is no tokenizer.
    """
    if isinstance(calibration.text, Tensor):
        return calibration.text
    tokenizer = calibration.tokenizer
    if tokenizer is None:
        from transformers import AutoTokenizer

        revision = getattr(model_config, "_commit_hash", None)
        tokenizer = AutoTokenizer.from_pretrained(model_config._name_or_path, revision=revision or "main")
    longest = getattr(model_config.get_text_config(decoder=True), "max_position_embeddings", None)
    return token_windows(calibration, tokenizer, longest)


def calibrate_loaded(model: Any, windows: Tensor, config: QuantConfig, device: torch.device) -> None:
    """Quantises a loaded model on `device` and leaves it there, with the `Calibrated` as an attribute.

    Args:
        config: its compute_dtype is settled; its calibration is a Calibration.
    """
    missing = [name for name, value in model.state_dict().items() if value.is_meta]
    if missing:
        raise ValueError(
            f"qlora: calibration: expected every weight in host memory, got none of {missing[0]}"
        )
    calibration = config.calibration
    work = None if calibration.work is None else Path(calibration.work)
    done = calibrate_(model, windows, config, budget=calibration.budget, work=work, device=device)
    torch.nn.Module.to(model, device)
    setattr(model, CALIBRATED_ATTRIBUTE, done)


def work_directory(out: Path) -> Path:
    """Where `write_calibrated` keeps what is finished."""
    return out.with_name(f"{out.name}.calibration")


def write_calibrated(
    name: str,
    out: Path,
    config: QuantConfig,
    *,
    device: torch.device,
    about: dict[str, Any],
    **options: Any,
) -> tuple[Any, Calibrated]:
    """Writes `out`: a calibrated 4-bit checkpoint with its tokenizer, calibration.json and calibration.png.

    `out` appears whole or not at all; what is finished waits beside it for the same call after a kill.

    Args:
        name: directory or hub name of the 16-bit model.
        config: its calibration has a tokenizer.
        about: what the report says beside the figures and the settings.
        options: of from_pretrained.

    Returns:
        The model, and what was done.
    """
    from transformers import AutoModelForCausalLM

    calibration = dataclasses.replace(config.calibration, work=work_directory(out))
    model: Any = AutoModelForCausalLM.from_pretrained(
        name,
        quantization_config=dataclasses.replace(config, calibration=calibration),
        device_map={"": device},
        **options,
    )
    done: Calibrated = getattr(model, CALIBRATED_ATTRIBUTE)
    settings = {
        "seed": calibration.seed,
        "block_size": config.block_size,
        "double_quant": config.double_quant,
        "torch": torch.__version__,
    }
    with whole_directory(out) as staging:
        model.save_pretrained(str(staging))
        calibration.tokenizer.save_pretrained(str(staging))
        write_report(staging, done, about | settings)
    shutil.rmtree(work_directory(out))
    return model, done
