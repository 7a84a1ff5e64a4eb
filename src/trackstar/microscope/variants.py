"""The forms of the score, from the plain dot product of gradients to all of Eq. 2."""

import dataclasses
from typing import Literal

ProjectionName = Literal["none", "two-sided", "one-sided"]
Condition = Literal["clean", "nuisance"]
CONDITIONS: tuple[Condition, ...] = ("clean", "nuisance")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One form of the score of a training image z for a query q.

    Attributes:
        name: Name in tables and figures.
        formula: The vector whose inner products are the scores.
        projection: P.
        second_moment: Whether gradients are divided by √V.
        unit: Whether the vectors have unit length.
        whitened: Whether R is that of the training images, or mixed with that of the queries; None is no R.
        published: Same-class and right-label accuracy in percent of the published toy, by condition.
    """

    name: str
    formula: str
    projection: ProjectionName = "none"
    second_moment: bool = True
    unit: bool = True
    whitened: Literal["train", "mixed"] | None = None
    published: tuple[tuple[Condition, float, float], ...] = ()


VARIANTS = (
    Variant(
        name="dot product", formula="G", second_moment=False, unit=False,
        published=(("clean", 96.8, 100.0), ("nuisance", 69.2, 69.6)),
    ),
    Variant(
        name="cosine", formula="G, unit length", second_moment=False,
        published=(("clean", 100.0, 100.0), ("nuisance", 72.8, 70.8)),
    ),
    Variant(
        name="cosine, V", formula="G/√V, unit length",
        published=(("clean", 95.4, 100.0), ("nuisance", 95.4, 99.7)),
    ),
    Variant(
        name="two-sided P", formula="P₀(G/√V)P₁ᵀ, unit length", projection="two-sided",
        published=(("clean", 71.9, 72.7),),
    ),
    Variant(
        name="one-sided P", formula="P vec(G/√V), unit length", projection="one-sided",
        published=(("clean", 86.9, 89.2),),
    ),
    Variant(
        name="two-sided P, R_train", formula="R_train^(-1/2) P₀(G/√V)P₁ᵀ, unit length", projection="two-sided",
        whitened="train", published=(("clean", 64.1, 65.4),),
    ),
    Variant(
        name="one-sided P, R_train", formula="R_train^(-1/2) P vec(G/√V), unit length", projection="one-sided",
        whitened="train", published=(("clean", 60.6, 61.6),),
    ),
    Variant(
        name="two-sided P, mixed R", formula="R^(-1/2) P₀(G/√V)P₁ᵀ, unit length", projection="two-sided",
        whitened="mixed", published=(("clean", 76.1, 76.0),),
    ),
    Variant(
        name="one-sided P, mixed R", formula="R^(-1/2) P vec(G/√V), unit length", projection="one-sided",
        whitened="mixed", published=(("clean", 66.4, 67.0),),
    ),
)  # fmt: skip
"""In the order in which the equation is built up."""

BY_NAME = {variant.name: variant for variant in VARIANTS}
