"""QuantConfig: how a model is quantised. Needs neither torch nor transformers."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from .format import BLOCK_SIZES, DEFAULT_BLOCK_SIZE, QUANT_TYPES

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

COMPUTE_DTYPES = ("float32", "float16", "bfloat16")
QUANT_STORAGES = ("uint8", "int8", "float16", "bfloat16", "float32", "float64")

# Keys of bitsandbytes' configuration -> ours. The rest of its keys concern 8 bits and are carried, not read.
_BITSANDBYTES_KEYS = {
    "bnb_4bit_quant_type": "quant_type",
    "bnb_4bit_use_double_quant": "double_quant",
    "bnb_4bit_compute_dtype": "compute_dtype",
    "bnb_4bit_quant_storage": "quant_storage",
    "llm_int8_skip_modules": "skip_modules",
}
_BITSANDBYTES_IGNORED = (
    "_load_in_4bit",
    "_load_in_8bit",
    "load_in_4bit",
    "load_in_8bit",
    "llm_int8_enable_fp32_cpu_offload",
    "llm_int8_has_fp16_weight",
    "llm_int8_threshold",
    "quant_method",
)


def dtype_name(dtype: torch.dtype | str) -> str:
    """ "bfloat16" of torch.bfloat16, "torch.bfloat16" or "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def unknown_key(where: str, key: str, known: Iterable[str]) -> str:
    """The text of an error about an unknown key, with the nearest known one where there is one."""
    known = sorted(known)
    nearest = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"expected one of {', '.join(known)}"
    return f"{where}: unknown key {key!r}: {hint}"


@dataclass(eq=False)
class Calibration:
    """The text that scales and codes are fitted to, so that a model's layers do the same to it after quantisation.

    Args:
        text: what the model will meet, and nothing that it is judged on. The path of a UTF-8 file (a str or Path), of
            which disjoint windows are drawn; a sequence of texts, or of rows with a text each (a list, a
            datasets.Dataset), of which some are drawn; or a torch tensor, int64 [num_windows, length], of tokens that
            are all used as they are.
        num_tokens: how many tokens are used; the time is proportional to them.
        seed: of what is drawn.
        column: of the rows that holds the text.
        tokenizer: None: that which the checkpoint brings.
        budget: mean bits a weight over the linear layers of the decoder, scales included: as many of them as fit in stay
            as they are, those first whose quantisation would change the hidden states most for their size. None: all
            are quantised.
        work: directory for finished layers: a run that was killed goes on from there. None: a killed run begins anew.

    Raises:
        ValueError: num_tokens or budget is not positive. TypeError: text is of another kind.
    """

    text: Any
    num_tokens: int = 32768
    seed: int = 0
    column: str = "text"
    tokenizer: Any = None
    budget: float | None = None
    work: str | Path | None = None

    def __post_init__(self) -> None:
        if self.num_tokens < 1:
            raise ValueError(f"qlora.Calibration: num_tokens: expected at least 1, got {self.num_tokens}")
        if self.budget is not None and not self.budget > 0:
            raise ValueError(f"qlora.Calibration: budget: expected a positive number, got {self.budget}")
        is_sequence = hasattr(self.text, "__len__") and hasattr(self.text, "__getitem__")
        if not (is_sequence or isinstance(self.text, Path)) or isinstance(self.text, (bytes, Mapping)):
            expected = "a path, a sequence of texts or rows, or a tensor of tokens"
            raise TypeError(f"qlora.Calibration: text: expected {expected}, got {type(self.text).__name__}")


@dataclass
class QuantConfig:
    """How the linear layers of a model are stored in 4 bits.

    `from_pretrained(..., quantization_config=QuantConfig())` and `qlora.quantize_(model, QuantConfig())` take it.

    Args:
        quant_type: "nf4" or "fp4", the code book.
        block_size: values that share one scale: 32, 64, 128, ... 4096.
        double_quant: store the scales themselves in 8 bits: 4.13 instead of 4.5 bits a weight at block size 64.
        compute_dtype: dtype of the matrix products, a torch.dtype or its name. "auto": bfloat16 on a GPU that has it
            (float16 on older ones), that of each layer's input on CPU.
        quant_storage: dtype under which the packed bytes are kept. Anything but "uint8" is for hosts that can shard
            only one float dtype (FSDP1); the bytes are the same.
        skip_modules: names of modules that stay as they are, beside the default: the output head, tied weights, the
            vision tower and what the model wants in float32. A name matches the whole dotted name, its beginning up to
            a dot, its end from a dot on, or, with *, ? or [] in it, as a shell pattern.
        quantize_head: quantise the output head too, where it is not tied.
        quantize_embeddings: quantise the embeddings too, where they are not tied. Other readers of the checkpoint do
            not expect that.
        quantize_vision: quantise the vision tower of a vision-language model too.
        calibration: a Calibration, or the text for one: the model is quantised so that its layers change least on it.
            Only `from_pretrained` takes it, for a 16-bit checkpoint: the model is read in 16 bits into host memory
            and goes to its device in 4 bits. It is not written to config.json.

    Raises:
        ValueError: a value is not as said. TypeError: an unknown argument (with the nearest match) or a wrong type.
    """

    quant_type: str = "nf4"
    block_size: int = DEFAULT_BLOCK_SIZE
    double_quant: bool = True
    compute_dtype: torch.dtype | str = "auto"
    quant_storage: torch.dtype | str = "uint8"
    skip_modules: list[str] | None = None
    quantize_head: bool = False
    quantize_embeddings: bool = False
    quantize_vision: bool = False
    calibration: Any = None

    #: The name under which the quantizer is registered in transformers.
    quant_method: ClassVar[str] = "qlora"

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        known = [field.name for field in dataclasses.fields(cls)]
        for key in kwargs:
            if key not in known:
                raise TypeError(unknown_key("qlora.QuantConfig", key, known))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if self.quant_type not in QUANT_TYPES:
            raise ValueError(
                f"qlora.QuantConfig: quant_type: expected one of {QUANT_TYPES}, got {self.quant_type!r}"
            )
        if isinstance(self.block_size, bool) or self.block_size not in BLOCK_SIZES:
            raise ValueError(
                f"qlora.QuantConfig: block_size: expected one of {BLOCK_SIZES}, got {self.block_size!r}"
            )
        for name in ("double_quant", "quantize_head", "quantize_embeddings", "quantize_vision"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"qlora.QuantConfig: {name}: expected a bool, got {getattr(self, name)!r}")
        self.compute_dtype = dtype_name(self.compute_dtype)
        if self.compute_dtype not in ("auto", *COMPUTE_DTYPES):
            expected = f"'auto' or one of {COMPUTE_DTYPES}"
            raise ValueError(
                f"qlora.QuantConfig: compute_dtype: expected {expected}, got {self.compute_dtype!r}"
            )
        self.quant_storage = dtype_name(self.quant_storage)
        if self.quant_storage not in QUANT_STORAGES:
            expected = f"one of {QUANT_STORAGES}"
            raise ValueError(
                f"qlora.QuantConfig: quant_storage: expected {expected}, got {self.quant_storage!r}"
            )
        if self.skip_modules is not None:
            if isinstance(self.skip_modules, str) or not all(
                isinstance(name, str) for name in self.skip_modules
            ):
                what = "a list of module names"
                raise TypeError(
                    f"qlora.QuantConfig: skip_modules: expected {what}, got {self.skip_modules!r}"
                )
            self.skip_modules = list(self.skip_modules)
        if self.calibration is not None:
            if self.quant_type != "nf4":
                expected = "'nf4' with a calibration"
                raise ValueError(
                    f"qlora.QuantConfig: quant_type: expected {expected}, got {self.quant_type!r}"
                )
            if not isinstance(self.calibration, Calibration):
                self.calibration = Calibration(self.calibration)

    @property
    def torch_quant_storage(self) -> torch.dtype:
        import torch

        dtype: torch.dtype = getattr(torch, dtype_name(self.quant_storage))
        return dtype

    def resolve_compute_dtype(self, device: torch.device | str | int) -> torch.dtype | None:
        """The dtype of the products on `device`; None stands for that of each layer's input."""
        import torch

        if self.compute_dtype != "auto":
            dtype: torch.dtype = getattr(torch, dtype_name(self.compute_dtype))
            return dtype
        device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        if device.type != "cuda" or not torch.cuda.is_available():
            return None
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QuantConfig:
        """From our own keys or those of bitsandbytes in config.json.

        Raises:
            ValueError: an unknown key, with the nearest match; or a configuration of another method.
        """
        method = values.get("quant_method")
        if method is not None and str(getattr(method, "value", method)) not in ("qlora", "bitsandbytes"):
            raise ValueError(
                f"qlora.QuantConfig: quant_method: expected 'bitsandbytes' or 'qlora', got {method!r}"
            )
        if values.get("load_in_8bit"):
            raise ValueError(
                "qlora.QuantConfig: load_in_8bit: expected a 4-bit configuration, got load_in_8bit=True"
            )
        known = [field.name for field in dataclasses.fields(cls)]
        result = {}
        for key, value in values.items():
            if key in known:
                result[key] = value
            elif key in _BITSANDBYTES_KEYS:
                result[_BITSANDBYTES_KEYS[key]] = value
            elif key not in _BITSANDBYTES_IGNORED:
                raise ValueError(unknown_key("qlora.QuantConfig", key, [*known, *_BITSANDBYTES_KEYS]))
        return cls(**result)

    def to_dict(self) -> dict[str, Any]:
        """The entry `quantization_config` of config.json: bitsandbytes' keys, which every reader knows.

        "auto" is written as bfloat16. block_size is not among the keys: each weight carries its own in the checkpoint.
        """
        return {
            "_load_in_4bit": True,
            "_load_in_8bit": False,
            "bnb_4bit_compute_dtype": "bfloat16" if self.compute_dtype == "auto" else self.compute_dtype,
            "bnb_4bit_quant_storage": self.quant_storage,
            "bnb_4bit_quant_type": self.quant_type,
            "bnb_4bit_use_double_quant": self.double_quant,
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_skip_modules": self.skip_modules,
            "llm_int8_threshold": 6.0,
            "load_in_4bit": True,
            "load_in_8bit": False,
            "quant_method": "bitsandbytes",
        }
