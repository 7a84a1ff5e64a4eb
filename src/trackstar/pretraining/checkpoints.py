"""Checkpoints that are there whole or not at all: a model folder, the optimizer's state, and where the run was.

    OUT/checkpoint-000500/
        config.json, model.safetensors, generation_config.json      loaded by AutoModelForCausalLM
        tokenizer.json, tokenizer_config.json                       loaded by AutoTokenizer
        optimizer.safetensors     STATE/PARAMETER to tensor; not there at step 0, where the optimizer has no state
        training_state.json       settings, corpus, steps done, place in the order of the data

A checkpoint is written into a folder beside its place, brought to the disk (fsync) and renamed. Nothing is pickled.
"""

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.utils import logging as transformers_logging

from trackstar.errors import PretrainingError
from trackstar.pretraining.optimizers import optimizer_tensors, restore_optimizer

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "training_state.json"
WEIGHTS_FILE = "model.safetensors"
LOCK_FILE = ".lock"
PARTIAL_SUFFIX = ".partial"
FORMAT_VERSION = 1
_NAME = re.compile(r"checkpoint-(\d{6,})")
_RETRY = "restore it from a copy, or delete its folder to go on from the checkpoint before"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TrainingState:
    """What a run was made with and how far it got; `training_state.json`.

    Attributes:
        format_version: Of this file.
        settings: The fields of `PretrainingConfig`.
        corpus: The corpus's digest.
        tokenizer: The tokenizer's digest.
        optimizer: The optimizer's class and hyperparameters.
        learning_rate: Of the last step that was made; 0 before the first.
        step: Steps made.
        epoch: Which reading of the corpus the next step is in, from 0.
        batch: Which batch of that epoch comes next. The order of the data is a function of the seed and the epoch, and
            nothing else in the run is random, so this is all the state that a generator would have.
        threads: CPU threads of the run; sums come out bit for bit the same only with as many.
    """

    format_version: int
    settings: Mapping[str, Any]
    corpus: str
    tokenizer: str
    optimizer: Mapping[str, Any]
    learning_rate: float
    step: int
    epoch: int
    batch: int
    threads: int


def checkpoint_path(out: Path, step: int) -> Path:
    """The folder of the checkpoint after that many steps."""
    return out / f"checkpoint-{step:06d}"


def prepare_folder(out: Path) -> None:
    """Make the run's folder, or check that an existing one holds a run or nothing.

    Raises:
        PretrainingError: Something else is in it, or it cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        names = sorted(entry.name for entry in out.iterdir())
    except OSError as error:
        raise PretrainingError(
            f"{out}: cannot be used as the run's folder ({error.strerror or error}); choose another"
        ) from error
    foreign = [name for name in names if name != LOCK_FILE and not _NAME.fullmatch(name.removesuffix(PARTIAL_SUFFIX))]
    if foreign:
        raise PretrainingError(
            f"{out}: holds {foreign[0]}, expected an empty folder or a pretraining run's; choose another folder"
        )


def remove_partial(out: Path) -> None:
    """Remove what killed runs left unfinished."""
    for folder in out.glob(f"checkpoint-*{PARTIAL_SUFFIX}"):
        shutil.rmtree(folder)


def newest_checkpoint(out: Path) -> Path | None:
    """The checkpoint after the most steps, or None."""
    found = [path for path in out.iterdir() if _NAME.fullmatch(path.name)]
    return max(found, key=lambda path: int(path.name.removeprefix("checkpoint-")), default=None)


def read_state(checkpoint: Path) -> TrainingState:
    """What the checkpoint's run was made with.

    Raises:
        PretrainingError: The file is missing or is not as it was written.
    """
    path = checkpoint / STATE_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.get("format_version") != FORMAT_VERSION:
            raise ValueError(f"expected format_version {FORMAT_VERSION}")
        return TrainingState(**content)
    except OSError as error:
        raise PretrainingError(f"{path}: cannot be read ({error.strerror}); {_RETRY}") from error
    except (ValueError, TypeError) as error:
        raise PretrainingError(f"{path}: is not a training state ({error}); {_RETRY}") from error


def write_checkpoint(
    out: Path,
    state: TrainingState,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    optimizer: "Optimizer",
) -> Path:
    """Write the checkpoint after `state.step` steps, durably, and give its folder.

    Raises:
        PretrainingError: It cannot be written; earlier checkpoints are kept, and nothing of this one is left.
    """
    final = checkpoint_path(out, state.step)
    partial = final.with_name(final.name + PARTIAL_SUFFIX)
    try:
        partial.mkdir()
        _save_model(model, partial)
        tokenizer.save_pretrained(partial)
        tensors = optimizer_tensors(model, optimizer)
        if tensors:
            # One entry of metadata alone: several are written in any order, and equal runs should give equal files.
            save_file(tensors, partial / OPTIMIZER_FILE, metadata={"optimizer": str(state.optimizer["optimizer"])})
        text = json.dumps(dataclasses.asdict(state), indent=2, sort_keys=True)
        (partial / STATE_FILE).write_text(text + "\n", encoding="utf-8")
        for path in [*partial.iterdir(), partial]:
            _sync(path)
        partial.rename(final)
        _sync(out)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        raise PretrainingError(
            f"{final}: cannot be written ({reason}); free some space or make it writable, then run the same command "
            "again: it goes on from the checkpoint before"
        ) from error
    return final


def restore(checkpoint: Path, model: "PreTrainedModel", optimizer: "Optimizer") -> None:
    """Give a new model and its optimizer the weights and the state of a checkpoint.

    Raises:
        PretrainingError: A file is missing, damaged or of another model.
    """
    weights = _load(checkpoint / WEIGHTS_FILE)
    own = dict(model.named_parameters())
    wrong = next((name for name, weight in own.items() if _shape(weights.get(name)) != tuple(weight.shape)), None)
    if wrong is not None:
        raise PretrainingError(
            f"{checkpoint / WEIGHTS_FILE}: {wrong} has shape {_shape(weights.get(wrong))}, expected "
            f"{tuple(own[wrong].shape)}; {_RETRY}"
        )
    for name, parameter in own.items():
        parameter.data.copy_(weights[name])
    if read_state(checkpoint).step > 0:
        path = checkpoint / OPTIMIZER_FILE
        restore_optimizer(model, optimizer, _load(path), str(path))


def _save_model(model: "PreTrainedModel", folder: Path) -> None:
    """`save_pretrained`, without the bar that it draws."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _load(path: Path) -> dict[str, Any]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise PretrainingError(f"{path}: cannot be read ({reason}); {_RETRY}") from error


def _shape(tensor: Any) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(tensor.shape)


def _sync(path: Path) -> None:
    """Bring a file, or a folder's list of files, to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
