"""One question at a time gives what a file of queries gives, and what is asked on is of the same influences."""

import math
from pathlib import Path

import pytest
import torch

from capitals import QUERIES, TEXTS
from tiny_models import TinyModelFolder
from trackstar.attribution.answering import answer_queries, query_gradients
from trackstar.attribution.attributor import Attribution, Attributor, training_step
from trackstar.corpus import Query
from trackstar.curvature.task import task_correction
from trackstar.errors import OptionError
from trackstar.indexing.build import build_index
from trackstar.model.language_model import load_model
from trackstar.store import Index
from trackstar.tail_patch import Pair, tail_patch

DAMPING = 0.1


@pytest.fixture(scope="module")
def index(tiny_model_folders: TinyModelFolder, tmp_path_factory: pytest.TempPathFactory) -> Index:
    path = tmp_path_factory.mktemp("attribution") / "index"
    return build_index(
        tiny_model_folders("llama", "bos"), TEXTS, path, side=4, layer_blocks=2, codec="float32",
        second_moment_examples=8, progress=False,
    )  # fmt: skip


def attributor(index: Index, *, task: list[Query] | None = None, damping: float | None = DAMPING) -> Attributor:
    return Attributor(index, load_model(index.manifest.model.source, layer_blocks=2), task=task or [], damping=damping)


@pytest.mark.parametrize("task", [[], QUERIES], ids=["R_train alone", "a task's R"])
def test_one_question_gives_what_a_file_of_queries_gives(index: Index, task: list[Query]):
    asked = attributor(index, task=task)
    report = answer_queries(index, QUERIES[:2], k=index.rows, task=task or QUERIES[:2], damping=DAMPING, progress=False)
    for query, expected in zip(QUERIES[:2], report.results, strict=True):
        found = asked.attribute(query)
        assert found.loss == pytest.approx(expected.loss, rel=1e-5)
        influences = {ranked.row: ranked.influence for ranked in expected.proponents}
        assert found.influences.tolist() == pytest.approx([influences[row] for row in range(index.rows)], abs=2e-6)
        best, worst = found.top(5)
        assert best.tolist() == [ranked.row for ranked in expected.proponents[:5]]
        assert worst.tolist() == [ranked.row for ranked in expected.opponents[:5]]


def test_influences_equal_whitened_cosines(index: Index):
    asked = attributor(index)
    phi, _ = query_gradients(index, asked.model, [QUERIES[0]], progress=False)
    r = index.tensors("autocorrelation")["autocorrelation"].double()
    damped = r + DAMPING * r.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None] * torch.eye(r.shape[1])
    candidates = (
        torch.cat([chunk.stored.codes for chunk in index.iterate(100)]).double().reshape(index.rows, len(r), -1)
    )
    query = phi.double().reshape(1, len(r), -1)
    inverse = torch.linalg.inv(damped)

    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.einsum("nbi,bij,mbj->nm", a, inverse, b)

    norms = product(candidates, candidates).diagonal().sqrt()
    expected = product(query, candidates)[0] / norms / product(query, query).sqrt()[0, 0]
    assert asked.attribute(QUERIES[0]).influences.double().tolist() == pytest.approx(expected.tolist(), abs=1e-5)


def test_a_candidates_influence_splits_over_its_own_and_over_the_querys_tokens(index: Index):
    asked = attributor(index, task=QUERIES)
    found = asked.attribute(QUERIES[0])
    for row in (0, 5, 17):
        candidate, query = asked.over_candidate(found, row), asked.over_query(found, row)
        for split in (candidate, query):
            assert float(split.parts.sum()) == pytest.approx(float(found.influences[row]), abs=2e-6)
            assert split.influence == float(found.influences[row])
            assert len(split.parts) == len(split.spans)
        assert candidate.text == TEXTS[row]
        assert query.text == f"{QUERIES[0].prompt} {QUERIES[0].completion}"


def test_the_measured_effect_is_tail_patchs(index: Index):
    asked = attributor(index)
    found = asked.attribute(QUERIES[0])
    before, after = asked.measure(found, 3)
    assert before == pytest.approx(math.exp(-found.loss), rel=1e-4)
    model = load_model(index.manifest.model.source, layer_blocks=2)
    expected = tail_patch(
        model, training_step(model, index), [found.example], [index.example(3).example], [Pair(query=0, proponent=0)],
        path="fast",
    )  # fmt: skip
    assert after - before == pytest.approx(float(expected.after[0] - expected.before[0]), rel=0.02, abs=1e-9)
    assert asked.measure(found, 3) == (before, after)


def test_rows_that_are_not_there_are_refused(index: Index):
    asked = attributor(index)
    found: Attribution = asked.attribute(QUERIES[0])
    for ask in (asked.over_candidate, asked.over_query, asked.measure):
        for row in (-1, index.rows):
            with pytest.raises(OptionError, match=f"`row`: expected a candidate of the index, 0 to .*, found {row}"):
                ask(found, row)


def test_the_task_is_corrected_for_once(index: Index):
    asked = attributor(index, task=QUERIES, damping=None)
    phi, _ = query_gradients(index, asked.model, QUERIES, progress=False)
    expected = task_correction(index, phi)
    assert asked.correction.key == expected.key
    assert asked.correction is asked.correction


def test_a_step_without_v_and_without_a_training_state_is_refused(tiny_model_folder: Path, tmp_path: Path):
    without = build_index(
        tiny_model_folder,
        TEXTS,
        tmp_path / "index",
        side=4,
        layer_blocks=2,
        codec="float16",
        second_moment="none",
        progress=False,
    )
    asked = attributor(without)
    with pytest.raises(OptionError, match="expected a factored second moment, found one of kind none"):
        asked.measure(asked.attribute(QUERIES[0]), 0)
