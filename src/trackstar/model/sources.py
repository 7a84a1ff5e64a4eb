"""Find where a model is: a folder, an adapter's folder, a `.gguf` file or a hub name; load a whole one."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from trackstar.corpus.local_files import check_not_special
from trackstar.errors import ModelError
from trackstar.model.adapter_files import is_adapter_folder
from trackstar.model.loading import load_pretrained, may_be_on_hub
from trackstar.model.quantization import ADVICE, dequantized, dequantizing_options, quantization_method


def resolved(source: str | Path, gguf_file: str | None) -> tuple[Path | None, str | None]:
    """The local folder, or None for a hub name, and the name of the GGUF file, or None for safetensors.

    Raises:
        ModelError: It is neither a model's folder, an adapter's, a `.gguf` file nor a possible hub name.
    """
    path = Path(source)
    check_not_special(path, ModelError)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"{source}: is a file; expected a model folder, a .gguf file or a hub name")
        return path.parent, path.name
    if not path.is_dir():
        if not may_be_on_hub(str(source)):
            raise ModelError(f"{source}: no such folder; expected a model folder, a .gguf file or a hub name")
        return None, gguf_file
    if gguf_file is not None and not (path / gguf_file).is_file():
        raise ModelError(f"{path / gguf_file}: no such file; expected GGUF weights; correct `gguf_file`")
    if gguf_file is None and not (path / "config.json").exists() and not is_adapter_folder(path):
        weights = sorted(file.name for file in path.glob("*.gguf"))
        checkpoints = sorted(folder.name for folder in path.glob("checkpoint-*") if _is_model(folder))
        if checkpoints:
            raise ModelError(
                f"{source}: is a training run's folder; expected one of its models, such as {path / checkpoints[-1]}"
            )
        if len(weights) != 1:
            raise ModelError(
                f"{source}: found no config.json and {len(weights)} .gguf files; expected a Transformers model folder, "
                "a PEFT adapter's folder, or one .gguf file; name one of several with `gguf_file`"
            )
        gguf_file = weights[0]
    return path, gguf_file


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").exists() or is_adapter_folder(folder)


def load_whole(name: str, *, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
    """The causal language model of a folder or hub name, with weights in floating point.

    Args:
        name: The folder or hub name.
        dtype: Dtype of its weights.
        **options: Further arguments of `from_pretrained`.

    Raises:
        ModelError: It cannot be loaded.
    """
    method = quantization_method(name, **options)
    expected = "a Hugging Face model folder or hub name with safetensors weights, or GGUF weights"
    if method is not None:
        expected = f"weights that are not quantised, which these are ({method}); {ADVICE}"
    module = load_pretrained(
        "AutoModelForCausalLM",
        name,
        name=name,
        purpose="a causal language model",
        expected=expected,
        whole="a complete causal language model (missing weights would be random)",
        dtype=dtype,
        **options,
        **dequantizing_options(name, **options),
    )
    return dequantized(module, name, dtype)
