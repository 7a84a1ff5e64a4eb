"""Write and read atomic checkpoints: a model folder, the optimizer's state, and the run's position.

    OUT/checkpoint-000500/
        config.json, model.safetensors, generation_config.json      loaded by AutoModelForCausalLM
        tokenizer.json, tokenizer_config.json                       loaded by AutoTokenizer
        optimizer.safetensors     STATE/PARAMETER to tensor; absent at step 0, before there is a state
        training_state.json       settings, corpus, steps made, position in the data order

A checkpoint is written to a temporary folder, synchronized to disk (fsync) and renamed. Nothing is pickled.
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
from trackstar.text import system_reason

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
_ADVICE = "restore it from a copy, or delete its folder to resume from the previous checkpoint"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TrainingState:
    """Settings and progress of a run, stored as `training_state.json`.

    Attributes:
        format_version: Version of the file's format.
        settings: The fields of `PretrainingConfig`.
        corpus: The corpus's digest.
        tokenizer: The tokenizer's digest.
        optimizer: The optimizer's class and hyperparameters.
        learning_rate: Learning rate of the last step; 0 before the first.
        step: Number of steps made.
        epoch: Epoch of the next step, from 0.
        batch: Number of the next batch in that epoch. The data order is a function of the seed and
            the epoch, and nothing else in the run is random, so no random generator's state is
            stored.
        threads: CPU threads of the run; sums are bit for bit equal only with the same number.
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
    """Folder of the checkpoint after `step` steps."""
    return out / f"checkpoint-{step:06d}"


def prepare_folder(out: Path) -> None:
    """Create the run's folder, or check that an existing one is empty or holds a run.

    Raises:
        PretrainingError: The folder holds something else, or cannot be created.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        names = sorted(entry.name for entry in out.iterdir())
    except OSError as error:
        raise PretrainingError(
            f"{out}: cannot be used as the run's folder ({system_reason(error)}); choose another folder"
        ) from error
    foreign = [name for name in names if name != LOCK_FILE and not _NAME.fullmatch(name.removesuffix(PARTIAL_SUFFIX))]
    if foreign:
        raise PretrainingError(
            f"{out}: holds {foreign[0]}, expected an empty folder or a pretraining run's; choose another folder"
        )


def remove_partial(out: Path) -> None:
    """Remove unfinished checkpoints of killed runs."""
    for folder in out.glob(f"checkpoint-*{PARTIAL_SUFFIX}"):
        shutil.rmtree(folder)


def newest_checkpoint(out: Path) -> Path | None:
    """The checkpoint after the most steps, or None."""
    checkpoints = [path for path in out.iterdir() if _NAME.fullmatch(path.name)]
    return max(checkpoints, key=lambda path: int(path.name.removeprefix("checkpoint-")), default=None)


def read_state(checkpoint: Path) -> TrainingState:
    """Read the settings and progress of a checkpoint's run.

    Raises:
        PretrainingError: The file is missing or damaged.
    """
    path = checkpoint / STATE_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.get("format_version") != FORMAT_VERSION:
            raise ValueError(f"expected format_version {FORMAT_VERSION}")
        return TrainingState(**content)
    except OSError as error:
        raise PretrainingError(f"{path}: cannot be read ({system_reason(error)}); {_ADVICE}") from error
    except (ValueError, TypeError) as error:
        raise PretrainingError(f"{path}: is not a training state ({error}); {_ADVICE}") from error


def write_checkpoint(
    out: Path,
    state: TrainingState,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    optimizer: "Optimizer",
) -> Path:
    """Write the checkpoint after `state.step` steps durably, and return its folder.

    Raises:
        PretrainingError: It cannot be written. Earlier checkpoints remain, and no part of this one.
    """
    final = checkpoint_path(out, state.step)
    partial = final.with_name(final.name + PARTIAL_SUFFIX)
    try:
        partial.mkdir()
        _save_model(model, partial)
        tokenizer.save_pretrained(partial)
        tensors = optimizer_tensors(model, optimizer)
        if tensors:
            # A single entry of metadata: several are written in any order, and equal runs should
            # give equal files.
            save_file(tensors, partial / OPTIMIZER_FILE, metadata={"optimizer": str(state.optimizer["optimizer"])})
        text = json.dumps(dataclasses.asdict(state), indent=2, sort_keys=True)
        (partial / STATE_FILE).write_text(text + "\n", encoding="utf-8")
        for path in [*partial.iterdir(), partial]:
            _sync(path)
        partial.rename(final)
        _sync(out)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise PretrainingError(
            f"{final}: cannot be written ({system_reason(error)}); free some space or make it writable, then call "
            "`pretrain` again: it resumes from the previous checkpoint"
        ) from error
    return final


def restore(checkpoint: Path, model: "PreTrainedModel", optimizer: "Optimizer") -> None:
    """Load a checkpoint's weights and optimizer state into a new model and optimizer.

    Raises:
        PretrainingError: A file is missing, damaged or of another model.
    """
    weights = read_tensors(checkpoint / WEIGHTS_FILE, advice=_ADVICE)
    parameters = dict(model.named_parameters())
    wrong = next((name for name, p in parameters.items() if _shape(weights.get(name)) != tuple(p.shape)), None)
    if wrong is not None:
        raise PretrainingError(
            f"{checkpoint / WEIGHTS_FILE}: {wrong} has shape {_shape(weights.get(wrong))}, expected "
            f"{tuple(parameters[wrong].shape)}; {_ADVICE}"
        )
    for name, parameter in parameters.items():
        parameter.data.copy_(weights[name])
    if read_state(checkpoint).step > 0:
        path = checkpoint / OPTIMIZER_FILE
        restore_optimizer(model, optimizer, read_tensors(path, advice=_ADVICE), str(path))


def read_tensors(path: Path, *, advice: str) -> dict[str, Any]:
    """Read a safetensors file.

    Args:
        path: The file.
        advice: What the user can do if it is missing or damaged, for the message.

    Raises:
        PretrainingError: The file is missing or damaged.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise PretrainingError(f"{path}: cannot be read ({system_reason(error)}); {advice}") from error


def _save_model(model: "PreTrainedModel", folder: Path) -> None:
    """`save_pretrained` without its progress bar."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _shape(tensor: Any) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(tensor.shape)


def _sync(path: Path) -> None:
    """Synchronize a file, or a folder's list of files, to disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
