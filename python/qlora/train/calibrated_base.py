"""`qlora train --calibrate`: the base model in NF4 that is fitted to the training data.

The base is written to `output_dir` first, as `qlora quantize --calibrate` writes it, and the adapter is trained on what
was written. So a run that is resumed, `qlora generate` and `qlora merge` meet the same base, bit for bit.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from qlora.train.config import ConfigError, QloraArguments

PREFIX = "calibrated-"


class TrainingTexts:
    """The examples of a training set as the texts that the model is trained on, rendered when they are asked for."""

    def __init__(self, examples: Any, tokenizer: Any, text_column: str) -> None:
        self.examples = examples
        self.tokenizer = tokenizer
        self.text_column = text_column

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> str:
        example = self.examples[index]
        end = self.tokenizer.eos_token or ""
        if self.text_column in example:
            return str(example[self.text_column]) + end
        parts = [example[key] for key in ("messages", "prompt", "completion") if key in example]
        if isinstance(parts[0], str):
            return "".join(parts) + end
        messages = [message for part in parts for message in part]
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False))


def calibrated_base(
    name: str,
    arguments: QloraArguments,
    texts: TrainingTexts,
    output_dir: Path,
    *,
    seed: int,
    dtype: str,
    device: torch.device,
    trust_remote_code: bool,
) -> Path:
    """The directory in `output_dir` with the base model; written unless it is there. Its name tells what it is made of.

    In a distributed run the first process writes and the others wait.

    Raises:
        ConfigError: the model is not to be in NF4, is quantised already, or the data are too few.
    """
    if not arguments.load_in_4bit or arguments.quant_type != "nf4":
        got = f"quant_type {arguments.quant_type}" if arguments.load_in_4bit else "load_in_4bit false"
        raise ConfigError(f"calibrate: expected a base in nf4, got {got}")
    from accelerate import PartialState

    import qlora
    from qlora.calibration.work import digest
    from qlora.integrations.transformers_calibration import dense_config, read_windows, write_calibrated

    options: dict[str, Any] = {
        "revision": arguments.model_revision or "main",
        "trust_remote_code": trust_remote_code,
    }
    config = qlora.QuantConfig(
        block_size=arguments.block_size, double_quant=arguments.double_quant, compute_dtype=dtype
    )
    try:
        calibration = qlora.Calibration(
            texts, num_tokens=arguments.calibrate_tokens, seed=seed, tokenizer=texts.tokenizer
        )
        calibration.text = read_windows(calibration, dense_config(name, **options))
    except ValueError as error:
        raise ConfigError(f"calibrate: {error}") from error
    config.calibration = calibration
    made_of = [
        name,
        options["revision"],
        dtype,
        config.block_size,
        config.double_quant,
        digest([calibration.text]),
    ]
    out = output_dir / (PREFIX + hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:8])
    with PartialState().main_process_first():
        if out.is_dir():
            print(f"calibrated base: {out} is there")
            return out
        print(f"calibrating on {calibration.text.numel():,} tokens of the training data ...", flush=True)
        about = {"model": name, "text": arguments.dataset_name or "the built-in task"}
        write_calibrated(
            name, out, config, device=device, about=about, dtype=getattr(torch, dtype), **options
        )
    return out
