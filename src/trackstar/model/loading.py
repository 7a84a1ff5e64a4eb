"""Load pretrained models with Transformers: quietly, without running their code, and only if complete."""

import contextlib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from trackstar.corpus.digests import running_digest
from trackstar.corpus.local_files import check_no_special_inside
from trackstar.errors import ModelError
from trackstar.text import abridged, one_line

_SIZES = (
    "num_hidden_layers", "n_layer", "num_layers", "hidden_size", "n_embd", "d_model", "vocab_size",
    "num_attention_heads", "n_head", "num_heads", "max_position_embeddings", "n_positions",
)  # fmt: skip
"""Fields of config.json that are sizes, by the names that families of models give them."""

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
        ModelError: It cannot be loaded, weights are missing and would be random, or the
            configuration does not fit the weights.
    """
    import transformers

    folder = Path(source)
    shapes: Mapping[str, tuple[int, ...]] = {}
    with quiet():
        if folder.is_dir():
            check_no_special_inside(folder, ModelError)
            shapes = _check_sizes(folder, name, options.get("gguf_file"))
        if "gguf_file" not in options:
            options["use_safetensors"] = True
        try:
            module, info = getattr(transformers, kind).from_pretrained(
                source, trust_remote_code=False, output_loading_info=True, **options
            )
        except Exception as error:  # transformers raises errors of many types for a folder that it cannot use
            reason = _mismatch(kind, folder, shapes) if "ignore_mismatched_sizes" in str(error) else None
            raise ModelError(
                f"{name}: cannot be loaded as {purpose} ({reason or _reason(error)}); expected {expected}"
            ) from None
    missing = sorted(key for key in (info or {}).get("missing_keys", ()) if not _begins(key, not_needed))
    if missing:
        raise ModelError(
            f"{name}: its weights lack {len(missing)} parameters of {type(module).__name__}, first {missing[0]}; "
            f"expected {whole}"
        )
    left_over = _layers_left_over(module, (info or {}).get("unexpected_keys", ()))
    if left_over:
        raise ModelError(
            f"{name}: its weights hold {len(left_over)} parameters of layers that its configuration leaves out, first "
            f"{left_over[0]}; expected a configuration with all layers of the weights; restore config.json"
        )
    return module


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the log lines and progress bars of Transformers and of the hub's client."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # an unreachable hub raises an error, too
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def _check_sizes(folder: Path, name: str, gguf_file: str | None) -> Mapping[str, tuple[int, ...]]:
    """Check a configuration's sizes; return the shapes of the weights by name, none if they cannot be read.

    A configuration of a million layers would be built for hours before a weight is missed, so its
    sizes are compared with the weights' headers.

    Raises:
        ModelError: A size is not positive, or larger than any weights of this folder can have.
    """
    from transformers import AutoConfig

    if gguf_file is not None:
        _check_gguf(folder / gguf_file, name)
        return {}
    _check_positive(folder / "config.json", name)
    try:
        configuration = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()
    except Exception:  # `from_pretrained` raises it again
        return {}
    shapes = _weight_shapes(folder)
    quantized = getattr(configuration, "quantization_config", None) is not None
    largest = max((size for shape in shapes.values() for size in shape), default=0)
    for field in ("num_hidden_layers", "hidden_size", "vocab_size"):
        value = getattr(configuration, field, None)
        if not isinstance(value, int):
            continue
        if field == "num_hidden_layers" and shapes and value > len(shapes):
            raise ModelError(
                f"{name}: its config.json has {field} {abridged(value)}, but its weights are {len(shapes)} tensors; "
                "expected one or more for each layer; restore the file"
            )
        if field in ("hidden_size", "vocab_size") and shapes and value > largest and not quantized:
            raise ModelError(
                f"{name}: its config.json has {field} {abridged(value)}, but the largest dimension of its weights is "
                f"{largest}; expected the configuration that the weights were saved with; restore the file"
            )
    return shapes


def _check_positive(config: Path, name: str) -> None:
    """Raise if a configuration has a size below 1; a file that is no JSON object is not checked.

    Raises:
        ModelError: It has; the message names the field.
    """
    try:
        fields = json.loads(config.read_bytes())
    except (OSError, ValueError, RecursionError):  # Transformers raises it again
        return
    parts = [fields, fields.get("text_config")] if isinstance(fields, dict) else []
    for part in (part for part in parts if isinstance(part, dict)):
        for field in _SIZES:
            value = part.get(field)
            if isinstance(value, int) and not isinstance(value, bool) and value < 1:
                raise ModelError(
                    f"{name}: its config.json has {field} {abridged(value)}; expected 1 or more; restore the file"
                )


def _weight_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors in a folder's safetensors files, from their headers; empty if one is damaged."""
    shapes: dict[str, tuple[int, ...]] = {}
    try:
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError):
        return {}
    return shapes


def _check_gguf(path: Path, name: str) -> None:
    """Raise if a GGUF file cannot be read, or names more layers than it has tensors.

    Raises:
        ModelError: It cannot be loaded, for one of these reasons.
    """
    from gguf import GGUFReader

    try:
        reader: Any = GGUFReader(path)
        architecture = reader.fields["general.architecture"].contents()
        field = reader.fields.get(f"{architecture}.block_count")
        layers = 1 if field is None else int(field.contents())
    except Exception as error:  # the reader checks little
        raise ModelError(
            f"{name}: cannot be loaded ({path.name} is not a whole GGUF file: {_reason(error)}); expected GGUF weights;"
            " copy the file from its source again"
        ) from None
    if not 1 <= layers <= len(reader.tensors):
        raise ModelError(
            f"{name}: {path.name} has {architecture}.block_count {layers}, but {len(reader.tensors)} tensors; expected "
            "one or more for each layer; copy the file from its source again"
        )


def _mismatch(kind: str, folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The first tensor whose shape is not what the configuration says."""
    import transformers

    unnamed = "a tensor of the weights has another shape than the configuration says"

    try:
        with torch.device("meta"):
            configuration = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
            module = getattr(transformers, kind).from_config(configuration)
    except Exception:  # the shapes cannot be compared
        return unnamed
    for key, tensor in module.state_dict().items():
        if key in shapes and shapes[key] != tuple(tensor.shape):
            return f"{key} has shape {shapes[key]} in the weights, but {tuple(tensor.shape)} by config.json"
    return unnamed


def _layers_left_over(module: nn.Module, unexpected: "list[str] | tuple[str, ...] | set[str]") -> list[str]:
    """Names of weights that the model does not have, but has in other layers: only their numbers differ."""

    def numberless(key: str) -> str:
        return re.sub(r"\d+", "0", key)

    if not unexpected:
        return []
    names = {numberless(key) for key, _ in module.named_parameters()}
    return sorted(key for key in unexpected if numberless(key) in names)


def load_pretrained_tokenizer(source: str | Path, *, name: str, **options: Any) -> Any:
    """Load a model's tokenizer; arguments as in `load_pretrained`.

    Raises:
        ModelError: It cannot be loaded.
    """
    from transformers import AutoTokenizer

    check_no_special_inside(source, ModelError)
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False, **options)
    except Exception as error:
        raise ModelError(
            f"{name}: its tokenizer cannot be loaded ({_reason(error)}); expected tokenizer.json"
        ) from None


def may_be_on_hub(source: str) -> bool:
    """Whether a name that is no folder may be on the hub: `NAME` or `OWNER/NAME`, and no missing folder."""
    owner, slash, name = source.partition("/")
    if source.startswith((".", "~", "/")) or "\\" in source or "/" in name or (slash and not name):
        return False
    return not (slash and Path(owner).is_dir())


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


def _begins(key: str, prefix: str | None) -> bool:
    return prefix is not None and key.startswith(prefix)


def _reason(error: Exception) -> str:
    return one_line(error) or type(error).__name__
