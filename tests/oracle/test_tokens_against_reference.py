"""Influences split over tokens: parts equal the oracle's, and their sum equals the influence."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import reference
from comparisons import SIDE, assert_rows_close, language_model, random_examples, reference_phi, with_targets
from tiny_models import TinyModelFolder, tiny_model, tiny_tokenizer
from trackstar.attribution.answering import query_gradients
from trackstar.choices import Output, ProjectionKind
from trackstar.corpus import Query, TokenizedExample
from trackstar.curvature.autocorrelation import autocorrelation
from trackstar.curvature.task import train_autocorrelation
from trackstar.curvature.whitening import whitening as whitening_of
from trackstar.errors import GradientError, OptionError
from trackstar.gradients.projection import projections, random_projection
from trackstar.gradients.projector import GradientProjector
from trackstar.gradients.second_moment import NO_SECOND_MOMENT, ElementwiseMoment, FactoredMoment, SecondMoment
from trackstar.gradients.token_split import ProjectionSettings, split_over_tokens
from trackstar.indexing.build import build_index
from trackstar.model.language_model import LanguageModel, wrap_model
from trackstar.model.layer_blocks import WeightMatrix
from trackstar.retrieval.scoring import all_scores, trackstar_scorer

SEED = 3
ARCHITECTURES = ("llama", "gpt2", "gpt_neox")  # grouped queries, transposed matrices, queries-keys-values in one
OUTPUTS: dict[Output, reference.Output] = {"loss": reference.loss_output, "margin": reference.margin_output}


# ---- The oracle: each position's outer product g_t a_tᵀ in float64, projected ---------------------


@functools.cache
def double_model(architecture: str) -> nn.Module:
    return reference.double_copy(language_model(architecture).module)


def position_factors(
    double: nn.Module, names: Sequence[str], example: TokenizedExample, output: Output
) -> dict[str, tuple[Tensor, Tensor]]:
    """g and a of each matrix, [tokens, rows] and [tokens, columns], by zeros added to the outputs."""
    inputs: dict[str, Tensor] = {}
    zeros: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def forward(_module: nn.Module, arguments: tuple[Tensor, ...], outputs: Tensor) -> Tensor:
            inputs[name] = arguments[0][0].detach()
            zeros[name] = torch.zeros_like(outputs, requires_grad=True)
            return outputs + zeros[name]

        return forward

    handles = [double.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        ids, mask = torch.from_numpy(example.token_ids), torch.from_numpy(example.target_mask)
        value = reference.output_value(double, ids, mask, output=OUTPUTS[output])
        gradients = torch.autograd.grad(value, [zeros[name] for name in names])
    finally:
        for handle in handles:
            handle.remove()
    return {name: (g[0], inputs[name]) for name, g in zip(names, gradients, strict=True)}


def reference_parts(
    architecture: str,
    examples: Sequence[TokenizedExample],
    vectors: Tensor,
    second_moments: Mapping[str, Tensor] | None = None,
    *,
    output: Output = "loss",
    kind: ProjectionKind = "two-sided",
) -> list[Tensor]:
    """q·P(g_t a_tᵀ/√V) of every position t, summed over the matrices."""
    model = language_model(architecture)
    dense = {matrix.name: dense_projection(matrix, kind) for matrix in model.matrices}
    parts = []
    for example, vector in zip(examples, vectors.double(), strict=True):
        q = dict(enumerate(vector.chunk(len(model.blocks))))
        total = torch.zeros(len(example.token_ids), dtype=torch.float64)
        factors = position_factors(double_model(architecture), list(dense), example, output)
        for matrix in model.matrices:
            V = second_moments[matrix.name] if second_moments else None
            for t, (g, a) in enumerate(zip(*factors[matrix.name], strict=True)):
                G = reference.corrected_gradient(torch.outer(g, a), V)
                total[t] += q[matrix.block] @ (dense[matrix.name] @ G.reshape(-1))
        parts.append(total)
    return parts


def dense_projection(matrix: WeightMatrix, kind: ProjectionKind) -> Tensor:
    """P of flattened gradients, [side², rows·columns]."""
    if kind == "one-sided":
        return random_projection(SEED, f"{matrix.name} flattened", matrix.rows * matrix.columns, SIDE**2).T.double()
    left, right = projections(matrix, seed=SEED, side=SIDE)
    return torch.kron(left.double().contiguous(), right.double().contiguous())


def drawn_second_moment(model: LanguageModel, kind: str) -> tuple[SecondMoment, dict[str, Tensor] | None]:
    """V drawn over a few orders of magnitude, and the same in full."""
    draw = torch.Generator().manual_seed(7)

    def drawn(*shape: int) -> Tensor:
        return torch.exp(torch.randn(*shape, generator=draw))

    if kind == "none":
        return NO_SECOND_MOMENT, None
    moments: dict[str, Any] = {}
    full: dict[str, Tensor] = {}
    for m in model.matrices:
        if kind == "factored":
            moments[m.name] = moment = FactoredMoment(row=drawn(m.rows), column=drawn(m.columns))
            full[m.name] = reference.adafactor_second_moment(moment.row, moment.column)
        else:
            moments[m.name] = moment = ElementwiseMoment(entries=drawn(m.rows, m.columns))
            full[m.name] = moment.entries.double()
    return SecondMoment(kind=kind, moments=moments, source="drawn"), full  # pyright: ignore[reportArgumentType]


def mixed_examples() -> list[TokenizedExample]:
    """Different lengths and targets: every token, a completion's, and scattered ones."""
    every, completion, scattered = random_examples([11, 17, 6])
    return [
        every,
        with_targets(completion, [t >= 13 for t in range(17)]),
        with_targets(scattered, [t in (1, 4) for t in range(6)]),
    ]


def random_vectors(model: LanguageModel, examples: int, *, seed: int = 0) -> Tensor:
    return torch.randn(examples, len(model.blocks) * SIDE**2, generator=torch.Generator().manual_seed(seed))


def split(
    model: LanguageModel,
    examples: Sequence[TokenizedExample],
    vectors: Tensor,
    second_moment: SecondMoment = NO_SECOND_MOMENT,
    *,
    side: int = SIDE,
    output: Output = "loss",
    kind: ProjectionKind = "two-sided",
    **options: Any,
) -> list[Tensor]:
    settings = ProjectionSettings(seed=SEED, side=side, output=output, kind=kind)
    return split_over_tokens(model, second_moment, examples, vectors, settings, **options)


def projected(
    model: LanguageModel,
    examples: Sequence[TokenizedExample],
    second_moment: SecondMoment = NO_SECOND_MOMENT,
    **options: Any,
) -> Tensor:
    """φ as an index stores it, [examples, dimensions]."""
    options = {"batch_tokens": 64, "note": lambda _message: None, **options}
    phi = torch.empty(len(examples), len(model.blocks) * SIDE**2)
    with GradientProjector(model, second_moment, seed=SEED, side=SIDE, **options) as projector:
        for indices, values, _ in projector.batches(examples):
            phi[indices] = values
    return phi


def assert_parts_close(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = 1e-4) -> None:
    assert len(found) == len(expected)
    for number, (parts, wanted) in enumerate(zip(found, expected, strict=True)):
        assert parts.dtype == torch.float32
        assert_rows_close(parts[None], wanted[None], tolerance=tolerance, label=f"example {number}")


def assert_sums_equal(parts: Sequence[Tensor], products: Tensor, tolerance: float = 2e-5) -> None:
    """Sums differ from the products by less than `tolerance` of the parts' norm."""
    for part, product in zip(parts, products.tolist(), strict=True):
        assert abs(float(part.double().sum()) - product) < tolerance * float(part.double().norm())


# ---- Parts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["two-sided", "one-sided"])
@pytest.mark.parametrize("moment", ["none", "factored", "elementwise"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_parts_equal_the_references_by_position_and_sum_to_the_projectors_product(
    architecture: str, moment: str, kind: ProjectionKind
):
    model, examples = language_model(architecture), mixed_examples()
    second_moment, full = drawn_second_moment(model, moment)
    vectors = random_vectors(model, len(examples))
    parts = split(model, examples, vectors, second_moment, kind=kind)
    assert_parts_close(parts, reference_parts(architecture, examples, vectors, full, kind=kind))
    phi = projected(model, examples, second_moment, kind=kind)
    assert_sums_equal(parts, (vectors.double() * phi.double()).sum(dim=1))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_parts_of_the_margin_equal_the_references(architecture: str):
    model, examples = language_model(architecture), mixed_examples()
    second_moment, full = drawn_second_moment(model, "factored")
    vectors = random_vectors(model, len(examples))
    parts = split(model, examples, vectors, second_moment, output="margin")
    assert_parts_close(parts, reference_parts(architecture, examples, vectors, full, output="margin"))
    phi = projected(model, examples, second_moment, output="margin")
    assert_sums_equal(parts, (vectors.double() * phi.double()).sum(dim=1))


def test_the_oracles_parts_sum_to_the_oracles_projected_gradients():
    model, examples = language_model("gpt2"), mixed_examples()
    vectors = random_vectors(model, len(examples))
    phi = torch.cat(list(reference_phi(model, examples, seed=SEED).values()), dim=1)
    sums = torch.stack([parts.sum() for parts in reference_parts("gpt2", examples, vectors)])
    torch.testing.assert_close(sums, (vectors.double() * phi).sum(dim=1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("moment", ["factored", "elementwise"])
@hypothesis.given(lengths=st.lists(st.integers(2, 20), min_size=1, max_size=5), batch_tokens=st.integers(1, 100))
@hypothesis.settings(max_examples=10)
def test_parts_do_not_depend_on_batches_or_padding(moment: str, lengths: list[int], batch_tokens: int):
    model, examples = language_model("llama"), random_examples(lengths)
    second_moment, _ = drawn_second_moment(model, moment)
    vectors = random_vectors(model, len(examples))
    done: list[int] = []
    parts = split(model, examples, vectors, second_moment, batch_tokens=batch_tokens, advance=done.append)
    assert sum(done) == len(examples)
    assert [len(part) for part in parts] == lengths
    alone = [split(model, [e], v[None], second_moment)[0] for e, v in zip(examples, vectors, strict=True)]
    assert_parts_close(parts, alone, tolerance=2e-5)


def test_the_last_position_has_no_part_because_it_predicts_nothing():
    model, examples = language_model("llama"), mixed_examples()
    parts = split(model, examples, random_vectors(model, len(examples)))
    assert [float(part[-1]) for part in parts] == [0.0, 0.0, 0.0]
    assert [float(part[4]) for part in parts][2] == 0.0  # the last target is at 4, predicted from 3
    assert float(parts[2][3]) != 0.0


@hypothesis.given(factor=st.floats(-4, 4), other=st.floats(-4, 4), seed=st.integers(0, 100))
@hypothesis.settings(max_examples=10)
def test_parts_are_linear_in_the_vector(factor: float, other: float, seed: int):
    model, examples = language_model("gpt2"), mixed_examples()[:2]
    first, second = (random_vectors(model, 2, seed=seed + number) for number in (0, 1000))
    combined = split(model, examples, factor * first + other * second)
    for parts, one, two in zip(combined, split(model, examples, first), split(model, examples, second), strict=True):
        scale = float((factor * one).abs().max() + (other * two).abs().max())
        torch.testing.assert_close(parts, factor * one + other * two, rtol=0, atol=1e-5 * scale + 1e-30)


def test_a_zero_vector_has_zero_parts_and_no_examples_have_none():
    model, examples = language_model("llama"), mixed_examples()
    parts = split(model, examples, torch.zeros(len(examples), len(model.blocks) * SIDE**2))
    assert all(torch.equal(part, torch.zeros(len(e.token_ids))) for part, e in zip(parts, examples, strict=True))
    assert split(model, [], torch.zeros(0, len(model.blocks) * SIDE**2)) == []


def test_parts_do_not_change_when_memory_runs_out_and_batches_shrink(monkeypatch: pytest.MonkeyPatch):
    from trackstar.gradients import per_example

    model, examples = language_model("llama"), random_examples([9, 9, 9, 9, 9])
    vectors = random_vectors(model, len(examples))
    whole, make_batch, notes = split(model, examples, vectors), per_example.make_batch, []

    def small_memory(examples: Any, indices: Sequence[int], **options: Any) -> Any:
        if len(indices) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return make_batch(examples, indices, **options)

    monkeypatch.setattr(per_example, "make_batch", small_memory)
    assert_parts_close(split(model, examples, vectors, note=notes.append), whole, tolerance=1e-5)
    assert len(notes) == 2


def test_an_example_whose_gradient_is_not_finite_is_named():
    module = tiny_model("llama")
    model, examples = wrap_model(module, tiny_tokenizer(), layer_blocks=2), random_examples([9, 12, 5])
    with torch.no_grad():
        module.get_parameter("model.embed_tokens.weight")[7] = torch.nan
    for example in examples:
        example.token_ids[:] = np.where(example.token_ids == 7, 8, example.token_ids)
    examples[2].token_ids[3] = 7
    with pytest.raises(
        GradientError, match="example-2: its loss is nan, expected finite numbers; the largest weight is nan"
    ):
        split(model, examples, random_vectors(model, 3))


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (torch.ones(2, 64), "`vectors`: found 2 × 64, expected one for each example .* 3 × 64"),
        (torch.ones(3, 63), "`vectors`: found 3 × 63, .* 3 × 64"),
        (torch.ones(3, 64).index_fill(0, torch.tensor([1]), torch.inf), "`vectors`: that of example-1 .* not finite"),
    ],
)
def test_vectors_that_do_not_fit_are_refused(vectors: Tensor, message: str):
    model = language_model("llama")
    with pytest.raises(OptionError, match=message):
        split(model, mixed_examples(), vectors)


@pytest.mark.parametrize("options", [{"side": 0}, {"batch_tokens": 0}])
def test_sizes_that_are_not_positive_are_refused(options: dict[str, Any]):
    model = language_model("llama")
    with pytest.raises(OptionError, match="expected 1 or more"):
        split(model, mixed_examples(), random_vectors(model, 3), **options)


def test_one_sided_projections_that_would_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("trackstar.gradients.dense_projection.LARGEST_BYTES", 1000)
    model = language_model("llama")
    with pytest.raises(OptionError, match="one-sided"):
        split(model, mixed_examples(), random_vectors(model, 3), kind="one-sided")


# ---- Influences ------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_pairs_influence_splits_over_the_candidate_and_over_the_query_alike(architecture: str):
    model = language_model(architecture)
    candidates, query = random_examples([12, 7, 15, 9]), random_examples([10], seed=5, targets_from=7)
    second_moment, full = drawn_second_moment(model, "factored")
    phi, phi_query = projected(model, candidates, second_moment), projected(model, query, second_moment)
    R = autocorrelation(phi, len(model.blocks))
    whitening = whitening_of(R, damping=0.1)
    norms, norm = whitening.norms(phi), whitening.norms(phi_query)
    over_candidates = split(
        model, candidates, whitening.apply_inverse(phi_query) / norm / norms[:, None], second_moment
    )
    over_query = split(
        model, query * len(candidates), whitening.apply_inverse(phi) / norm / norms[:, None], second_moment
    )

    exact, exact_query = (reference_phi(model, e, full, seed=SEED) for e in (candidates, query))
    whitenings = {n: reference.whitening(reference.autocorrelation(block), damping=0.1) for n, block in exact.items()}
    influences = reference.influences(exact_query, exact, whitenings)[0]
    for parts in (over_candidates, over_query):
        sums = torch.stack([part.double().sum() for part in parts])
        torch.testing.assert_close(sums, influences, rtol=0, atol=2e-4)
    both = [torch.stack([part.sum() for part in parts]) for parts in (over_candidates, over_query)]
    torch.testing.assert_close(both[0], both[1], rtol=0, atol=2e-5)


def test_parts_sum_to_the_scores_of_an_index(tiny_model_folders: TinyModelFolder, tmp_path: Path):
    texts = ["The capital of France is Paris.", "Gold is an element.", "In Zürich and Kyoto it rains, they say, " * 3]
    index = build_index(
        tiny_model_folders("llama", "bos"),
        texts,
        tmp_path / "index",
        layer_blocks=2,
        side=SIDE,
        seed=SEED,
        codec="float32",
        window_tokens=40,
        progress=False,
    )
    model = language_model("llama")
    query = Query(query_id="q", prompt="The capital of France is", completion="Paris")
    phi, _ = query_gradients(index, model, [query], progress=False)
    whitening = whitening_of(train_autocorrelation(index).square(), damping=0.1)
    scorer = trackstar_scorer(index, phi, whitening)
    entry = index.manifest.second_moment
    moment = SecondMoment.from_tensors(index.tensors("second_moment"), source=entry.source, floor=entry.floor)
    examples = [index.example(row).example for row in range(index.rows)]
    assert index.rows > len(texts)
    parts = split(model, examples, scorer.vectors * scorer.multipliers[:, None], moment)
    assert_sums_equal(parts, all_scores(index, scorer)[0], tolerance=5e-5)
