"""TrackStar with smaller projections, and from earlier checkpoints of the model's training (paper, Figure 2)."""

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
    """Rankings of TrackStar's that differ in one setting from the report's.

    Attributes:
        by_side: By the side of the projections, the report's own among them; empty where only one is asked for.
        by_checkpoint: By the name of the checkpoint's folder, in the order of the settings, the report's model last;
            empty where none is asked for.
    """

    by_side: Mapping[int, Ranking]
    by_checkpoint: Mapping[str, Ranking]

    def others(self, config: EvaluationConfig) -> dict[str, Ranking]:
        """All but the report's own, by a name for people, such as `TrackStar, side 16`."""
        sides = {f"{TRACKSTAR.name}, side {side}": r for side, r in self.by_side.items() if side != config.side[0]}
        own = checkpoint_name(config.model)
        checkpoints = {f"{TRACKSTAR.name}, {name}": r for name, r in self.by_checkpoint.items() if name != own}
        return sides | checkpoints


def checkpoint_name(path: str) -> str:
    """A checkpoint's folder without the folders above it."""
    return Path(path).name


def variants(
    config: EvaluationConfig,
    facts: Sequence[Fact],
    rankings: Rankings,
    own: LanguageModel,
    workspace: Workspace,
    *,
    workers: Workers = THIS_PROCESS,
    progress: bool = True,
) -> Variants:
    """Rank with every side and every checkpoint of the settings; smaller sides cost no gradients.

    Args:
        config: The report's settings.
        facts: What is asked, with the first of the templates.
        rankings: The report's own.
        own: The report's model.
        workspace: A checkpoint's index and rankings are kept under `checkpoints/` in it.
        workers: Who makes indexes and computes gradients.
        progress: Whether bars may be shown.

    Raises:
        OptionError: Two checkpoints have one name, or one is not of the model's own training.
        TrackstarError: A checkpoint cannot be loaded; see `trackstar.errors`.
    """
    template = config.templates[0]
    by_side = {}
    if len(config.side) > 1:
        by_side = {s: rankings.ranking(TRACKSTAR.name, facts, template=template, side=s) for s in config.side}
    names = [checkpoint_name(path) for path in (*config.checkpoints, config.model)]
    if len(set(names)) < len(names):
        raise OptionError(f"checkpoints and model are named {', '.join(names)}; expected a different name for each")
    by_checkpoint = {}
    for path, name in zip(config.checkpoints, names, strict=False):
        model = load_model(path, device=config.device)
        _check_same_run(path, model, config.model, own)
        earlier = Rankings(
            dataclasses.replace(config, model=path),
            model,
            Workspace(workspace.folder / "checkpoints" / name),
            workers=workers,
            progress=progress,
        )
        if earlier.pool.texts != rankings.pool.texts:
            raise OptionError(f"{path}: reads {len(earlier.pool):,} other candidates than {config.model}; expected the "
                              "same windows of the same corpus")  # fmt: skip
        by_checkpoint[name] = earlier.ranking(TRACKSTAR.name, facts, template=template)
    if by_checkpoint:
        by_checkpoint[names[-1]] = rankings.ranking(TRACKSTAR.name, facts, template=template)
    return Variants(by_side=by_side, by_checkpoint=by_checkpoint)


def _check_same_run(path: str, model: LanguageModel, own_path: str, own: LanguageModel) -> None:
    """That a checkpoint may be an earlier one of the model's: same tokenizer and matrices, and same run where known."""
    wrong = None
    if model.tokenizer_digest() != own.tokenizer_digest():
        wrong = "another tokenizer"
    elif model.matrices != own.matrices:
        wrong = "other weight matrices"
    elif all((Path(one) / STATE_FILE).exists() for one in (path, own_path)):
        found, expected = read_state(Path(path)), read_state(Path(own_path))
        settings = [{n: v for n, v in one.settings.items() if n not in FREE_TO_CHANGE} for one in (found, expected)]
        if found.corpus != expected.corpus or settings[0] != settings[1]:
            wrong = "another run's corpus or settings"
        elif found.step >= expected.step:
            wrong = f"{found.step:,} steps, the model {expected.step:,}"
    if wrong is not None:
        raise OptionError(f"checkpoints: {path} has {wrong}; expected an earlier checkpoint of {own_path}'s run")
