"""What a worker opens once before it computes: the projector of gradients, or the sums of squares."""

import dataclasses
from collections.abc import Callable
from typing import Literal

from trackstar.gradients.estimated_moment import SquaredGradients
from trackstar.gradients.projector import GradientProjector
from trackstar.gradients.second_moment import SecondMoment
from trackstar.model.language_model import LanguageModel
from trackstar.store import Manifest


def projector_of(
    manifest: Manifest,
    model: LanguageModel,
    second_moment: SecondMoment,
    *,
    batch_tokens: int,
    note: Callable[[str], None] = lambda note: None,
) -> GradientProjector:
    """Gives φ as an index with this manifest keeps it; V is the manifest's."""
    return GradientProjector(
        model,
        second_moment,
        seed=manifest.projection.seed,
        side=manifest.projection.side,
        batch_tokens=batch_tokens,
        note=note,
        output=manifest.output,
        kind=manifest.projection.kind,
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GradientSetup:
    """How φ is made.

    Attributes:
        manifest: Of the index: the model's digest, layer blocks, projection and output function.
        second_moment: V, the manifest's.
        batch_tokens: Most tokens of a batch, padding included.
    """

    manifest: Manifest
    second_moment: SecondMoment
    batch_tokens: int

    def opened(self, model: LanguageModel, note: Callable[[str], None]) -> GradientProjector:
        """See `Setup`."""
        return projector_of(self.manifest, model, self.second_moment, batch_tokens=self.batch_tokens, note=note)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SquaresSetup:
    """How squared gradients are summed, for an estimate of V.

    Attributes:
        manifest: Of the index, whose V is not known yet.
        kind: Whether only the row and column means are kept.
        batch_tokens: Most tokens of a batch, padding included.
    """

    manifest: Manifest
    kind: Literal["factored", "elementwise"]
    batch_tokens: int

    def opened(self, model: LanguageModel, note: Callable[[str], None]) -> SquaredGradients:
        """See `Setup`."""
        return SquaredGradients(model, kind=self.kind, token_budget=self.batch_tokens, note=note)
