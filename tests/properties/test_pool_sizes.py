"""Ranks in pools of several sizes: the pools, the ranks, TRAK with a pool's own kernel, and the report."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tiny_models import save_tiny_model
from trackstar.baselines.trak import kernel_products
from trackstar.curvature.whitening import shrinkage_damping
from trackstar.errors import CurvatureError, OptionError
from trackstar.evaluation import rankings as rankings_module
from trackstar.evaluation.config import EvaluationConfig, read_config
from trackstar.evaluation.facts import Entity, Evidence, Fact, evidence
from trackstar.evaluation.metrics import gold_ranks
from trackstar.evaluation.pool_sizes import (
    POOL_KERNEL,
    POOL_KINDS,
    drawn_order,
    drawn_pools,
    ranks_in_pools,
)
from trackstar.evaluation.rankings import Rankings
from trackstar.evaluation.report_files import write_report
from trackstar.evaluation.run import EvaluationReport, run_evaluation
from trackstar.evaluation.tables import tables
from trackstar.evaluation.workspace import Workspace
from trackstar.model.language_model import load_model

SIZES = (10, 17, 30, 60)
CANDIDATES = 80
QUERIES = 5
COUNTRIES = "France Italy Japan Peru Kenya Cuba Chad Oman".split()
METHODS = ("gold", "random", "BM25", "experiment 2", "experiment 5", "TrackStar", "TRAK", "TRAK, R over tokens")


def drawn_case(seed: int) -> tuple[list[Fact], list[str], Evidence, torch.Tensor]:
    """Facts with gold and left-out candidates at random, and BM25 scores with many ties."""
    generator = np.random.default_rng(seed)
    facts = [
        Fact(fact_id=f"f{n}", subject=Entity(name="a"), relation="r", relation_uri="", object=Entity(name="b"))
        for n in range(QUERIES)
    ]
    rows = [generator.permutation(CANDIDATES) for _ in facts]
    gold = tuple(tuple(order[: n + 1].tolist()) for n, order in enumerate(rows))
    left_out = tuple(tuple(order[60 : 60 + 3 * n].tolist()) for n, order in enumerate(rows))
    nearness = torch.from_numpy(generator.integers(0, 6, size=(QUERIES, CANDIDATES)).astype(np.float32))
    return facts, [f"e{n}" for n in range(CANDIDATES)], Evidence(gold=gold, left_out=left_out), nearness


@pytest.mark.parametrize("seed", range(5))
def test_pools_are_nested_hold_the_gold_and_have_the_given_size(seed: int):
    facts, names, found, nearness = drawn_case(seed)
    pools = drawn_pools(facts, names, found, SIZES, nearness, seed=seed)
    assert set(pools) == set(POOL_KINDS)
    for of_sizes in pools.values():
        for query in range(QUERIES):
            smaller: set[int] = set(found.gold[query])
            for size in SIZES:
                pool = of_sizes[size][query].tolist()
                assert pool == sorted(set(pool))
                assert len(pool) == size
                assert smaller <= set(pool)
                assert not set(pool) & set(found.left_out[query])
                smaller = set(pool)


@pytest.mark.parametrize("seed", range(5))
def test_a_third_of_the_near_pool_is_the_best_of_bm25(seed: int):
    facts, names, found, nearness = drawn_case(seed)
    pools = drawn_pools(facts, names, found, SIZES, nearness, seed=seed)
    for size in SIZES:
        for query, (near, drawn) in enumerate(
            zip(pools["a third BM25's best"][size], pools["random"][size], strict=True)
        ):
            ranked = np.setdiff1d(np.arange(CANDIDATES), found.left_out[query])
            kth = np.sort(nearness[query].numpy()[ranked])[::-1][size // 3 - 1]  # score of BM25's last that is taken
            better = set(ranked[nearness[query].numpy()[ranked] > kth].tolist())
            room = size - len(found.gold[query])
            if size // 3 <= room:
                assert better <= set(near.tolist())
            of_both = set(near.tolist()) & set(drawn.tolist())
            assert len(of_both) >= size - size // 3  # the random part is the start of the same order


@pytest.mark.parametrize("seed", range(5))
def test_pools_do_not_depend_on_the_order_of_candidates(seed: int):
    facts, names, found, nearness = drawn_case(seed)
    place = np.random.default_rng(seed + 100).permutation(CANDIDATES)  # new row of each candidate
    moved = Evidence(
        gold=tuple(tuple(int(place[row]) for row in rows) for rows in found.gold),
        left_out=tuple(tuple(int(place[row]) for row in rows) for rows in found.left_out),
    )
    back = np.argsort(place)
    pools = drawn_pools(facts, names, found, SIZES, nearness, seed=seed)
    others = drawn_pools(facts, [names[row] for row in back], moved, SIZES, nearness[:, back], seed=seed)
    for kind in POOL_KINDS:
        for size in SIZES:
            for pool, other in zip(pools[kind][size], others[kind][size], strict=True):
                assert sorted(place[pool].tolist()) == other.tolist()


def test_other_seeds_and_queries_draw_other_orders():
    names = [f"e{n}" for n in range(CANDIDATES)]
    orders = {tuple(drawn_order(query, names, seed).tolist()) for query in ("a", "b") for seed in (0, 1)}
    assert len(orders) == 4
    assert all(sorted(order) == list(range(CANDIDATES)) for order in orders)


@pytest.mark.parametrize("seed", range(5))
def test_ranks_equal_brute_force_and_those_of_all_candidates_the_report_s(seed: int):
    facts, names, found, nearness = drawn_case(seed)
    generator = np.random.default_rng(seed + 200)
    scores = torch.from_numpy(generator.integers(-3, 4, size=(QUERIES, CANDIDATES)).astype(np.float32))
    sizes = (*SIZES, CANDIDATES)
    for of_sizes in drawn_pools(facts, names, found, sizes, nearness, seed=seed).values():
        by_size = []
        for size in sizes:
            pools = of_sizes[size]
            of_pools = [row[torch.from_numpy(pool)] for row, pool in zip(scores, pools, strict=True)]
            ranks = ranks_in_pools(of_pools, pools, found.gold)
            for query, pool in enumerate(pools):
                in_order = sorted(pool.tolist(), key=lambda row: (-float(scores[query, row]), row))
                assert ranks[query] == sorted(in_order.index(row) + 1 for row in found.gold[query])
            by_size.append(ranks)
        assert by_size[-1] == gold_ranks(scores, found.gold, left_out=found.left_out)
        for smaller, larger in itertools.pairwise(by_size):
            for query in range(QUERIES):
                assert all(a <= b for a, b in zip(smaller[query], larger[query], strict=True))


@pytest.mark.parametrize("rows", [5, 40])
@pytest.mark.parametrize("damping", [0.1, None])
def test_kernel_of_a_pool_equals_the_inverse_of_its_r(rows: int, damping: float | None):
    generator = torch.Generator().manual_seed(rows)
    pool = torch.randn(rows, 3, 12, generator=generator) * torch.linspace(0.2, 2, 12)
    query = torch.randn(3, 12, generator=generator)
    r = torch.einsum("nbi,nbj->bij", pool.double(), pool.double()) / rows
    ridge = shrinkage_damping(r.float(), rows) if damping is None else damping
    expected = torch.zeros(rows, dtype=torch.float64)
    for block in range(3):
        damped = r[block] + ridge * r[block].diagonal().mean() * torch.eye(12, dtype=torch.float64)
        expected += pool[:, block].double() @ torch.linalg.solve(damped, query[block].double())
    torch.testing.assert_close(kernel_products(pool, query, damping=damping), expected, rtol=1e-4, atol=1e-4)


def test_singular_kernel_of_a_pool_is_refused():
    pool = torch.ones(4, 2, 3)
    with pytest.raises(CurvatureError, match=r"block 0: R of the pool's 4 candidates is singular with damping 0;"):
        kernel_products(pool, pool[0], damping=0.0)


# ---- In a report -----------------------------------------------------------------------------------------------------


def write_world(folder: Path) -> dict[str, str]:
    """Write a model, 40 sentences, and facts of which two sentences are left out."""
    save_tiny_model(folder / "model", "llama")
    lines = []
    for n, country in enumerate(COUNTRIES):
        lines += [{"sentence_id": f"{n}-{k}", "text": f"{country} has {k} lakes and {n} rivers."} for k in range(5)]
    (folder / "sentences.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    facts = [
        {
            "fact_id": f"f{n}", "subject": country, "subject_id": f"Q{n}", "relation": "lakes", "relation_id": "P1",
            "object": f"{n} rivers", "object_id": f"Q1{n}", "gold": [f"{n}-0"], "gold_strict": [f"{n}-0"],
            "coref": [f"{n}-1"], "maybe_gold": [f"{n}-2"], "prompt": f"{country} has", "completion": f"{n} rivers",
        }
        for n, country in enumerate(COUNTRIES)
    ]  # fmt: skip
    (folder / "facts.jsonl").write_text("\n".join(map(json.dumps, facts)), encoding="utf-8")
    return {
        "model": str(folder / "model"), "corpus": str(folder / "sentences.jsonl"), "facts": str(folder / "facts.jsonl"),
    }  # fmt: skip


def settings(paths: dict[str, str], **others: Any) -> EvaluationConfig:
    given: dict[str, Any] = {
        **paths, "methods": METHODS, "side": (4,), "damping": 0.1, "pool_sizes": (20, 12, 500), **others,
    }  # fmt: skip
    return EvaluationConfig(**given)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("report") / "report"


@pytest.fixture(scope="module")
def report(paths: dict[str, str], folder: Path) -> EvaluationReport:
    return run_evaluation(settings(paths), folder, progress=False)


def test_report_ranks_in_every_pool_and_all_candidates_give_its_mrr(report: EvaluationReport):
    pools = report.pool_sizes
    assert pools is not None
    assert pools.sizes == (12, 20, 40)  # 500 stands for all
    assert pools.methods == (*METHODS[1:], POOL_KERNEL)
    for kind in POOL_KINDS:
        for method in METHODS[1:]:
            found = pools.metrics(kind, method, 40)
            assert found is not None
            expected = report.rankings[method, 0].metrics()
            np.testing.assert_array_equal(found.reciprocal_rank, expected.reciprocal_rank)
            np.testing.assert_array_equal(found.recall, expected.recall)
        assert pools.metrics(kind, POOL_KERNEL, 12) is not None
        assert pools.metrics(kind, POOL_KERNEL, 40) is None


def test_kernel_of_all_candidates_gives_the_scores_of_trak(
    report: EvaluationReport, paths: dict[str, str], folder: Path
):
    rankings = Rankings(settings(paths), load_model(paths["model"]), Workspace(folder), progress=False)
    everything = [np.arange(report.candidates)] * len(report.facts)
    found = torch.stack(rankings.scores_by_kernels_of_pools(report.facts, 0, everything))
    torch.testing.assert_close(found, rankings.scores("TRAK", report.facts, 0), rtol=1e-3, atol=1e-5)


def test_ranks_of_a_report_are_counted_among_the_pools_by_the_report_s_scores(
    report: EvaluationReport, paths: dict[str, str], folder: Path
):
    rankings = Rankings(settings(paths), load_model(paths["model"]), Workspace(folder), progress=False)
    scores = rankings.scores("experiment 5", report.facts, 0)
    found_rows = evidence(report.facts, report.pool.row_of)
    pools = drawn_pools(
        report.facts, report.pool.example_ids, found_rows, (12,), rankings.scores("BM25", report.facts, 0), seed=0
    )
    assert report.pool_sizes is not None
    for kind in POOL_KINDS:
        ranks = report.pool_sizes.ranks[kind, "experiment 5", 12]
        for query, pool in enumerate(pools[kind][12]):
            values = scores[query, torch.from_numpy(pool)]
            (gold,) = found_rows.gold[query]
            assert ranks[query] == (1 + int((values > scores[query, gold]).sum()),)


def test_second_run_computes_no_pool_and_other_sizes_only_pools(
    report: EvaluationReport, paths: dict[str, str], folder: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("recomputed")

    with monkeypatch.context() as patched:
        patched.setattr("trackstar.evaluation.pool_sizes._compute", refuse)
        patched.setattr("trackstar.evaluation.pool_sizes.drawn_pools", refuse)
        patched.setattr(rankings_module.Rankings, "_compute", refuse)
        again = run_evaluation(settings(paths), folder, progress=False)
    assert again.pool_sizes == report.pool_sizes
    with monkeypatch.context() as patched:
        patched.setattr(rankings_module.Rankings, "_compute", refuse)
        other = run_evaluation(settings(paths, pool_sizes=(12, 30)), folder, progress=False)
    assert other.pool_sizes is not None
    assert report.pool_sizes is not None
    for key, ranks in other.pool_sizes.ranks.items():
        if key[2] != 30:
            assert ranks == report.pool_sizes.ranks[key]
    run_evaluation(settings(paths), folder, progress=False)


def test_report_has_tables_a_figure_and_numbers_by_pool_size(report: EvaluationReport, tmp_path: Path):
    assert report.pool_sizes is not None
    made = {table.name: table for table in tables(report)}
    table = made["table-pool-sizes"]
    assert table.header == ("pool", "method", "12", "20", "all 40")
    assert [row[:2] for row in table.rows] == [(kind, m) for kind in POOL_KINDS for m in report.pool_sizes.methods]
    assert made["table-pool-sizes-recall"].header == table.header
    trak = next(row for row in table.rows if row[1] == "TRAK")
    assert trak[4] == next(row for row in made["table-2"].rows if row[0] == "TRAK")[1].removesuffix(" †")
    page = write_report(report, tmp_path).read_text(encoding="utf-8")
    assert "MRR by number of candidates per query" in page
    assert (tmp_path / "figures" / "figure-pool-sizes.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert (
        found["pool_sizes"]["random"]["TRAK"]["40"]["reciprocal_rank"]
        == (found["methods"]["TRAK"]["template 0"]["reciprocal_rank"])
    )
    write_report(dataclasses.replace(report, pool_sizes=None), tmp_path)
    assert not (tmp_path / "tables" / "table-pool-sizes.csv").exists()
    assert not (tmp_path / "figures" / "figure-pool-sizes.png").exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[300, 9]", "`pool_sizes`: expected numbers of 10 or more, each once, found [300, 9]"),
        ("[300, 300]", "`pool_sizes`: expected numbers of 10 or more, each once, found [300, 300]"),
        ("['all']", "`pool_sizes`: expected int, found 'all'"),
        ("[300.0]", "`pool_sizes`: expected int, found 300.0"),
        ("[true]", "`pool_sizes`: expected int, found True"),
    ],
)
def test_bad_pool_sizes_are_refused_in_one_line(tmp_path: Path, value: str, message: str):
    file = tmp_path / "report.toml"
    file.write_text(f'model = "m"\ncorpus = "c"\nfacts = "f"\npool_sizes = {value}\n', encoding="utf-8")
    with pytest.raises(OptionError) as raised:
        read_config(file)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_pool_smaller_than_the_gold_of_a_fact_is_refused_before_any_computation(paths: dict[str, str], tmp_path: Path):
    lines = [json.loads(line) for line in Path(paths["facts"]).read_text(encoding="utf-8").splitlines()]
    lines[3]["gold"] = [f"{n}-{k}" for n in range(3) for k in range(5)]
    facts = tmp_path / "facts.jsonl"
    facts.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    asked = settings(paths | {"facts": str(facts)}, methods=("BM25",))
    message = r"`pool_sizes`: expected at least 15, the number of gold examples of fact f3, found 12"
    with pytest.raises(OptionError, match=message):
        run_evaluation(asked, tmp_path / "report", progress=False)
    assert not (tmp_path / "report").exists()
