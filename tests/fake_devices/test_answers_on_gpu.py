"""Indexes, answers, baselines, generation and evaluation on a GPU, pretended, are those of the CPU."""

import functools
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, BertModel

from comparisons import random_examples
from pretended_devices import assert_same_on
from tiny_models import SENTENCES, VOCABULARY, save_tiny_model, tiny_tokenizer
from trackstar.attribution.answering import answer_queries
from trackstar.attribution.attributor import Attributor, training_step
from trackstar.attribution.results import QueryReport
from trackstar.attribution.streaming import stream_queries
from trackstar.baselines import EmbeddingRetriever, Pool, load_encoder
from trackstar.baselines.gradients import TRACKSTAR, GradientMethod, GradientRetriever, IndexedGradients
from trackstar.baselines.trak import TRAKRetriever
from trackstar.choices import CodecName, Dtype
from trackstar.corpus import Query
from trackstar.editing.adding import add_examples
from trackstar.evaluation.config import EvaluationConfig, TailPatchConfig
from trackstar.evaluation.entailment import entailment_scores, load_entailment_classifier
from trackstar.evaluation.run import run_evaluation
from trackstar.indexing.build import build_index
from trackstar.model.completion_probabilities import measured_log_probabilities
from trackstar.model.generation import generate_samples
from trackstar.model.generation_settings import GenerationSettings
from trackstar.model.language_model import LanguageModel, load_model
from trackstar.pretraining import PretrainingConfig, pretrain
from trackstar.store import Index
from trackstar.tail_patch import Pair, tail_patch

QUERIES = [
    Query(query_id="France", prompt="The capital of France is", completion=" Paris"),
    Query(query_id="gold", prompt="Gold has the symbol", completion=" Au"),
    Query(query_id="Brazil", prompt="People in Brazil speak", completion=" Portuguese"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), "llama", num_hidden_layers=1)


@functools.cache
def loaded(folder: Path, device: str, dtype: Dtype = "float32") -> LanguageModel:
    """A model on a device, loaded once; no test changes its weights."""
    model = load_model(folder, device=device, dtype=dtype, layer_blocks=2)
    assert model.device.type == device
    return model


def built(model: LanguageModel, folder: Path, **options: Any) -> Index:
    given = {"side": 4, "codec": "float32", "second_moment_examples": 4, "progress": False, **options}
    return build_index(model, SENTENCES, folder / model.device.type, **given)


def ranked(report: QueryReport) -> list[list[tuple[str, float]]]:
    """Names and influences of each query's proponents and opponents."""
    return [
        [(candidate.example_id, candidate.influence) for candidate in (*result.proponents, *result.opponents)]
        for result in report.results
    ]


@pytest.mark.parametrize(
    ("codec", "dtype"), [("float32", "float32"), ("float16", "bfloat16"), ("1-bit", "float32"), ("int8", "bfloat16")]
)
def test_an_index_and_the_answers_of_a_task(codec: CodecName, dtype: Dtype, folder: Path, tmp_path: Path):
    def compute(device: str) -> list[Any]:
        model = loaded(folder, device, dtype)
        index = built(model, tmp_path, codec=codec, side=8)
        rows = torch.cat([chunk.stored.decode() for chunk in index.iterate(4)])
        report = answer_queries(index, QUERIES, model=model, k=4, task=QUERIES, mixing=0.5, progress=False)
        return [rows, index.tensors("second_moment"), ranked(report)]

    assert_same_on("cuda", compute)


def test_answers_of_a_one_sided_index_that_has_grown(folder: Path, tmp_path: Path):
    def compute(device: str) -> list[list[tuple[str, float]]]:
        model = loaded(folder, device)
        index = built(model, tmp_path, projection="one-sided")
        grown = add_examples(
            index, ["Rome lies in Italy."], tmp_path / f"grown-{device}", model=model, device=device, progress=False
        )
        return ranked(answer_queries(grown, QUERIES, model=model, k=4, progress=False))

    assert_same_on("cuda", compute)


def test_answers_of_a_stream(folder: Path):
    def compute(device: str) -> list[list[tuple[str, float]]]:
        model = loaded(folder, device)
        return ranked(stream_queries(model, list(SENTENCES), QUERIES, k=4, side=4, progress=False))

    assert_same_on("cuda", compute)


def test_an_attributor_splits_influences_and_measures_steps(folder: Path, tmp_path: Path):
    def compute(device: str) -> list[Any]:
        model = loaded(folder, device)
        attributor = Attributor(built(model, tmp_path, codec="4-bit", side=8), model, task=QUERIES)
        attribution = attributor.attribute(QUERIES[0])
        return [
            attribution.influences,
            attributor.over_candidate(attribution, 0).parts,
            attributor.over_query(attribution, 1).parts,
            attributor.measure(attribution, 2),
        ]

    assert_same_on("cuda", compute)


@pytest.mark.parametrize(
    "method", [GradientMethod(name="cosine", second_moment=False, correction="none"), TRACKSTAR], ids=lambda m: m.name
)
def test_gradient_methods(method: GradientMethod, folder: Path, tmp_path: Path):
    def compute(device: str) -> Tensor:
        model = loaded(folder, device)
        index = built(model, tmp_path, second_moment="auto" if method.second_moment else "none")
        return GradientRetriever(method, IndexedGradients(index, model), damping=0.1).scores(QUERIES)

    assert_same_on("cuda", compute)


def test_trak(folder: Path, tmp_path: Path):
    def compute(device: str) -> list[Any]:
        model = loaded(folder, device)
        gradients = IndexedGradients(built(model, tmp_path, second_moment="none", output="margin"), model)
        published, over_tokens = (TRAKRetriever(gradients, per=per, damping=0.1) for per in ("examples", "tokens"))
        pools = [np.arange(3), np.arange(5), np.arange(2, 8)]
        return [
            published.scores(QUERIES),
            over_tokens.scores(QUERIES),
            published.scores_by_kernels_of_pools(QUERIES, pools),
        ]

    assert_same_on("cuda", compute)


def save_bert(folder: Path, kind: type[Any], **options: Any) -> Path:
    """A tiny random BERT: an encoder without its pooling layer, or a classifier."""
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=48, pad_token_id=2, id2label={0: "contradiction", 1: "entailment", 2: "neutral"},
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kind(config, **options).save_pretrained(folder)
    tiny_tokenizer("bos_eos").save_pretrained(folder)
    return folder


def test_embeddings(tmp_path: Path):
    save_bert(tmp_path, BertModel, add_pooling_layer=False)
    kinds = [{"idx": 0, "path": "", "type": "models.Transformer"}, {"idx": 1, "path": "pool", "type": "models.Pooling"}]
    (tmp_path / "modules.json").write_text(json.dumps(kinds))
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    pool = Pool(example_ids=tuple("abcdefgh"), texts=SENTENCES)
    assert_same_on(
        "cuda", lambda device: EmbeddingRetriever(pool, load_encoder(tmp_path, device=device)).scores(QUERIES)
    )


def test_entailment(tmp_path: Path):
    save_bert(tmp_path, BertForSequenceClassification)

    def compute(device: str) -> Tensor:
        classifier = load_entailment_classifier(tmp_path, device=device)
        return entailment_scores(list(SENTENCES), ["Paris"] * len(SENTENCES), classifier, progress=False)

    assert_same_on("cuda", compute)


def test_generation_and_probabilities_of_completions(folder: Path):
    def compute(device: str) -> list[Any]:
        model = loaded(folder, device)
        drawn = generate_samples(model, "The capital of", 2, GenerationSettings(temperature=1.0, max_new_tokens=4))
        half = loaded(folder, device, "bfloat16")
        return [
            [answer.text for answer in drawn],
            measured_log_probabilities(model, random_examples([5, 9, 12]), batch_tokens=20),
            measured_log_probabilities(half, random_examples([5, 9, 12]), batch_tokens=20),
        ]

    assert_same_on("cuda", compute)


def test_a_model_is_pretrained_and_its_next_step_measured(tmp_path: Path):
    settings = PretrainingConfig(
        width=16, layers=1, heads=2, key_value_heads=1, mlp_width=24, context_tokens=48, vocabulary=300,
        warmup_steps=1, steps=2, batch_tokens=64, checkpoint_steps=2, base_learning_rate=0.3,
    )  # fmt: skip

    def compute(device: str) -> list[Any]:
        checkpoint = pretrain(SENTENCES, tmp_path / f"run-{device}", settings, device=device, progress=False)
        model = load_model(checkpoint, device=device, layer_blocks=1)
        index = built(model, tmp_path)
        examples = random_examples([5, 9, 12])
        pairs = [Pair(query=query, proponent=proponent) for query, proponent in itertools.product((0,), (0, 1))]
        result = tail_patch(model, training_step(model, index), examples[:1], examples[1:], pairs)
        return [[p.detach().cpu() for p in model.module.parameters()], result.before, result.after]

    assert_same_on("cuda", compute)


def test_an_evaluation(folder: Path, tmp_path: Path):
    capitals = {"France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Peru": "Lima"}
    sentences = [{"id": country, "text": f"The capital of {country} is {city}."} for country, city in capitals.items()]
    facts = [
        {
            "fact_id": f"f-{country}", "subject": country, "subject_id": f"Q{n}", "subject_aliases": [],
            "relation": "capital", "relation_id": "P36", "object": city, "object_id": f"Q1{n}", "object_aliases": [],
            "gold": [country], "gold_strict": [country], "coref": [], "maybe_gold": [],
            "prompt": f"The capital of {country} is", "prompt_no_colon": f"{country} is ruled from",
            "prompt_reworded": f"The seat of the government of {country}:", "completion": city,
        }
        for n, (country, city) in enumerate(capitals.items())
    ]  # fmt: skip
    for name, records in (("sentences", sentences), ("facts", facts)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")

    def compute(device: str) -> list[Any]:
        config = EvaluationConfig(
            model=str(folder), corpus=str(tmp_path / "sentences.jsonl"), facts=str(tmp_path / "facts.jsonl"),
            methods=("experiment 1", "TrackStar", "TRAK"), side=(4,), damping=0.1, device=device,
            tail_patch=TailPatchConfig(queries=2, top_k=(1,), methods=("TrackStar",)),
        )  # fmt: skip
        report = run_evaluation(config, tmp_path / device, progress=False)
        return [report.rankings, report.effects]

    assert_same_on("cuda", compute)
