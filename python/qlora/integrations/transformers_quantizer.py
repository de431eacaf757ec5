"""The transformers quantizer: linear layers as `qlora.nn.Linear4bit`, from 16-bit checkpoints or 4-bit ones.

It keeps to the public quantizer interface of transformers 5.17 and newer: `get_weight_conversions` and
`get_quantize_ops` name the operations of transformers_ops.py, which do the work. Checkpoints are bitsandbytes' in both
directions.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import sys
from collections.abc import Iterable
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils import is_bitsandbytes_available  # type: ignore[attr-defined]
from transformers.utils import logging as transformers_logging
from transformers.utils.quantization_config import BitsAndBytesConfig

from ..config import QuantConfig
from ..nn import convert
from ..nn.group import link_groups
from ..nn.linear import Linear4bit
from ..nn.module import Module4bit
from ..nn.params import Params4bit, plain_tensor
from ..nn.report import KEPT_ATTRIBUTE, report
from ..nn.tensor import is_finite
from .streaming import WeightStreamer
from .transformers_calibration import calibrate_loaded, only_device, read_windows
from .transformers_ops import Defer, Deserialize, Quantize, is_ours

logger = logging.getLogger("qlora")


class QloraHfQuantizer(HfQuantizer):
    """Loads linear layers as `qlora.nn.Linear4bit`, from 16-bit checkpoints or 4-bit ones of bitsandbytes' layout.

    A 16-bit checkpoint is quantised tensor by tensor on the device it goes to: what is needed beside the 4-bit model
    is room for one tensor. With a calibration it is read into host memory first (transformers_calibration.py).
    """

    requires_calibration = False
    quantization_config: BitsAndBytesConfig

    def __init__(self, quantization_config: QuantConfig | BitsAndBytesConfig, **kwargs: Any) -> None:
        if isinstance(quantization_config, QuantConfig):
            self.config = quantization_config
            quantization_config = to_bitsandbytes(self.config)
            self.is_native = True
        else:
            self.config = from_bitsandbytes(quantization_config)
            self.is_native = False
            quantization_config = copy.copy(quantization_config)  # the user's own may serve other loads
        super().__init__(quantization_config, **kwargs)
        #: Name of a layer -> why it could not be loaded, raised all together once the loading is through.
        self.failures: dict[str, str] = {}
        #: Name of a layer -> whether its values were finite, on the device: one look at the end, not one a layer.
        self.finite: dict[str, torch.Tensor] = {}
        self.modules_to_not_convert: list[str] = []
        self._streamer = WeightStreamer()
        self._windows: torch.Tensor | None = None  # tokens of the calibration, between its two halves

    # ------------------------------------------------------------------------------------------- what transformers asks
    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        if not isinstance(device_map, dict) or self.quantization_config.llm_int8_enable_fp32_cpu_offload:
            return
        devices = {str(device) for device in device_map.values()}
        if "disk" in devices or ("cpu" in devices and len(devices) > 1):
            raise ValueError(
                f"qlora: device_map: expected GPUs only, or the CPU only, got {sorted(devices)}: a 4-bit layer is not "
                "offloaded. To keep what does not fit on the CPU in 16 bits, set llm_int8_enable_fp32_cpu_offload=True "
                "in a BitsAndBytesConfig"
            )

    def update_device_map(self, device_map: Any) -> Any:
        if self.config.calibration is not None:
            self._device = only_device(device_map, _default_device())
            return {"": "cpu"}
        if device_map is None:
            return {"": _default_device()}
        return device_map

    @property
    def quantized_element_size(self) -> float:
        """Bytes a weight, scales included."""
        scale_bytes = 1 + 4 / 256 if self.config.double_quant else 4
        return 0.5 + scale_bytes / self.config.block_size

    def param_element_size(self, model: Any, param_name: str, param: torch.Tensor) -> float:
        if self.param_needs_quantization(model, param_name):
            return self.quantized_element_size
        return param.element_size()

    def adjust_max_memory(self, max_memory: dict[Any, Any]) -> dict[Any, Any]:
        # Room for one tensor in 16 bits and the kernels' workspace.
        return {
            key: int(value * 0.95) if isinstance(value, (int, float)) else value
            for key, value in max_memory.items()
        }

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        module_name, _, name = param_name.rpartition(".")
        return name == "weight" and isinstance(model.get_submodule(module_name), Module4bit)

    def get_quantize_ops(self) -> Quantize:
        return Quantize(self)

    def get_weight_conversions(self) -> list[Any]:
        if self.config.calibration is not None:
            return []
        if self.pre_quantized:
            return [WeightConverter(Deserialize.source_patterns(), "weight", [Deserialize(self)])]
        return [WeightConverter("weight", "weight", [Defer(self)], force_cpu=True)]

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        return [*weight_conversions, *self.get_weight_conversions()]

    # -------------------------------------------------------------------------------------------------- before the load
    def _process_model_before_weight_loading(
        self, model: Any, device_map: Any = None, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> Any:
        if self.config.calibration is not None:
            with torch.device("cpu"):  # transformers builds models on the meta device
                self._windows = read_windows(self.config.calibration, model.config)
            return model
        config = self._resolve(model, device_map)
        reasons = self._keep_reasons(model, device_map)
        stored = _quantized_names(model, checkpoint_files) if self.pre_quantized else None
        for name, module in list(model.named_modules()):
            if stored is not None and name in stored:
                wanted = stored[name] and (
                    convert.is_convertible(module, config) or convert.is_plain_embedding(module)
                )
            else:
                wanted = name not in reasons and convert.is_convertible(module, config)
            if not wanted:
                continue
            reasons.pop(name, None)
            new = convert.empty_module_like(module, config, self._compute_dtype)
            new.layer_name = name
            if self.pre_quantized:
                # transformers casts what it loads to the dtype of the empty parameter: that of the packed bytes.
                packed = new.weight.data.to(config.torch_quant_storage)
                new.weight = Params4bit(packed, **new.weight.__dict__)
                # Where the checkpoint lacks it, transformers would draw random bytes; `_finish` reports it instead.
                new._is_hf_initialized = True  # type: ignore[assignment]
            new.requires_grad_(False)
            model.set_submodule(name, new)
        for name, module in model.named_modules():
            is_linear = isinstance(module, torch.nn.Linear) or convert.is_conv1d(module)
            if is_linear and not isinstance(module, Module4bit):
                reasons.setdefault(name, "stored unquantised" if self.pre_quantized else "not convertible")
        setattr(model, KEPT_ATTRIBUTE, reasons)
        self.modules_to_not_convert = sorted(reasons)
        if not self.pre_quantized and (
            self.is_native or self.quantization_config.llm_int8_skip_modules is None
        ):
            self.quantization_config.llm_int8_skip_modules = self.skip_list(model, reasons)
        return model

    def skip_list(self, model: Any, reasons: dict[str, str]) -> list[str] | None:
        """`llm_int8_skip_modules` for the checkpoint: the linear layers among `reasons`, by their whole names.

        None where they are those that every reader keeps when there is no list; a list replaces that default.
        """
        kept = [name for name in reasons if _is_convertible(model.get_submodule(name))]
        default = self.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
        kept_by_default = [
            name
            for name, module in model.named_modules()
            if (_is_convertible(module) or isinstance(module, Linear4bit))
            and not should_convert_module(name, default)
        ]
        return None if set(kept) == set(kept_by_default) else kept

    def _resolve(self, model: Any, device_map: Any) -> QuantConfig:
        """Settles compute_dtype for the devices that the model goes to."""
        device = next(iter(device_map.values()), "cpu") if isinstance(device_map, dict) else _default_device()
        if device in ("auto", "balanced", "balanced_low_0", "sequential", "disk"):
            device = _default_device()
        self._compute_dtype = self.config.resolve_compute_dtype(device)
        if self.config.compute_dtype == "auto":
            stored = self._compute_dtype or model.dtype
            self.quantization_config.bnb_4bit_compute_dtype = stored
        elif (
            self._compute_dtype is torch.float32
            and not self.is_native
            and torch.device(device).type == "cuda"
        ):
            logger.warning(
                "qlora: BitsAndBytesConfig computes in float32 unless told otherwise, which is slow: pass "
                "bnb_4bit_compute_dtype=torch.bfloat16, or quantization_config=qlora.QuantConfig()"
            )
        return self.config

    def _keep_reasons(self, model: Any, device_map: Any) -> dict[str, str]:
        reasons = convert.keep_reasons(model, self.config)
        skip = self.quantization_config.llm_int8_skip_modules
        if not self.is_native:
            # The rule that writers and readers of such checkpoints share: a list of the user's replaces the default.
            keys = self.get_modules_to_not_convert(model, skip, model._keep_in_fp32_modules)
            for name, module in model.named_modules():
                if not _is_convertible(module):
                    continue
                if not should_convert_module(name, keys):
                    reasons.setdefault(name, "skip_modules")
                elif not reasons.get(name, "tied").startswith(("tied", "vision tower")):
                    reasons.pop(name)
        if self.quantization_config.llm_int8_enable_fp32_cpu_offload and isinstance(device_map, dict):
            on_cpu = [name for name, device in device_map.items() if str(device) in ("cpu", "disk")]
            for name, _ in model.named_modules():
                if convert.matches(name, on_cpu) is not None:
                    reasons[name] = "on the CPU (device_map)"
        return reasons

    # --------------------------------------------------------------------------------------------------- after the load
    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self._windows is not None:
            dtype = self.config.resolve_compute_dtype(self._device)
            config = self.config if dtype is None else dataclasses.replace(self.config, compute_dtype=dtype)
            calibrate_loaded(model, self._windows, config, self._device)
            self._windows = None
            announce(model)
            return model
        self._finish(model)
        link_groups(model, in_compiled=True)
        conversions = getattr(model, "_weight_conversions", None)
        if conversions is not None:
            # Saving runs the conversions backwards; ours has nothing to undo, since `state_dict` is the stored layout.
            model._weight_conversions = [item for item in conversions if not is_ours(item)]
        if is_bitsandbytes_available():
            # Hosts that see this flag import bitsandbytes.
            model.is_loaded_in_4bit = True
        announce(model)
        return model

    def _finish(self, model: Any) -> None:
        """Waits for the weights, quantises those that the checkpoint lacks, and raises what went wrong."""
        self._streamer.finish()
        for name, module in model.named_modules():
            if not isinstance(module, Module4bit):
                continue
            bias = module._parameters.get("bias")
            if self.pre_quantized and bias is not None and not getattr(bias, "_is_hf_initialized", False):
                torch.nn.init.zeros_(bias)
            if module.quant_state is not None or name in self.failures:
                continue
            weight = module.weight
            if self.pre_quantized or weight.device.type == "meta":
                self.failures[name] = "the checkpoint holds no weight for it"
                continue
            config = self.config
            module.weight = Params4bit(
                plain_tensor(weight),
                blocksize=config.block_size,
                compress_statistics=config.double_quant,
                quant_type=config.quant_type,
                quant_storage=config.torch_quant_storage,
            ).quantize_on(weight.device, name=module.describe(), check=True)
        if self.finite:
            devices: dict[torch.device, list[str]] = {}
            for name, flag in self.finite.items():
                devices.setdefault(flag.device, []).append(name)
            for names in devices.values():
                for name, ok in zip(
                    names, torch.stack([self.finite[name] for name in names]).tolist(), strict=True
                ):
                    if not ok:
                        self.failures[name] = "its weight holds NaN or Inf"
            self.finite.clear()
        if self.failures:
            listed = "\n".join(f"  {name}: {text}" for name, text in list(self.failures.items())[:10])
            more = f"\n  and {len(self.failures) - 10} more" if len(self.failures) > 10 else ""
            raise ValueError(f"qlora: {len(self.failures)} layers could not be loaded:\n{listed}{more}")

    def quantize_weight(self, param: Params4bit, device: torch.device, layer: str) -> Params4bit:
        """Quantises a fresh weight on its device, on a GPU in the background until `_finish`."""
        if self._streamer.takes(plain_tensor(param), device):
            if device.index is None:
                device = torch.device("cuda", torch.cuda.current_device())
            self.finite[layer] = self._streamer.start(param, device, name=f"{layer}.weight")
            return param
        param.quantize_on(device, name=f"{layer}.weight")
        assert param.quant_state is not None
        self.finite[layer] = is_finite(param.quant_state)
        return param

    # ------------------------------------------------------------------------------------------------------- dequantise
    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        # save_pretrained leaves a name in config.dtype.
        named = getattr(torch, dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
        hooks = {
            name: module._hf_hook
            for name, module in model.named_modules()
            if isinstance(module, Module4bit) and hasattr(module, "_hf_hook")
        }
        convert.dequantize_(model, named)
        for name, hook in hooks.items():  # accelerate's, which moves the input to the layer's device
            from accelerate.hooks import add_hook_to_module

            add_hook_to_module(model.get_submodule(name), hook)
        return model


def _default_device() -> Any:
    return torch.cuda.current_device() if torch.cuda.is_available() else "cpu"


def _is_convertible(module: torch.nn.Module) -> bool:
    """Whether every reader and writer of this layout takes the module for a layer to quantise."""
    return type(module) is torch.nn.Linear or convert.is_conv1d(module)


def _quantized_names(model: Any, checkpoint_files: Iterable[str] | None) -> dict[str, bool] | None:
    """Module name -> whether its weight is stored in 4 bits, from the headers of safetensors files."""
    from safetensors import SafetensorError, safe_open

    names: set[str] = set()
    for file in checkpoint_files or ():
        if not str(file).endswith(".safetensors"):
            return None
        try:
            with safe_open(file, framework="pt") as opened:
                names.update(opened.keys())
        except SafetensorError as error:
            raise ValueError(
                f"qlora: {file}: expected a safetensors file, got a truncated or damaged one: {error}"
            ) from error
    marker = ".weight.quant_state.bitsandbytes__"
    packed = {name.partition(marker)[0] for name in names if marker in name}
    packed |= {name.removesuffix(".weight.absmax") for name in names if name.endswith(".weight.absmax")}
    stored = {name.removesuffix(".weight"): False for name in names if name.endswith(".weight")}
    stored.update(dict.fromkeys(packed, True))
    # Vision-language models among others are stored under other names than their modules have.
    renamings = [item for item in get_model_conversion_mapping(model) if isinstance(item, WeightRenaming)]
    expected = model.state_dict()
    result = {}
    for name in sorted(stored):
        key, _ = rename_source_key(f"{name}.weight", renamings, [], model.base_model_prefix, expected)
        result[key.removesuffix(".weight")] = stored[name]
    return result


def to_bitsandbytes(config: QuantConfig) -> BitsAndBytesConfig:
    """transformers' configuration object, which goes into config.json."""
    values = config.to_dict()
    keys = (
        "bnb_4bit_compute_dtype",
        "bnb_4bit_quant_storage",
        "bnb_4bit_quant_type",
        "bnb_4bit_use_double_quant",
    )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        llm_int8_skip_modules=values["llm_int8_skip_modules"],
        **{key: values[key] for key in keys},
    )


def from_bitsandbytes(config: BitsAndBytesConfig) -> QuantConfig:
    """Ours, of an unchanged BitsAndBytesConfig(load_in_4bit=True, ...)."""
    return QuantConfig(
        quant_type=config.bnb_4bit_quant_type,
        double_quant=config.bnb_4bit_use_double_quant,
        compute_dtype=config.bnb_4bit_compute_dtype,
        quant_storage=config.bnb_4bit_quant_storage,
        quantize_head=config.llm_int8_skip_modules is not None,
        quantize_vision=config.llm_int8_skip_modules is not None,
    )


def announce(model: Any) -> None:
    """One line about what was quantised, to the logger or, where nobody listens, to stderr; a warning for experts."""
    found = report(model)
    if logger.isEnabledFor(logging.INFO):
        logger.info(found.summary())
    elif transformers_logging.get_verbosity() <= logging.WARNING:
        sys.stderr.write(f"{found.summary()}\n")
    convert.warn_of_experts(found)
