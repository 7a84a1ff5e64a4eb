"""Load pretrained models with Transformers: quietly, without running their code, and only if complete."""

import logging
from pathlib import Path
from typing import Any

import accelerate
import accelerate.utils
import torch
from torch import nn

from trackstar.corpus.digests import running_digest
from trackstar.errors import ModelError, OptionError
from trackstar.text import first_line, one_line

_CONTENT = {".json", ".safetensors", ".txt", ".model", ".gguf"}


def load_pretrained(
    kind: str,
    source: str | Path,
    *,
    name: str,
    purpose: str,
    expected: str,
    whole: str,
    not_needed: str | None = None,
    **options: Any,
) -> Any:
    """Load a Transformers model with all of its weights, from safetensors unless `options` names a GGUF file.

    Args:
        kind: Name of the class that loads it, such as `AutoModel`.
        source: A folder or hub name.
        name: Its name in messages.
        purpose: Its use, with an article, for messages.
        expected: Description of a source that can be loaded, for messages.
        whole: Description of a model without missing weights, for messages.
        not_needed: Prefix of the names of weights that may be missing.
        **options: Further arguments of `from_pretrained`.

    Raises:
        ModelError: It cannot be loaded, or weights are missing and would be random.
    """
    import transformers
    from transformers.utils import logging as transformers_logging

    if "gguf_file" not in options:
        options["use_safetensors"] = True
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # an unreachable hub raises the error below
    try:
        module, info = getattr(transformers, kind).from_pretrained(
            source, trust_remote_code=False, output_loading_info=True, **options
        )
    except Exception as error:  # transformers raises errors of many types for a folder that it cannot use
        raise ModelError(f"{name}: cannot be loaded as {purpose} ({_reason(error)}); expected {expected}") from None
    finally:
        transformers_logging.set_verbosity(verbosity)
    missing = sorted(key for key in (info or {}).get("missing_keys", ()) if not _begins(key, not_needed))
    if missing:
        raise ModelError(
            f"{name}: its weights lack {len(missing)} parameters of {type(module).__name__}, first {missing[0]}; "
            f"expected {whole}"
        )
    return module


def load_pretrained_tokenizer(source: str | Path, *, name: str, **options: Any) -> Any:
    """Load a model's tokenizer; arguments as in `load_pretrained`.

    Raises:
        ModelError: It cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False, **options)
    except Exception as error:
        raise ModelError(
            f"{name}: its tokenizer cannot be loaded ({_reason(error)}); expected tokenizer.json"
        ) from None


def pretrained_digest(source: str | Path) -> str:
    """Digest of a folder's configuration, tokenizer and weights; the source itself if it is no folder."""
    folder = Path(source)
    if not folder.is_dir():
        return str(source)
    digest = running_digest()
    for path in sorted(folder.rglob("*")):
        if path.suffix in _CONTENT and path.is_file():
            digest.update(f"{path.relative_to(folder)} {path.stat().st_size}\n".encode())
            with path.open("rb") as file:
                while part := file.read(1 << 24):
                    digest.update(part)
    return digest.hexdigest()


def spread_over_gpus(module: nn.Module, name: str) -> None:
    """Distribute a model's layers over all GPUs of this machine in order, with Accelerate's device map.

    Without a GPU the model is not moved.

    Args:
        module: The model, in main memory.
        name: Its name in messages.

    Raises:
        ModelError: The GPUs together are too small for it.
    """
    if not torch.cuda.is_available():
        return
    unsplit = list(getattr(module, "_no_split_modules", None) or [])
    memory = accelerate.utils.get_balanced_memory(module, no_split_module_classes=unsplit)
    device_map = accelerate.infer_auto_device_map(module, max_memory=memory, no_split_module_classes=unsplit)
    if not all(isinstance(device, int) for device in device_map.values()):
        raise ModelError(
            f"{name}: does not fit on this machine's {torch.cuda.device_count()} GPUs; expected room for all of its "
            'weights; pass `dtype="bfloat16"`, or use more GPUs'
        )
    accelerate.dispatch_model(module, device_map)


def checked_device(device: str) -> torch.device:
    """The torch device of that name, if this machine has it.

    Raises:
        OptionError: This machine does not have it.
    """
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError) as error:
        raise OptionError(
            f"`device`: expected cpu or an available cuda device, found {device} ({first_line(error, 400)})"
        ) from None
    return target


def _begins(key: str, prefix: str | None) -> bool:
    return prefix is not None and key.startswith(prefix)


def _reason(error: Exception) -> str:
    return one_line(error) or type(error).__name__
