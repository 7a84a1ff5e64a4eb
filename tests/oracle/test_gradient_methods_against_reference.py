"""The experiments of Table 1, other output functions and TRAK on indexes, compared with the oracle."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

import reference
from comparisons import SIDE, language_model, reference_gradients, reference_phi_of
from tiny_models import TinyModelFolder
from trackstar.baselines.gradients import EXPERIMENTS, TRACKSTAR, GradientMethod, GradientRetriever, IndexedGradients
from trackstar.baselines.trak import TRAKRetriever, mean_target_probabilities
from trackstar.corpus import Query, TokenizedExample, tokenize_query
from trackstar.errors import IndexMismatchError
from trackstar.indexing.build import build_index
from trackstar.model.language_model import LanguageModel
from trackstar.store import Index

SEED, DAMPING = 3, 0.05
CAPITALS = {"France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Peru": "Lima", "Kenya": "Nairobi", "Cuba": "Havana"}
TEXTS = [
    text
    for country, city in CAPITALS.items()
    for text in (f"The capital of {country} is {city}.", f"{city} lies in {country}.", f"In {country} it rains.")
]
QUERIES = [
    *(Query(query_id=f"{c}-1", prompt=f"The capital of {c} is", completion=city) for c, city in CAPITALS.items()),
    *(Query(query_id=f"{c}-2", prompt=f"{city} lies in", completion=c) for c, city in list(CAPITALS.items())[:3]),
]


class Made:
    """The three indexes that all methods use, and the inputs of the oracle."""

    def __init__(self, folder: Path, out: Path) -> None:
        self.model = language_model("llama")
        self.gradients: dict[str, IndexedGradients] = {}
        for name, options in {
            "with V": {},
            "plain": {"second_moment": "none"},
            "margin": {"second_moment": "none", "output": "margin"},
        }.items():
            index = build_index(
                folder, TEXTS, out / name, layer_blocks=2, side=SIDE, seed=SEED, codec="float32", progress=False,
                **options,
            )  # fmt: skip
            self.gradients[name] = IndexedGradients(index, self.model)
        self.candidates = [stored.example for stored in self.index("plain").examples()]
        self.queries = [tokenize_query(query, self.model.tokenizer, window_tokens=64) for query in QUERIES]

    def index(self, name: str) -> Index:
        return self.gradients[name].index

    def phi(
        self, examples: Sequence[TokenizedExample], V: Mapping[str, Tensor] | None, output: reference.Output
    ) -> dict[str, Tensor]:
        return reference_phi_of(self.model, reference_gradients(self.model, examples, output=output), V, seed=SEED)


@pytest.fixture(scope="module")
def made(tiny_model_folders: TinyModelFolder, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tiny_model_folders("llama", "bos"), tmp_path_factory.mktemp("methods"))


def second_moments(model: LanguageModel, examples: Sequence[TokenizedExample]) -> dict[str, Tensor]:
    gradients = reference_gradients(model, examples)
    return {
        m.name: reference.factored_second_moment(reference.mean_squared_gradient([of[m.name] for of in gradients]))
        for m in model.matrices
    }


@pytest.mark.parametrize("method", [*EXPERIMENTS, TRACKSTAR], ids=lambda method: method.name)
def test_scores_of_the_experiments_equal_the_references(made: Made, method: GradientMethod):
    V = second_moments(made.model, made.candidates) if method.second_moment else None
    phi, phi_queries = (made.phi(of, V, reference.loss_output) for of in (made.candidates, made.queries))
    R_train = {name: reference.autocorrelation(block) for name, block in phi.items()}
    R_eval = {name: reference.autocorrelation(block) for name, block in phi_queries.items()}
    whitenings = None
    if method.correction != "none":
        mixing = 0.0
        if method.correction == "task":
            mixing = reference.paper_mixing(list(R_eval.values()), list(R_train.values()))
        whitenings = {
            name: reference.whitening(reference.mix(R_eval[name], R_train[name], mixing, damping=DAMPING))
            for name in phi
        }
    expected = reference.influences(phi_queries, phi, whitenings, unit_norm=method.unit_norm)
    gradients = made.gradients["with V" if method.second_moment else "plain"]
    found = GradientRetriever(method, gradients, damping=DAMPING).scores(QUERIES).double()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_task_of_other_queries_is_used(made: Made):
    gradients = made.gradients["with V"]
    alone = GradientRetriever(TRACKSTAR, gradients, task=QUERIES, damping=DAMPING).scores(QUERIES[:2])
    among = GradientRetriever(TRACKSTAR, gradients, damping=DAMPING).scores(QUERIES)[:2]
    torch.testing.assert_close(alone, among, rtol=0, atol=1e-5)


def expected_probabilities(made: Made) -> Tensor:
    means = []
    for example in made.candidates:
        token_ids = torch.from_numpy(example.token_ids).long()
        logits = made.model.module(input_ids=token_ids[None]).logits[0].double()
        probabilities = torch.softmax(logits, dim=-1)
        chosen = [probabilities[t - 1, token_ids[t]] for t in range(1, len(token_ids)) if example.target_mask[t]]
        means.append(torch.stack(chosen).mean())
    return torch.stack(means)


def test_mean_target_probability_is_the_mean_over_each_candidates_targets(made: Made):
    found = mean_target_probabilities(made.index("margin"), made.model, batch_tokens=32)
    torch.testing.assert_close(found.double(), expected_probabilities(made), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("per", ["examples", "tokens"])
def test_trak_equals_its_published_formula(made: Made, per: str):
    phi, phi_queries = (made.phi(of, None, reference.margin_output) for of in (made.candidates, made.queries))
    retriever = TRAKRetriever(made.gradients["margin"], per=per, damping=DAMPING)  # pyright: ignore[reportArgumentType]
    rows = phi
    if per == "tokens":
        # The drawn tokens, from the package; their gradients, from the oracle.
        from trackstar.baselines.trak import _with_one_target

        rows = made.phi([_with_one_target(example, 0) for example in made.candidates], None, reference.margin_output)
    expected = torch.zeros(len(QUERIES), len(TEXTS), dtype=torch.float64)
    for name in phi:
        R = reference.autocorrelation(rows[name])
        damped = R + DAMPING * R.diagonal().mean() * torch.eye(len(R), dtype=torch.float64)
        expected += phi_queries[name] @ torch.linalg.solve(damped, phi[name].T)
    expected *= 1 - expected_probabilities(made).detach()
    found = retriever.scores(QUERIES).double()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_drawn_token_is_a_target_with_all_tokens_before_it(made: Made):
    from trackstar.baselines.trak import _with_one_target

    places = set()
    for seed in range(8):
        for example in made.candidates:
            single = _with_one_target(example, seed)
            place = len(single.token_ids) - 1
            assert example.target_mask[place]
            assert single.target_mask.tolist() == [False] * place + [True]
            assert single.token_ids.tolist() == example.token_ids[: place + 1].tolist()
            places.add(place)
    assert len(places) > 5


@pytest.mark.parametrize(
    ("name", "method", "message"),
    [
        (
            "plain",
            TRACKSTAR,
            r"expected V for TrackStar, found none; call `build_index` again with `second_moment=\"auto\"`",
        ),
        ("with V", EXPERIMENTS[1], r"expected no V for experiment 2, found one"),
        ("margin", EXPERIMENTS[1], r"expected gradients of the loss for experiment 2, found those of the margin"),
    ],
)
def test_index_made_for_another_method_is_refused(made: Made, name: str, method: GradientMethod, message: str):
    with pytest.raises(IndexMismatchError, match=message):
        GradientRetriever(method, made.gradients[name])
