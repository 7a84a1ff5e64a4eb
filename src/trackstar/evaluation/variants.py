"""TrackStar with smaller projections, and on earlier checkpoints of the training (paper, Figure 2)."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from trackstar.baselines.gradients import TRACKSTAR
from trackstar.errors import OptionError
from trackstar.evaluation.config import EvaluationConfig
from trackstar.evaluation.facts import Fact
from trackstar.evaluation.rankings import Ranking, Rankings
from trackstar.evaluation.workspace import Workspace
from trackstar.model.language_model import LanguageModel, load_model
from trackstar.pretraining.checkpoints import STATE_FILE, read_state
from trackstar.pretraining.config import FREE_TO_CHANGE
from trackstar.workers.protocol import THIS_PROCESS, Workers


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Variants:
    """TrackStar's rankings with one setting changed.

    Attributes:
        by_side: Side of the projections to the ranking, the report's own included; empty if there
            is only one side.
        by_checkpoint: Name of the checkpoint's folder to the ranking, in the order of the settings,
            the report's model last; empty if no checkpoint is given.
    """

    by_side: Mapping[int, Ranking]
    by_checkpoint: Mapping[str, Ranking]

    def others(self, config: EvaluationConfig) -> dict[str, Ranking]:
        """All variants but the report's own, by a name for tables, such as `TrackStar, side 16`."""
        sides = {f"{TRACKSTAR.name}, side {side}": r for side, r in self.by_side.items() if side != config.side[0]}
        main = checkpoint_name(config.model)
        checkpoints = {f"{TRACKSTAR.name}, {name}": r for name, r in self.by_checkpoint.items() if name != main}
        return sides | checkpoints


def checkpoint_name(path: str) -> str:
    """Name of a checkpoint's folder, without its parents."""
    return Path(path).name


def variants(
    config: EvaluationConfig,
    facts: Sequence[Fact],
    rankings: Rankings,
    model: LanguageModel,
    workspace: Workspace,
    *,
    workers: Workers = THIS_PROCESS,
    progress: bool = True,
) -> Variants:
    """Rank by TrackStar with every side and every checkpoint; smaller sides cost no gradients.

    Args:
        config: Settings of the report.
        facts: The facts to trace, with the first of the templates.
        rankings: Rankings of the report.
        model: The report's model.
        workspace: The report's folder; a checkpoint's index and rankings are saved under
            `checkpoints/` in it.
        workers: The workers that build indexes and compute gradients.
        progress: Whether progress is shown.

    Raises:
        OptionError: Two checkpoints have the same name, or one is not from the model's training.
        TrackstarError: A checkpoint cannot be loaded; see `trackstar.errors`.
    """
    template = config.templates[0]
    by_side = {}
    if len(config.side) > 1:
        by_side = {s: rankings.ranking(TRACKSTAR.name, facts, template=template, side=s) for s in config.side}
    names = [checkpoint_name(path) for path in (*config.checkpoints, config.model)]
    if len(set(names)) < len(names):
        raise OptionError(
            f"`checkpoints`: expected folder names that differ from each other and from the model's, found "
            f"{', '.join(names)}"
        )
    by_checkpoint = {}
    for path, name in zip(config.checkpoints, names, strict=False):
        earlier_model = load_model(path, device=config.device, device_map=config.device_map)
        _check_same_run(path, earlier_model, config.model, model)
        earlier = Rankings(
            dataclasses.replace(config, model=path),
            earlier_model,
            Workspace(workspace.folder / "checkpoints" / name),
            workers=workers,
            progress=progress,
        )
        if earlier.pool.texts != rankings.pool.texts:
            raise OptionError(
                f"`checkpoints`: expected the candidates of {config.model} for {path}, found {len(earlier.pool):,} "
                "others; use checkpoints with the same context length"
            )
        by_checkpoint[name] = earlier.ranking(TRACKSTAR.name, facts, template=template)
    if by_checkpoint:
        by_checkpoint[names[-1]] = rankings.ranking(TRACKSTAR.name, facts, template=template)
    return Variants(by_side=by_side, by_checkpoint=by_checkpoint)


def _check_same_run(path: str, checkpoint: LanguageModel, model_path: str, model: LanguageModel) -> None:
    """Raise if a checkpoint cannot be an earlier one of the model's training.

    Tokenizer and weight matrices must be the same, and the run too if both are checkpoints of
    `pretrain`.

    Raises:
        OptionError: One of these is different; the message names it.
    """
    difference = None
    if checkpoint.tokenizer_digest() != model.tokenizer_digest():
        difference = "another tokenizer"
    elif checkpoint.matrices != model.matrices:
        difference = "other weight matrices"
    elif all((Path(folder) / STATE_FILE).exists() for folder in (path, model_path)):
        found, expected = read_state(Path(path)), read_state(Path(model_path))
        settings = [{n: v for n, v in one.settings.items() if n not in FREE_TO_CHANGE} for one in (found, expected)]
        if found.corpus != expected.corpus or settings[0] != settings[1]:
            difference = "the corpus or the settings of another run"
        elif found.step >= expected.step:
            difference = f"{found.step:,} steps, the model {expected.step:,}"
    if difference is not None:
        raise OptionError(
            f"`checkpoints`: {path} has {difference}; expected an earlier checkpoint of the run of {model_path}"
        )
