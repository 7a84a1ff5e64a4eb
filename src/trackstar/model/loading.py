"""Load what others have trained, by Transformers: quietly, without running its code, and only where it is complete."""

import hashlib
import logging
from pathlib import Path
from typing import Any

import accelerate
import accelerate.utils
import torch
from torch import nn

from trackstar.corpus.data_files import one_line
from trackstar.errors import ModelError, OptionError

_CONTENT = {".json", ".safetensors", ".txt", ".model", ".gguf"}


def load_pretrained(
    kind: str,
    place: str | Path,
    *,
    name: str,
    purpose: str,
    expected: str,
    whole: str,
    not_needed: str | None = None,
    **options: Any,
) -> Any:
    """A Transformers model with all of its weights; safetensors alone unless `options` name GGUF weights.

    Args:
        kind: The class that loads it, such as `AutoModel`.
        place: A folder or hub name.
        name: What messages call it.
        purpose: What it is loaded as, with its article, for messages.
        expected: What it could be loaded from, for messages.
        whole: What is expected where weights are missing, and what would happen, for messages.
        not_needed: Beginning of names of weights that may be missing.
        **options: Passed on.

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
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # a hub out of reach is told in one line, below
    try:
        module, info = getattr(transformers, kind).from_pretrained(
            place, trust_remote_code=False, output_loading_info=True, **options
        )
    except Exception as error:  # transformers raises nearly anything for a folder that it cannot use
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


def load_pretrained_tokenizer(place: str | Path, *, name: str, **options: Any) -> Any:
    """Its tokenizer.

    Raises:
        ModelError: It cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(place, trust_remote_code=False, **options)
    except Exception as error:
        raise ModelError(
            f"{name}: its tokenizer cannot be loaded ({_reason(error)}); expected tokenizer.json"
        ) from None


def pretrained_digest(place: str | Path) -> str:
    """A digest of a folder's configuration, tokenizer and weights; a hub's name where there is no such folder."""
    folder = Path(place)
    if not folder.is_dir():
        return str(place)
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(folder.rglob("*")):
        if path.suffix in _CONTENT and path.is_file():
            digest.update(f"{path.relative_to(folder)} {path.stat().st_size}\n".encode())
            with path.open("rb") as file:
                while part := file.read(1 << 24):
                    digest.update(part)
    return digest.hexdigest()


def spread_over_gpus(module: nn.Module, name: str) -> None:
    """Put a model's layers on all GPUs of this machine, one after the other, as Accelerate finds room for them.

    Where there is no GPU it stays where it is.

    Args:
        module: The model, in main memory.
        name: What errors call it.

    Raises:
        ModelError: The GPUs together are too small for it.
    """
    if not torch.cuda.is_available():
        return
    whole = list(getattr(module, "_no_split_modules", None) or [])
    memory = accelerate.utils.get_balanced_memory(module, no_split_module_classes=whole)
    places = accelerate.infer_auto_device_map(module, max_memory=memory, no_split_module_classes=whole)
    if not all(isinstance(place, int) for place in places.values()):
        raise ModelError(
            f"{name}: does not fit on this machine's {torch.cuda.device_count()} GPUs; expected room for all of its "
            "weights; give --dtype bfloat16, or more GPUs"
        )
    accelerate.dispatch_model(module, places)


def checked_device(device: str) -> torch.device:
    """The torch device of that name, if this machine has it.

    Raises:
        OptionError: It has not.
    """
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise OptionError(f"--device {device}: not usable here ({reason}); expected cpu or an available cuda") from None
    return target


def _begins(key: str, prefix: str | None) -> bool:
    return prefix is not None and key.startswith(prefix)


def _reason(error: Exception) -> str:
    return one_line(error)[:300] or type(error).__name__
