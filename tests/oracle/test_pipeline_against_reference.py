"""From texts to ranked training examples: the whole of Eq. 1-4, the package on disk against the oracle in float64."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from capitals import QUERIES, TEXTS
from capitals_oracle import DAMPING, SEED, assert_report_equals, expected, influences_of
from comparisons import SIDE, language_model
from tiny_models import CORE_ARCHITECTURES, TinyModelFolder
from trackstar.attribution.answering import answer_queries
from trackstar.attribution.results import QueryReport
from trackstar.corpus import Query
from trackstar.indexing.build import build_index


def found(
    folder: Path,
    out: Path,
    queries: Sequence[Query],
    *,
    kind: str = "factored",
    mixing: float | None = None,
    **options: Any,
) -> QueryReport:
    if kind == "none":
        options["second_moment"] = "none"
    else:
        options["second_moment_kind"] = kind
    build_index(
        folder,
        TEXTS,
        out,
        **{"layer_blocks": 2, "side": SIDE, "seed": SEED, "codec": "float32", "progress": False, **options},
    )
    return answer_queries(out, queries, k=len(TEXTS), mixing=mixing, damping=DAMPING, progress=False)


@pytest.mark.parametrize("architecture", CORE_ARCHITECTURES)
def test_ranked_examples_equal_the_references(architecture: str, tiny_model_folders: TinyModelFolder, tmp_path: Path):
    report = found(tiny_model_folders(architecture, "bos"), tmp_path / "index", QUERIES)
    assert_report_equals(report, expected(language_model(architecture), QUERIES))


@pytest.mark.parametrize("kind", ["none", "elementwise"])
@pytest.mark.parametrize("architecture", ["gpt2", "gemma2"])
def test_other_second_moments_give_the_references_ranking_too(
    architecture: str, kind: str, tiny_model_folders: TinyModelFolder, tmp_path: Path
):
    report = found(tiny_model_folders(architecture, "bos"), tmp_path / "index", QUERIES, kind=kind)
    assert_report_equals(report, expected(language_model(architecture), QUERIES, kind=kind))


def test_single_query_is_corrected_by_the_training_examples_alone(tiny_model_folder: Path, tmp_path: Path):
    report = found(tiny_model_folder, tmp_path / "index", QUERIES[:1])
    assert_report_equals(report, expected(language_model("llama"), QUERIES[:1], mixing=0.0))


def test_given_mixing_is_used(tiny_model_folder: Path, tmp_path: Path):
    report = found(tiny_model_folder, tmp_path / "index", QUERIES[:3], mixing=0.4)
    assert_report_equals(report, expected(language_model("llama"), QUERIES[:3], mixing=0.4))


@pytest.mark.parametrize(
    ("option", "tolerance"),
    [
        ({"shard_examples": 5}, 1e-4),
        ({"batch_tokens": 64}, 1e-4),
        ({"codec": "float16"}, 1e-2),
        ({"codec": "bfloat16"}, 5e-2),
    ],
    ids=["shards", "batches", "float16", "bfloat16"],
)
def test_influence_does_not_depend_on_shards_batches_or_codec(
    option: dict[str, Any], tolerance: float, tiny_model_folder: Path, tmp_path: Path
):
    plain = influences_of(found(tiny_model_folder, tmp_path / "plain", QUERIES))
    other = influences_of(found(tiny_model_folder, tmp_path / "other", QUERIES, **option))
    torch.testing.assert_close(other, plain, rtol=0, atol=tolerance)


def test_training_example_asked_as_a_query_has_influence_one_on_itself(tiny_model_folder: Path, tmp_path: Path):
    # Its prompt is empty, so that every token is a target, as in training.
    text = TEXTS[0]
    queries = [Query(query_id="itself", prompt="", completion=text)]
    report = found(tiny_model_folder, tmp_path / "index", queries)
    best = report.results[0].proponents[0]
    assert (best.text, best.influence) == (text, pytest.approx(1.0, abs=1e-4))
