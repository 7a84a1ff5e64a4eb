"""What the oracle makes of the capitals' corpus and questions: tokens by hand, V by brute force, influences."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

import reference
from capitals import TEXTS
from comparisons import SIDE, reference_gradients, reference_losses, reference_phi
from tiny_models import tiny_tokenizer
from trackstar.attribution.results import QueryReport
from trackstar.corpus import Query, TokenizedExample
from trackstar.model.language_model import LanguageModel

SEED, DAMPING = 5, 0.1


def tokenized(text: str, *, completion_from: int | None = None) -> TokenizedExample:
    """The text's tokens after <s>; targets are all, or those with a character at or after `completion_from`."""
    encoding = tiny_tokenizer("bos")(text, return_offsets_mapping=True)
    targets = [
        place > 0 and (completion_from is None or end > completion_from)
        for place, (_, end) in enumerate(encoding["offset_mapping"])
    ]
    return TokenizedExample(
        example_id="",
        parent_id="",
        record=0,
        window=0,
        text=text,
        token_ids=np.array(encoding["input_ids"], dtype=np.int32),
        target_mask=np.array(targets),
    )


def tokenized_corpus() -> list[TokenizedExample]:
    return [tokenized(text) for text in TEXTS]


def tokenized_queries(queries: Sequence[Query]) -> list[TokenizedExample]:
    return [tokenized(f"{q.prompt} {q.completion}", completion_from=len(q.prompt)) for q in queries]


def second_moments(model: LanguageModel, examples: Sequence[TokenizedExample], kind: str) -> dict[str, Tensor] | None:
    if kind == "none":
        return None
    gradients = reference_gradients(model, examples)
    means = {m.name: reference.mean_squared_gradient([of[m.name] for of in gradients]) for m in model.matrices}
    if kind == "elementwise":
        return means
    return {name: reference.factored_second_moment(V) for name, V in means.items()}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What the oracle makes of the same texts."""

    influences: Tensor
    losses: Tensor
    mixing: float


def expected(
    model: LanguageModel,
    queries: Sequence[Query],
    *,
    kind: str = "factored",
    mixing: float | None = None,
    side: int = SIDE,
) -> Expected:
    corpus, asked = tokenized_corpus(), tokenized_queries(queries)
    V = second_moments(model, corpus, kind)
    phi, phi_queries = (reference_phi(model, examples, V, seed=SEED, side=side) for examples in (corpus, asked))
    R_train = {name: reference.autocorrelation(block) for name, block in phi.items()}
    R_eval = {name: reference.autocorrelation(block) for name, block in phi_queries.items()}
    if mixing is None:
        mixing = reference.paper_mixing(list(R_eval.values()), list(R_train.values()))
    whitenings = {
        name: reference.whitening(reference.mix(R_eval[name], R_train[name], mixing, damping=DAMPING)) for name in phi
    }
    return Expected(
        influences=reference.influences(phi_queries, phi, whitenings),
        losses=reference_losses(model, asked),
        mixing=mixing,
    )


def influences_of(report: QueryReport) -> Tensor:
    """Every candidate's influence, [queries, candidates]."""
    influences = torch.full((len(report.results), len(TEXTS)), torch.nan, dtype=torch.float64)
    for number, result in enumerate(report.results):
        for ranked in result.proponents:
            assert ranked.text == TEXTS[ranked.row]
            influences[number, ranked.row] = ranked.influence
    return influences


def assert_report_equals(report: QueryReport, wanted: Expected, *, tolerance: float = 1e-3) -> None:
    influences = influences_of(report)
    torch.testing.assert_close(influences, wanted.influences, rtol=0, atol=tolerance)
    assert report.mixing.value == pytest.approx(wanted.mixing, rel=1e-3)
    for number, result in enumerate(report.results):
        assert result.loss == pytest.approx(float(wanted.losses[number]), rel=1e-5)
        rows = [ranked.row for ranked in result.proponents]
        assert rows == reference.top_proponents(influences[number].tolist(), len(TEXTS))
        assert [r.row for r in result.opponents] == reference.top_opponents(influences[number].tolist(), len(TEXTS))
