"""Setups that a worker opens once before it computes parts: φ's projector, or sums of squared gradients."""

import dataclasses
from collections.abc import Callable

from trackstar.choices import SecondMomentKind
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
    """Projector that computes φ as an index with this manifest stores it, with the manifest's V."""
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
    """Setup for projected gradients φ.

    Attributes:
        manifest: The index's manifest, with the model's digest, layer blocks, projection and output
            function.
        second_moment: The manifest's V.
        batch_tokens: Most tokens per batch, padding included.
    """

    manifest: Manifest
    second_moment: SecondMoment
    batch_tokens: int

    def opened(self, model: LanguageModel, note: Callable[[str], None]) -> GradientProjector:
        """See `Setup`."""
        return projector_of(self.manifest, model, self.second_moment, batch_tokens=self.batch_tokens, note=note)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SquaresSetup:
    """Setup for sums of squared gradients, of which V is estimated.

    Attributes:
        manifest: The index's manifest, before V is known.
        kind: Kind of V.
        batch_tokens: Most tokens per batch, padding included.
    """

    manifest: Manifest
    kind: SecondMomentKind
    batch_tokens: int

    def opened(self, model: LanguageModel, note: Callable[[str], None]) -> SquaredGradients:
        """See `Setup`."""
        return SquaredGradients(model, kind=self.kind, batch_tokens=self.batch_tokens, note=note)
