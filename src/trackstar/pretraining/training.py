"""The training run: from a corpus to the checkpoints of a language model that has read it."""

import dataclasses
import hashlib
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trackstar.corpus import Corpus, open_corpus
from trackstar.errors import PretrainingError
from trackstar.model.batching import Batch
from trackstar.model.loading import checked_device
from trackstar.pretraining import checkpoints
from trackstar.pretraining.checkpoints import TrainingState
from trackstar.pretraining.config import FREE_TO_CHANGE, PretrainingConfig
from trackstar.pretraining.data_order import TokenizedCorpus, batches_from, epoch_batches, tokenize_corpus
from trackstar.pretraining.optimizers import apply_gradients, learning_rate, make_optimizer, optimizer_hyperparameters
from trackstar.pretraining.tokenizer import given_tokenizer, train_tokenizer
from trackstar.progress import Progress

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

NOTES_PER_RUN = 10


def pretrain(
    corpus: object,
    out: str | os.PathLike[str],
    config: PretrainingConfig,
    *,
    tokenizer: "PreTrainedTokenizerBase | str | Path | None" = None,
    device: str = "cpu",
    progress: bool = True,
) -> Path:
    """Train a decoder-only language model from scratch, or go on with a run that was interrupted.

    The loss of a step is the sum of its batch's token cross-entropies over their number. Run again after a kill at any
    moment it goes on from the newest checkpoint, and ends with the very weights of an undisturbed run (on one machine's
    CPU with as many threads). A finished run goes on when `config.steps` is raised.

    Args:
        corpus: A `Corpus`, or whatever `open_corpus` takes. Its tokens are held in memory, five bytes each.
        out: The run's folder: a checkpoint before the first step, every `config.checkpoint_steps` steps and at the end.
        config: The settings.
        tokenizer: A fast tokenizer, or the folder or hub name of one; None trains one on the corpus.
        device: A torch device, such as `cpu` or `cuda`.
        progress: Whether a bar may be shown.

    Returns:
        The folder of the last checkpoint: a model folder for `trackstar index`, with the optimizer's state.

    Raises:
        PretrainingError: `out` holds something else, a run with other settings, corpus or tokenizer (the message says
            what differs), or a damaged checkpoint; another process is writing it; a loss is not finite.
        CorpusError: A record cannot be read.
        OptionError: The device is unknown.
    """
    target = checked_device(device)
    opened = corpus if isinstance(corpus, Corpus) else open_corpus(corpus)
    folder = Path(out)
    checkpoints.prepare_folder(folder)
    try:
        with filelock.FileLock(folder / checkpoints.LOCK_FILE, timeout=0):
            checkpoints.remove_partial(folder)
            return _pretrain(opened, folder, config, tokenizer, target, progress)
    except filelock.Timeout:
        raise PretrainingError(
            f"{folder}: another process is training in it; wait for it or choose another folder"
        ) from None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Run:
    """What the loop needs, beside the state that it starts from."""

    config: PretrainingConfig
    out: Path
    model: "LlamaForCausalLM"
    tokenizer: "PreTrainedTokenizerBase"
    optimizer: Optimizer
    data: TokenizedCorpus
    device: torch.device


def _pretrain(
    corpus: Corpus,
    out: Path,
    config: PretrainingConfig,
    tokenizer: "PreTrainedTokenizerBase | str | Path | None",
    device: torch.device,
    progress: bool,
) -> Path:
    newest = checkpoints.newest_checkpoint(out)
    used = _tokenizer(corpus, config, tokenizer, newest)
    model = new_model(config, used)
    nn.Module.to(model, device)
    optimizer = make_optimizer(model, config)
    start = TrainingState(
        format_version=checkpoints.FORMAT_VERSION,
        settings=dataclasses.asdict(config),
        corpus=corpus.digest(),
        tokenizer=_tokenizer_digest(used),
        optimizer=optimizer_hyperparameters(optimizer),
        learning_rate=0.0,
        step=0,
        epoch=0,
        batch=0,
        threads=torch.get_num_threads(),
    )
    with Progress("Pretraining", unit="steps", total=config.steps, shown=progress) as shown:
        state = start
        if newest is not None:
            state = _resumed(newest, start, config, shown.note)
            if state.step == config.steps:
                shown.note(f"{newest}: all {config.steps:,} steps are made already")
                return newest
            checkpoints.restore(newest, model, optimizer)
        data = tokenize_corpus(corpus, used, window_tokens=config.context_tokens)
        run = _Run(config=config, out=out, model=model, tokenizer=used, optimizer=optimizer, data=data, device=device)
        _describe(run, shown.note)
        shown.advance(state.step)
        if newest is None:
            _save(run, start)
        return _train(run, dataclasses.replace(start, step=state.step, epoch=state.epoch, batch=state.batch), shown)


def _train(run: _Run, state: TrainingState, shown: Progress) -> Path:
    """Make the steps from `state` to the last, and give the last checkpoint."""
    config = run.config
    order = batches_from(
        run.data.lengths,
        state.epoch,
        state.batch,
        batch_tokens=config.batch_tokens,
        pool_examples=config.pool_examples,
        seed=config.seed,
    )
    run.model.train()
    record = _Record(config, shown.note)
    last = checkpoints.checkpoint_path(run.out, state.step)
    for step in range(state.step + 1, config.steps + 1):
        epoch, number, places = next(order)
        batch = run.data.batch(places, device=run.device)
        loss, targets = summed_loss(run.model, batch)
        (loss / targets).backward()
        record.add(step, loss.item(), targets)
        apply_gradients(run.model, run.optimizer, step, config)
        run.optimizer.zero_grad(set_to_none=True)
        shown.advance(1)
        if step % config.checkpoint_steps == 0 or step == config.steps:
            rate = learning_rate(step, config)
            state = dataclasses.replace(state, step=step, epoch=epoch, batch=number + 1, learning_rate=rate)
            last = _save(run, state)
    return last


def summed_loss(model: "LlamaForCausalLM", batch: Batch) -> tuple[Tensor, int]:
    """The sum of a batch's token cross-entropies, in nats, and how many tokens it is over.

    Only positions that predict a target reach the output head, so that padding costs no logits.
    """
    hidden = model.model(input_ids=batch.token_ids, use_cache=False).last_hidden_state
    predicted = batch.target_mask[:, 1:]
    logits = model.lm_head(hidden[:, :-1][predicted])
    labels = batch.token_ids[:, 1:][predicted]
    return nn.functional.cross_entropy(logits, labels, reduction="sum"), len(labels)


def new_model(config: PretrainingConfig, tokenizer: Any) -> "LlamaForCausalLM":
    """A model with the weights that the seed gives; random numbers drawn elsewhere do not matter."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.width,
        intermediate_size=config.mlp_width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.key_value_heads or config.heads,
        max_position_embeddings=config.context_tokens,
        initializer_range=config.initial_spread,
        tie_word_embeddings=config.tied_embeddings,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return LlamaForCausalLM(shape).float()


class _Record:
    """Checks every loss, and says about ten times a run what they are."""

    def __init__(self, config: PretrainingConfig, note: Callable[[str], None]) -> None:
        self._config = config
        self._note = note
        self._every = max(1, config.steps // NOTES_PER_RUN)
        self._loss, self._targets, self._since = 0.0, 0, time.perf_counter()

    def add(self, step: int, loss: float, targets: int) -> None:
        """Count a step's summed loss.

        Raises:
            PretrainingError: It is not finite.
        """
        config = self._config
        if not math.isfinite(loss):
            raise PretrainingError(
                f"step {step:,}: the loss is {loss}, expected a finite number; train in a new folder with a "
                f"base_learning_rate below {config.base_learning_rate}"
            )
        self._loss += loss
        self._targets += targets
        if step % self._every == 0 or step == config.steps:
            rate = self._targets / (time.perf_counter() - self._since)
            self._note(
                f"step {step:,} of {config.steps:,}: loss {self._loss / self._targets:.3f} nats a token, "
                f"{rate:,.0f} tokens/s"
            )
            self._loss, self._targets, self._since = 0.0, 0, time.perf_counter()


def _save(run: _Run, state: TrainingState) -> Path:
    """Write the checkpoint after `state.step` steps, if its weights are finite."""
    wrong = next((name for name, weight in run.model.named_parameters() if not torch.isfinite(weight).all()), None)
    if wrong is not None:
        raise PretrainingError(
            f"step {state.step:,}: {wrong} holds NaN or infinite weights, expected finite ones; train in a new folder "
            f"with a base_learning_rate below {run.config.base_learning_rate}"
        )
    return checkpoints.write_checkpoint(run.out, state, run.model, run.tokenizer, run.optimizer)


def _tokenizer(
    corpus: Corpus,
    config: PretrainingConfig,
    given: "PreTrainedTokenizerBase | str | Path | None",
    newest: Path | None,
) -> "PreTrainedTokenizerBase":
    """The tokenizer given, or the one of the run that goes on, or a new one."""
    chosen = newest if given is None else given
    if chosen is not None:
        return given_tokenizer(chosen)
    return train_tokenizer((example.text for example in corpus.examples()), vocabulary=config.vocabulary)


def _tokenizer_digest(tokenizer: Any) -> str:
    return hashlib.blake2b(tokenizer.backend_tokenizer.to_str().encode(), digest_size=16).hexdigest()


def _resumed(
    checkpoint: Path, start: TrainingState, config: PretrainingConfig, note: Callable[[str], None]
) -> TrainingState:
    """The state of the checkpoint, once it is known to be of the same run.

    Raises:
        PretrainingError: It is not; the message names what differs.
    """
    state = checkpoints.read_state(checkpoint)
    pairs = [(name, state.settings.get(name), value) for name, value in start.settings.items()]
    pairs = [pair for pair in pairs if pair[0] not in FREE_TO_CHANGE]
    pairs += [
        ("optimizer", state.optimizer, start.optimizer),
        ("a corpus of digest", state.corpus, start.corpus),
        ("a tokenizer of digest", state.tokenizer, start.tokenizer),
    ]
    for name, found, asked in pairs:
        if found != asked:
            raise PretrainingError(
                f"{checkpoint}: was made with {name} {found}, expected {asked} as asked for now; give it the same, or "
                "train in a new folder"
            )
    if state.step > config.steps:
        raise PretrainingError(
            f"{checkpoint}: {state.step:,} steps are made, expected at most steps = {config.steps:,}; raise steps, or "
            "train in a new folder"
        )
    if state.threads != start.threads:
        note(
            f"goes on with {start.threads} threads instead of {state.threads}: weights may differ in their last bits "
            "from those of an undisturbed run"
        )
    note(f"goes on from {checkpoint}")
    return state


def _describe(run: _Run, note: Callable[[str], None]) -> None:
    """Say what is trained on what."""
    data, config = run.data, run.config
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    batches = len(
        epoch_batches(
            data.lengths,
            batch_tokens=config.batch_tokens,
            pool_examples=config.pool_examples,
            seed=config.seed,
            epoch=0,
        )
    )
    skipped = f" ({data.skipped:,} records without a token to predict are left out)" if data.skipped else ""
    note(
        f"{parameters:,} parameters, vocabulary {len(run.tokenizer):,}; {len(data.lengths):,} windows of "
        f"{len(data.token_ids):,} tokens{skipped}; {config.steps:,} steps, {batches:,} an epoch"
    )
