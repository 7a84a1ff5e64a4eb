"""The training run: from a corpus to checkpoints of a language model trained on it."""

import dataclasses
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import psutil
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trackstar.corpus import Corpus, open_corpus
from trackstar.corpus.digests import digest_of_bytes
from trackstar.errors import PretrainingError
from trackstar.model.batching import Batch
from trackstar.model.devices import resolved_device
from trackstar.pretraining import checkpoints
from trackstar.pretraining.checkpoints import TrainingState
from trackstar.pretraining.config import FREE_TO_CHANGE, PretrainingConfig
from trackstar.pretraining.data_order import TokenizedCorpus, batches_from, epoch_batches, tokenize_corpus
from trackstar.pretraining.optimizers import apply_gradients, learning_rate, make_optimizer, optimizer_hyperparameters
from trackstar.pretraining.tokenizer import load_tokenizer, train_tokenizer
from trackstar.progress import Progress
from trackstar.store.files.outputs import inputs, refuse_input_folder, refuse_inputs

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

NOTES_PER_RUN = 10


def pretrain(
    corpus: object,
    out: str | os.PathLike[str],
    config: PretrainingConfig,
    *,
    tokenizer: "PreTrainedTokenizerBase | str | Path | None" = None,
    device: str = "auto",
    progress: bool = True,
) -> Path:
    """Train a decoder-only language model from scratch, or resume an interrupted run.

    The loss of a step is the mean of its batch's token cross-entropies. If a run is killed at any
    moment, the same call resumes it from the newest checkpoint, and ends with the weights of an
    uninterrupted run, bit for bit (on the CPU of one machine, with the same number of threads). A
    finished run is resumed if `config.steps` is raised.

    Args:
        corpus: A `Corpus`, or any argument of `open_corpus`. Its tokens are held in memory, five bytes each.
        out: The run's folder. A checkpoint is written before the first step, every
            `config.checkpoint_steps` steps and after the last.
        config: The settings.
        tokenizer: A fast tokenizer, or its folder or hub name; None trains one on the corpus.
        device: A torch device, such as `cpu` or `cuda`.
        progress: Whether to show a progress bar.

    Returns:
        The folder of the last checkpoint: a model folder for `build_index`, with the optimizer's state.

    Raises:
        PretrainingError: `out` holds something else, a run with other settings, corpus or tokenizer
            (the message names the difference), or a damaged checkpoint; another process is writing
            it; or a loss is not finite.
        CorpusError: A record cannot be read.
        OptionError: The device is unknown.
    """
    target = resolved_device(device)
    opened = corpus if isinstance(corpus, Corpus) else open_corpus(corpus)
    folder = Path(out)
    refuse_input_folder(folder, inputs(data=opened.name))
    refuse_inputs([folder], inputs(tokenizer=tokenizer))
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
    """What the training loop uses besides the state that it starts from."""

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
    tokenizer = _tokenizer(corpus, config, tokenizer, newest)
    _check_memory(config, len(tokenizer))
    model = new_model(config, tokenizer)
    nn.Module.to(model, device)
    optimizer = make_optimizer(model, config)
    start = TrainingState(
        format_version=checkpoints.FORMAT_VERSION,
        settings=dataclasses.asdict(config),
        corpus=corpus.digest(),
        tokenizer=_tokenizer_digest(tokenizer),
        optimizer=optimizer_hyperparameters(optimizer),
        learning_rate=0.0,
        step=0,
        epoch=0,
        batch=0,
        threads=torch.get_num_threads(),
    )
    with Progress("Pretraining", unit="steps", total=config.steps, shown=progress) as bar:
        state = start
        if newest is not None:
            state = _resumed(newest, start, config, bar.note)
            if state.step == config.steps:
                bar.note(f"{newest}: all {config.steps:,} steps are already made")
                return newest
            checkpoints.restore(newest, model, optimizer)
        data = tokenize_corpus(corpus, tokenizer, window_tokens=config.context_tokens)
        run = _Run(
            config=config, out=out, model=model, tokenizer=tokenizer, optimizer=optimizer, data=data, device=device
        )
        _describe(run, bar.note)
        bar.advance(state.step)
        if newest is None:
            _save(run, start)
        return _train(run, dataclasses.replace(start, step=state.step, epoch=state.epoch, batch=state.batch), bar)


def _check_memory(config: PretrainingConfig, vocabulary: int) -> None:
    """Raise if weights and gradients in float32 need more memory than the machine has.

    Raises:
        PretrainingError: They do not fit.
    """
    shared = (config.key_value_heads or config.heads) / config.heads
    attention = (2 + 2 * shared) * config.width**2
    weights = config.layers * (attention + 3 * config.width * config.mlp_width)
    weights += vocabulary * config.width * (1 if config.tied_embeddings else 2)
    needed, total = 8 * weights, psutil.virtual_memory().total
    if needed > total:
        raise PretrainingError(
            f"the model has {weights:,.0f} parameters, which need {needed / 1e9:,.0f} GB with gradients, and this "
            f"machine has {total / 1e9:,.0f} GB; choose a smaller `width`, `layers`, `mlp_width` or `vocabulary`"
        )


def _train(run: _Run, state: TrainingState, bar: Progress) -> Path:
    """Make the steps from `state` to the last, and return the last checkpoint."""
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
    losses = _LossLog(config, bar.note)
    last = checkpoints.checkpoint_path(run.out, state.step)
    for step in range(state.step + 1, config.steps + 1):
        epoch, number, indices = next(order)
        batch = run.data.batch(indices, device=run.device)
        loss, targets = summed_loss(run.model, batch)
        (loss / targets).backward()
        losses.add(step, loss.item(), targets)
        apply_gradients(run.model, run.optimizer, step, config)
        run.optimizer.zero_grad(set_to_none=True)
        bar.advance(1)
        if step % config.checkpoint_steps == 0 or step == config.steps:
            rate = learning_rate(step, config)
            state = dataclasses.replace(state, step=step, epoch=epoch, batch=number + 1, learning_rate=rate)
            last = _save(run, state)
    return last


def summed_loss(model: "LlamaForCausalLM", batch: Batch) -> tuple[Tensor, int]:
    """The sum of a batch's token cross-entropies, in nats, and the number of its target tokens.

    Only positions that predict a target reach the output head, so padding costs no logits.
    """
    hidden = model.model(input_ids=batch.token_ids, use_cache=False).last_hidden_state
    predicted = batch.target_mask[:, 1:]
    logits = model.lm_head(hidden[:, :-1][predicted])
    labels = batch.token_ids[:, 1:][predicted]
    return nn.functional.cross_entropy(logits, labels, reduction="sum"), len(labels)


def new_model(config: PretrainingConfig, tokenizer: Any) -> "LlamaForCausalLM":
    """A model with initial weights drawn from the seed, independent of the global random generator."""
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


class _LossLog:
    """Checks each loss, and reports the mean about ten times per run."""

    def __init__(self, config: PretrainingConfig, note: Callable[[str], None]) -> None:
        self._config = config
        self._note = note
        self._every = max(1, config.steps // NOTES_PER_RUN)
        self._loss, self._targets, self._since = 0.0, 0, time.perf_counter()

    def add(self, step: int, loss: float, targets: int) -> None:
        """Add a step's summed loss.

        Raises:
            PretrainingError: The loss is not finite.
        """
        config = self._config
        if not math.isfinite(loss):
            raise PretrainingError(
                f"step {step:,}: the loss is {loss}, expected a finite number; train in a new folder with a "
                f"`base_learning_rate` below {config.base_learning_rate}"
            )
        self._loss += loss
        self._targets += targets
        if step % self._every == 0 or step == config.steps:
            rate = self._targets / (time.perf_counter() - self._since)
            self._note(
                f"step {step:,} of {config.steps:,}: loss {self._loss / self._targets:.3f} nats per token, "
                f"{rate:,.0f} tokens/s"
            )
            self._loss, self._targets, self._since = 0.0, 0, time.perf_counter()


def _save(run: _Run, state: TrainingState) -> Path:
    """Write the checkpoint after `state.step` steps, if its weights are finite."""
    wrong = next((name for name, weight in run.model.named_parameters() if not torch.isfinite(weight).all()), None)
    if wrong is not None:
        raise PretrainingError(
            f"step {state.step:,}: {wrong} holds NaN or infinite weights, expected finite ones; train in a new folder "
            f"with a `base_learning_rate` below {run.config.base_learning_rate}"
        )
    return checkpoints.write_checkpoint(run.out, state, run.model, run.tokenizer, run.optimizer)


def _tokenizer(
    corpus: Corpus,
    config: PretrainingConfig,
    existing: "PreTrainedTokenizerBase | str | Path | None",
    newest: Path | None,
) -> "PreTrainedTokenizerBase":
    """The existing tokenizer if there is one, else that of the resumed run, else a new one."""
    source = newest if existing is None else existing
    if source is not None:
        return load_tokenizer(source)
    return train_tokenizer((example.text for example in corpus.examples()), vocabulary=config.vocabulary)


def _tokenizer_digest(tokenizer: Any) -> str:
    return digest_of_bytes(tokenizer.backend_tokenizer.to_str().encode())


def _resumed(
    checkpoint: Path, start: TrainingState, config: PretrainingConfig, note: Callable[[str], None]
) -> TrainingState:
    """Read the state of a checkpoint, and check that it belongs to the same run.

    Raises:
        PretrainingError: It belongs to another run; the message names the difference.
    """
    state = checkpoints.read_state(checkpoint)
    settings = {name: value for name, value in start.settings.items() if name not in FREE_TO_CHANGE}
    pairs = [(f"`{name}`", state.settings.get(name), value) for name, value in settings.items()]
    pairs += [
        ("an optimizer of settings", state.optimizer, start.optimizer),
        ("a corpus of digest", state.corpus, start.corpus),
        ("a tokenizer of digest", state.tokenizer, start.tokenizer),
    ]
    for name, of_checkpoint, requested in pairs:
        if of_checkpoint != requested:
            raise PretrainingError(
                f"{checkpoint}: was made with {name} {of_checkpoint}, expected {requested}, as requested now; request "
                "the same, or train in a new folder"
            )
    if state.step > config.steps:
        raise PretrainingError(
            f"{checkpoint}: {state.step:,} steps are made, expected at most {config.steps:,}; raise `steps`, or train "
            "in a new folder"
        )
    if state.threads != start.threads:
        note(
            f"resuming with {start.threads} threads instead of {state.threads}: weights may differ in their last bits "
            "from those of an uninterrupted run"
        )
    note(f"resuming from {checkpoint}")
    return state


def _describe(run: _Run, note: Callable[[str], None]) -> None:
    """Note the sizes of the model, the corpus and the run."""
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
    skipped = f" ({data.skipped:,} records without a token to predict are skipped)" if data.skipped else ""
    note(
        f"{parameters:,} parameters, vocabulary {len(run.tokenizer):,}; {len(data.lengths):,} windows of "
        f"{len(data.token_ids):,} tokens{skipped}; {config.steps:,} steps, {batches:,} per epoch"
    )
