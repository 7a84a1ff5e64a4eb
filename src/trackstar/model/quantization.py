"""Quantised checkpoints: dequantised where Transformers can do that here, else refused with the reason.

Gradients are those of floating-point weights. A checkpoint of a quantised model is loaded with its
weights multiplied out, so that the network is the one that its quantised weights compute.
"""

import inspect
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from trackstar.errors import ModelError
from trackstar.text import abridged, one_line

ADVICE = (
    "load the checkpoint that it was quantised from, or on a machine that can load it call the model's `dequantize()` "
    "and `save_pretrained`"
)


def quantization_method(source: Any, **options: Any) -> str | None:
    """The method by which a checkpoint is quantised, or None if it is not, or cannot be read."""
    fields = _fields(source, options)
    return None if fields is None else abridged(fields.get("quant_method", "an unnamed method"))


def dequantizing_options(source: Any, **options: Any) -> dict[str, Any]:
    """Arguments of `from_pretrained` that multiply quantised weights out while they are loaded.

    Empty if the checkpoint is not quantised, or by a method that has no such option.
    """
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    fields = _fields(source, options)
    kind = None if fields is None else AUTO_QUANTIZATION_CONFIG_MAPPING.get(str(fields.get("quant_method")))
    if fields is None or kind is None or "dequantize" not in inspect.signature(kind.__init__).parameters:
        return {}
    try:
        return {"quantization_config": kind.from_dict({**fields, "dequantize": True})}
    except Exception:  # such as a library that is missing, which `from_pretrained` raises again
        return {}


def dequantized(module: PreTrainedModel, name: str, dtype: torch.dtype) -> PreTrainedModel:
    """The model with floating-point weights of the dtype.

    Raises:
        ModelError: Its weights are quantised, and cannot be dequantised.
    """
    quantizer: Any = getattr(module, "hf_quantizer", None)
    if quantizer is not None and _packed(module) is not None:
        try:
            module.dequantize(dtype)
        except Exception as error:
            reason = one_line(error, 300) or type(error).__name__
            raise ModelError(
                f"{name}: its weights are quantised, and cannot be dequantised ({reason}); expected weights in "
                f"floating point; {ADVICE}"
            ) from None
    check_floating_point(module, name)
    if quantizer is not None:
        torch.nn.Module.to(module, dtype)
    return module


def check_floating_point(module: PreTrainedModel, name: str) -> None:
    """Raise if a weight is not of a dtype that gradients can be computed with.

    Raises:
        ModelError: One is not; the message names it.
    """
    packed = _packed(module)
    if packed is not None:
        parameter, dtype = packed
        raise ModelError(
            f"{name}: {parameter} holds quantised weights of {str(dtype).removeprefix('torch.')}; expected weights in "
            f"floating point; {ADVICE}"
        )


def _packed(module: PreTrainedModel) -> tuple[str, torch.dtype] | None:
    """The first parameter that is no floating-point matrix."""
    for name, parameter in module.named_parameters():
        if parameter.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            return name, parameter.dtype
    return None


def _fields(source: Any, options: dict[str, Any]) -> dict[str, Any] | None:
    """`quantization_config` of a checkpoint's configuration."""
    if "gguf_file" in options:  # its weights are dequantised by definition
        return None
    try:
        configuration = AutoConfig.from_pretrained(source, trust_remote_code=False, **options)
    except Exception:  # `from_pretrained` of the model raises it again
        return None
    found: Any = getattr(configuration, "quantization_config", None)
    if found is None:
        found = getattr(configuration.get_text_config(), "quantization_config", None)
    if found is not None and not isinstance(found, dict):
        found = found.to_dict()
    return found
