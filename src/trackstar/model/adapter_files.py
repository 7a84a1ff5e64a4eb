"""Read a PEFT adapter from a folder or the hub, with the base model that it was trained on."""

import importlib.util
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from trackstar.corpus.local_files import check_no_special_inside
from trackstar.errors import ModelError
from trackstar.model.head import embedding_weight
from trackstar.model.loading import may_be_on_hub, quiet
from trackstar.text import abridged, one_line

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_BASE = "base_model_name_or_path"
_PREFIX = "base_model.model."
_COPY = ".modules_to_save."
_RANKS = {"LORA": ("r",), "LOHA": ("r",), "VERA": ("r",), "ADALORA": ("init_r",)}
"""Fields of a configuration that are dimensions of the adapter's tensors, by method."""
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


LoadBase = Callable[..., PreTrainedModel]
"""Loads a model from a folder or hub name, and options of `from_pretrained`."""


def is_adapter_folder(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter."""
    return (folder / ADAPTER_CONFIG).is_file()


def adapter_folder_of_hub(name: str, revision: str | None) -> Path | None:
    """The local copy of an adapter on the hub; None if the name is not an adapter's, or cannot be found."""
    from transformers.utils.hub import cached_file

    files = [ADAPTER_CONFIG, ADAPTER_WEIGHTS, *_TOKENIZER_FILES, "special_tokens_map.json", "chat_template.jinja"]
    found = None
    for file in files:
        try:
            path = cached_file(
                name,
                file,
                revision=revision,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_gated_repo=False,
                _raise_exceptions_for_connection_errors=False,
            )
        except (OSError, ValueError):  # no such repository, or no name of one: loading the model says so
            path = None
        if file == ADAPTER_CONFIG:
            if path is None:
                return None
            found = Path(path).parent
    return found


def load_adapter(folder: Path, name: str, load_base: LoadBase) -> tuple[PreTrainedModel, str | Path]:
    """The base model with an adapter in its place, and where its tokenizer is.

    Args:
        folder: The adapter's folder.
        name: Its name in messages.
        load_base: Loads the base model.

    Raises:
        ModelError: PEFT is not installed, the adapter or its base model cannot be read, or they do
            not fit each other.
    """
    if importlib.util.find_spec("peft") is None:
        raise ModelError(
            f"{name}: is a PEFT adapter, and PEFT is not installed; expected it; pip install 'trackstar-tda[peft]'"
        )
    check_no_special_inside(folder, ModelError)
    fields = _fields(folder, name)
    base = _base(folder, name, fields)
    shapes = _weight_shapes(folder / ADAPTER_WEIGHTS, name)
    _check_rank(fields, shapes, name)
    revision = fields.get("revision")
    options = {"revision": revision} if isinstance(revision, str) and not isinstance(base, Path) else {}
    try:
        module = load_base(str(base), **options)
    except ModelError as error:
        raise ModelError(
            f"{error}; this is the base model that {folder / ADAPTER_CONFIG} names: make it one that can be loaded, or "
            f"{_mend(folder)}"
        ) from None
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they say is checked below
        _resize(module, shapes, name)
        network = _with_adapter(module, folder, name, shapes)
    own = any((folder / file).is_file() for file in _TOKENIZER_FILES)
    return network, folder if own else base


def _with_adapter(
    module: PreTrainedModel, folder: Path, name: str, shapes: Mapping[str, tuple[int, ...]]
) -> PreTrainedModel:
    """The base model with the adapter of a folder in its place, trainable as it was trained."""
    from peft import PeftConfig, PeftModelForCausalLM
    from peft.config import PeftConfig as Configuration

    expected = "an adapter that PEFT's `save_pretrained` wrote"
    try:
        configuration: Configuration = PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # of many types, for a file that it cannot use
        raise ModelError(
            f"{name}: its {ADAPTER_CONFIG} cannot be read ({_reason(error)}); expected {expected}; update peft, or "
            "restore the file"
        ) from None
    task, method = getattr(configuration.task_type, "value", configuration.task_type), configuration.peft_type
    if task not in (None, "CAUSAL_LM"):
        raise ModelError(
            f"{name}: its {ADAPTER_CONFIG} has task_type {abridged(task)}, expected CAUSAL_LM, an adapter of a causal "
            "language model; use such an adapter"
        )
    if configuration.is_prompt_learning or getattr(configuration, "is_adaption_prompt", False):
        raise ModelError(
            f"{name}: its {getattr(method, 'value', method)} adapter changes no weights, whose gradients trackstar "
            "computes; expected one that can be merged into weights, such as LoRA; tune with such an adapter, or use "
            "the base model alone"
        )
    try:
        configuration.inference_mode = False
        wrapped = PeftModelForCausalLM(module, configuration)
        loaded = wrapped.load_adapter(str(folder), "default", is_trainable=True, torch_device="cpu")
    except Exception as error:  # PEFT raises errors of many types for an adapter of another model
        raise ModelError(
            f"{name}: the adapter does not fit its base model {_shown(configuration.base_model_name_or_path)} "
            f"({_reason(error)}); expected the model that it was trained on; correct {_BASE} in "
            f"{folder / ADAPTER_CONFIG}"
        ) from None
    # PEFT writes embeddings that were resized and trained a second time, under the name of their copy.
    copied = [key for key in loaded.unexpected_keys if key.replace(_COPY, ".") in shapes and _COPY in key]
    wrong = [*loaded.missing_keys, *(key for key in loaded.unexpected_keys if key not in copied)]
    if wrong:
        kind = "lack" if loaded.missing_keys else "hold"
        raise ModelError(
            f"{name}: its weights {kind} {one_line(wrong[0], 200)}, expected those of all parameters that the adapter "
            f"has in {type(module).__name__}, and no others; restore {ADAPTER_WEIGHTS}, or correct {_BASE} in "
            f"{folder / ADAPTER_CONFIG}"
        )
    return wrapped.get_base_model()  # pyright: ignore[reportReturnType]


def _fields(folder: Path, name: str) -> Mapping[str, Any]:
    """The adapter's configuration, as it is in its file."""
    try:
        fields = json.loads((folder / ADAPTER_CONFIG).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"{name}: its {ADAPTER_CONFIG} cannot be read ({_reason(error)}); expected JSON; restore the file"
        ) from None
    if not isinstance(fields, dict):
        raise ModelError(
            f"{name}: its {ADAPTER_CONFIG} is {abridged(fields)}; expected a JSON object; restore the file"
        )
    return fields


def _base(folder: Path, name: str, fields: Mapping[str, Any]) -> Path | str:
    """The base model: a folder, relative to the adapter's or the working one, or a hub name."""
    written = fields.get(_BASE)
    mend = _mend(folder)
    if not isinstance(written, str) or not written:
        raise ModelError(
            f"{name}: its {ADAPTER_CONFIG} has {_BASE} {abridged(written)}; expected its base model; {mend}"
        )
    for path in (folder / written, Path(written)):
        if path.is_dir() and not path.samefile(folder):
            if is_adapter_folder(path):
                raise ModelError(
                    f"{name}: its base model {path} is an adapter itself, expected a whole model; merge that adapter "
                    f"with PEFT's `merge_and_unload`, save the result, and {mend}"
                )
            return path
    if not may_be_on_hub(written):
        raise ModelError(
            f"{name}: its base model {_shown(written)} is no folder, neither seen from the adapter's folder nor from "
            f"the working directory; expected the model that the adapter was trained on; {mend}"
        )
    return written


def _mend(folder: Path) -> str:
    return f"set {_BASE} in {folder / ADAPTER_CONFIG} to the base model's folder or hub name"


def _weight_shapes(path: Path, name: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the adapter's tensors by name, from the file's header."""
    if not path.is_file():
        others = sorted(file.name for file in path.parent.glob("adapter_model*"))
        way = "load the adapter with PEFT and save it again with `save_pretrained`" if others else "restore the file"
        raise ModelError(f"{name}: found {', '.join(others) or 'no weights'}, expected {ADAPTER_WEIGHTS}; {way}")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{name}: its {ADAPTER_WEIGHTS} is not a whole safetensors file ({_reason(error)}); restore the file"
        ) from None


def _check_rank(fields: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], name: str) -> None:
    """Raise if a rank is below 1 or above every dimension of the weights, before memory is taken for it."""
    ranks = {key: fields.get(key) for key in _RANKS.get(str(fields.get("peft_type")), ())}
    pattern = fields.get("rank_pattern")
    ranks |= {f"rank_pattern of {key}": rank for key, rank in pattern.items()} if isinstance(pattern, dict) else {}
    largest = max((size for shape in shapes.values() for size in shape), default=0)
    for key, rank in ranks.items():
        if isinstance(rank, int) and not 1 <= rank <= largest:
            raise ModelError(
                f"{name}: its {ADAPTER_CONFIG} has {one_line(key, 100)} {abridged(rank)}, expected 1 to {largest}, the "
                "largest dimension of its weights; restore the file"
            )


def _resize(module: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]], name: str) -> None:
    """Give the base model as many tokens as the adapter was trained with.

    Raises:
        ModelError: The adapter holds only the embeddings or only the head of the additional tokens.
    """
    tables: dict[str, nn.Module | None] = {
        "input": module.get_input_embeddings(),
        "output": module.get_output_embeddings(),
    }
    names = {id(child): path for path, child in module.named_modules()}
    rows: dict[str, int] = {}
    for role, table in tables.items():
        path = names.get(id(table))
        for suffix in ("weight", "base_layer.weight", "token_adapter.base_layer.weight"):
            shape = shapes.get(f"{_PREFIX}{path}.{suffix}")
            if shape is not None:
                rows[role] = shape[0]
    present = len(embedding_weight(module))
    wanted = max(rows.values(), default=present)
    if wanted == present:
        return
    tied = tables["output"] is not None and tables["output"].weight is module.get_input_embeddings().weight
    missing = next((role for role in tables if role not in rows and not tied), None)
    if missing is not None or len(set(rows.values())) > 1:
        raise ModelError(
            f"{name}: was trained with {wanted:,} tokens, its base model has {present:,}, and its weights lack the "
            f"{missing or 'same number of'} embeddings of the others; expected both; save the adapter again with "
            "`save_embedding_layers=True`"
        )
    module.resize_token_embeddings(wanted, mean_resizing=False)


def _shown(value: object) -> str:
    return one_line(str(value), 200)


def _reason(error: Exception) -> str:
    return one_line(error, 300) or type(error).__name__
