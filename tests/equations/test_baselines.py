"""Baselines rank by their published formulas, independent of batch, order and padding."""

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from trackstar.baselines import (
    BM25Retriever,
    EmbeddingRetriever,
    GoldRetriever,
    Pool,
    RandomRetriever,
    Retriever,
    load_encoder,
)
from trackstar.corpus import Example, Query
from trackstar.errors import CorpusError, ModelError, OptionError, TrackstarError

TEXTS = (
    "Paris is the capital of France, and Paris is large.",
    "Berlin is the capital of Germany.",
    "The Seine flows through Paris.",
    "A river.",
    "",
    "Berlin, Berlin, Berlin!",
    "It is the capital, then.",
)
STOP_WORDS = set(
    "a an and are as at be but by for if in into is it no not of on or such that the their then there".split()
)
STOP_WORDS |= set("these they this to was will with".split())


def pool(texts: Sequence[str] = TEXTS) -> Pool:
    return Pool.from_examples(Example(example_id=f"e{n}", text=text, record=n) for n, text in enumerate(texts))


def query(prompt: str, completion: str, query_id: str = "q") -> Query:
    return Query(query_id=query_id, prompt=prompt, completion=completion)


QUERIES = [
    query("The capital of France is", "Paris", "q0"),
    query("Berlin Berlin and", "Berlin", "q1"),
    query("Nobody knows", "Samarkand", "q2"),
    query("It is", "the", "q3"),
]


def raised(run: Callable[[], object], kind: type[TrackstarError]) -> str:
    with pytest.raises(kind) as caught:
        run()
    message = str(caught.value)
    assert "\n" not in message
    return message


# The pool


def test_pool_has_the_order_of_the_examples_and_their_rows() -> None:
    found = pool(("one", "two"))
    assert (found.example_ids, found.texts, dict(found.row_of)) == (("e0", "e1"), ("one", "two"), {"e0": 0, "e1": 1})
    assert len(found) == 2


@pytest.mark.parametrize(
    ("example_ids", "texts", "message"),
    [
        ((), (), "the pool holds no candidate; expected at least one example to rank"),
        (("a", "b", "a"), ("", "", ""), "example a: two candidates have this id, 0 and 2; expected each id once"),
        (("a",), ("x", "y"), "the pool has 1 ids and 2 texts; expected one id and one text per candidate"),
        (("a",), ("x\ud800",), "example a: the text holds half a surrogate pair (U+D800 at character 1); "),
    ],
)
def test_bad_pool_is_one_line(example_ids: tuple[str, ...], texts: tuple[str, ...], message: str) -> None:
    assert raised(lambda: Pool(example_ids=example_ids, texts=texts), CorpusError).startswith(message)


# BM25


def published_bm25(texts: Sequence[str], question: str, k1: float, b: float) -> list[float]:
    """Kamphuis et al. 2020, "Lucene (accurate)", in float64."""
    documents = [words(text) for text in texts]
    mean = sum(map(len, documents)) / len(documents)
    scores = []
    for document in documents:
        score = 0.0
        for word in words(question):
            holding = sum(word in other for other in documents)
            inverse = math.log(1 + (len(documents) - holding + 0.5) / (holding + 0.5))
            count = document.count(word)
            if count:
                score += inverse * count / (count + k1 * (1 - b + b * len(document) / mean))
        scores.append(score)
    return scores


def words(text: str) -> list[str]:
    return [word for word in re.findall(r"\w\w+", text.lower()) if word not in STOP_WORDS]


@pytest.mark.parametrize(("k1", "b"), [(1.5, 0.75), (0.9, 0.4), (0.0, 0.0), (2.0, 1.0)])
def test_bm25_equals_its_published_formula(k1: float, b: float) -> None:
    found = BM25Retriever(pool(), k1=k1, b=b).scores(QUERIES)
    assert found.dtype == torch.float32
    for row, asked in zip(found, QUERIES, strict=True):
        expected = published_bm25(TEXTS, f"{asked.prompt} {asked.completion}", k1, b)
        np.testing.assert_allclose(row.numpy(), expected, rtol=1e-6, atol=1e-7)


def test_bm25_of_unknown_and_of_stop_words_is_zero_everywhere() -> None:
    assert not BM25Retriever(pool()).scores(QUERIES[2:]).any()
    assert BM25Retriever(pool(("the", "", "!"))).scores(QUERIES).tolist() == [[0.0] * 3] * 4
    assert BM25Retriever(pool()).scores([]).shape == (0, len(TEXTS))


def test_bm25_parameters_out_of_range_are_refused() -> None:
    expected = "`k1`: expected 0 or more, found -1.0"
    assert raised(lambda: BM25Retriever(pool(), k1=-1.0), OptionError) == expected
    assert raised(lambda: BM25Retriever(pool(), b=1.5), OptionError) == "`b`: expected 0 to 1, found 1.5"


# Gold and random


def test_gold_ranks_first_in_the_order_given_and_all_others_score_zero() -> None:
    found = GoldRetriever(pool(), {"q0": ["e2", "e0"], "q1": ["e5"], "q3": []}).scores(
        [QUERIES[1], QUERIES[0], QUERIES[3]]
    )
    assert found.tolist() == [[0, 0, 0, 0, 0, 1, 0], [0.75, 0, 1, 0, 0, 0, 0], [0] * 7]


@pytest.mark.parametrize(
    ("gold", "message"),
    [
        ({"q0": ["e9"]}, "query q0: gold example e9 is not in the pool; expected all gold examples there"),
        ({"q0": ["e1", "e1"]}, "query q0: names a gold example twice; expected each once"),
        ({"q1": ["e1"]}, "query q0: no entry in `gold`; add its gold examples or leave it out"),
    ],
)
def test_bad_gold_is_one_line_that_names_the_query(gold: dict[str, list[str]], message: str) -> None:
    assert raised(lambda: GoldRetriever(pool(), gold).scores(QUERIES[:1]), CorpusError) == message


def test_random_ranking_depends_only_on_query_and_seed() -> None:
    candidates = pool([str(number) for number in range(50)])
    found = RandomRetriever(candidates, seed=1).scores(QUERIES)
    assert torch.equal(RandomRetriever(candidates, seed=1).scores(QUERIES[::-1]), found.flip(0))
    assert torch.equal(RandomRetriever(candidates, seed=1).scores(QUERIES[2:3]), found[2:3])
    assert all(sorted(row.tolist()) == list(range(50)) for row in found)
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(RandomRetriever(candidates, seed=2).scores(QUERIES), found)
    assert RandomRetriever(candidates).scores([]).shape == (0, 50)


# Embeddings


def save_encoder(
    folder: Path,
    *,
    modules: Sequence[str] = ("Transformer", "Pooling", "Normalize"),
    pooling: str = "pooling_mode_mean_tokens",
    settings: object = None,
    most_tokens: int = 24,
    special_tokens: Any = "bos_eos",
) -> Path:
    """A tiny random BERT in a folder such as the sentence-transformers library writes."""
    from transformers import BertConfig, BertModel

    from tiny_models import VOCABULARY, tiny_tokenizer

    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=48, pad_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BertModel(config, add_pooling_layer=False)
        for parameter in model.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    tiny_tokenizer(special_tokens).save_pretrained(folder)
    paths = {"Transformer": "", "Pooling": "1_Pooling"}
    kinds = [{"idx": n, "path": paths.get(kind, ""), "type": f"a.b.{kind}"} for n, kind in enumerate(modules)]
    (folder / "modules.json").write_text(json.dumps(kinds))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 16, pooling: True}))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": most_tokens}))
    if settings is not None:
        (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("encoder"))


LONG = "Berlin and Paris and Vienna and Budapest and Belgrade and Kyoto and Osaka and so on " * 3


def hidden_states(folder: Path, text: str, most_tokens: int) -> torch.Tensor:
    """The last hidden states of one text alone, by the model's own library."""
    from transformers import AutoModel, AutoTokenizer

    inputs = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt", truncation=True, max_length=most_tokens)
    with torch.no_grad():
        return AutoModel.from_pretrained(folder).eval()(**inputs).last_hidden_state[0]


def test_embedding_is_the_normalized_mean_of_the_last_hidden_states(encoder_folder: Path) -> None:
    encoder = load_encoder(encoder_folder)
    for text in ("Paris", LONG):
        mean = hidden_states(encoder_folder, text, 24).double().mean(dim=0)
        torch.testing.assert_close(encoder.encode([text])[0].double(), mean / mean.norm(), rtol=1e-5, atol=1e-6)


def test_embeddings_have_unit_norm_and_do_not_depend_on_the_batch(encoder_folder: Path) -> None:
    encoder = load_encoder(encoder_folder)
    texts = [*TEXTS, LONG, *(f"number {n} " * (n % 7) for n in range(70))]
    together = encoder.encode(texts)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(len(texts)))
    alone = torch.cat([encoder.encode([text]) for text in texts])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(encoder.encode(texts[::-1]).flip(0), together, rtol=1e-4, atol=1e-5)
    assert torch.equal(encoder.encode(texts), together)


def test_embedding_scores_are_cosines_of_query_text_and_candidates(encoder_folder: Path) -> None:
    encoder = load_encoder(encoder_folder)
    found = EmbeddingRetriever(pool(), encoder, progress=False).scores(QUERIES)
    expected = encoder.encode(["The capital of France is Paris"]) @ encoder.encode(TEXTS).T
    torch.testing.assert_close(found[:1], expected, rtol=1e-4, atol=1e-5)
    assert found.dtype == torch.float32
    assert found.shape == (len(QUERIES), len(TEXTS))


def test_first_token_dot_product_and_prompts_are_read_from_the_folder(tmp_path: Path) -> None:
    settings = {"similarity_fn_name": "dot", "prompts": {"query": "query: ", "document": "passage: ", "other": "x"}}
    folder = save_encoder(
        tmp_path / "e", modules=("Transformer", "Pooling"), pooling="pooling_mode_cls_token", settings=settings
    )
    encoder = load_encoder(folder)
    assert (encoder.pooling, encoder.unit_norm, encoder.most_tokens) == ("cls", False, 24)
    asked = hidden_states(folder, "query: Paris is large", 24)[0]
    ranked = hidden_states(folder, "passage: A river.", 24)[0]
    found = EmbeddingRetriever(pool(["A river."]), encoder).scores([query("Paris is", "large")])
    torch.testing.assert_close(found[0, 0], asked @ ranked, rtol=1e-4, atol=1e-4)


def test_folder_without_modules_gives_normalized_means(encoder_folder: Path, tmp_path: Path) -> None:
    folder = save_encoder(tmp_path / "e")
    (folder / "modules.json").unlink()
    (folder / "sentence_bert_config.json").unlink()
    encoder = load_encoder(folder)
    assert (encoder.pooling, encoder.unit_norm, encoder.most_tokens) == ("mean", True, 48)
    torch.testing.assert_close(encoder.encode(["Paris"]), load_encoder(encoder_folder).encode(["Paris"]))


def test_text_without_token_gets_zeros(tmp_path: Path) -> None:
    encoder = load_encoder(save_encoder(tmp_path / "e", special_tokens="plain"))
    assert not encoder.encode(["", ""]).any()
    assert not encoder.encode(["Paris", ""])[1].any()


def test_every_baseline_is_a_retriever(encoder_folder: Path) -> None:
    methods: list[Retriever] = [
        BM25Retriever(pool()),
        EmbeddingRetriever(pool(), load_encoder(encoder_folder)),
        GoldRetriever(pool(), {}),
        RandomRetriever(pool()),
    ]
    assert all(isinstance(method, Retriever) for method in methods)
    assert [method.name for method in methods] == ["BM25", "embeddings", "gold", "random"]


@pytest.mark.parametrize("build", [BM25Retriever, RandomRetriever])
def test_scores_of_a_query_do_not_depend_on_the_others(build: Callable[[Pool], Retriever]) -> None:
    method = build(pool())
    assert torch.equal(torch.cat([method.scores([each]) for each in QUERIES]), method.scores(QUERIES))


def _write(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


def _without_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.layer.1.output.dense.bias"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _with_nan(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["embeddings.LayerNorm.bias"][3] = math.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _pickle_alone(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


_POOLING = "1_Pooling/config.json"
_SETTINGS = "config_sentence_transformers.json"

BAD_FOLDERS: list[tuple[Callable[[Path], object], str]] = [
    (_write("modules.json", "{"), "/modules.json: cannot be read (Expecting property name"),
    (
        _write("modules.json", '{"a": 1}'),
        "/modules.json: expected Transformer, Pooling and optionally Normalize, found no list of",
    ),
    (
        _write("modules.json", "[]"),
        "/modules.json: expected Transformer, Pooling and optionally Normalize, found no module",
    ),
    (
        _write("modules.json", json.dumps([{"type": f"x.{kind}"} for kind in ("Transformer", "Pooling", "Dense")])),
        "/modules.json: expected Transformer, Pooling and optionally Normalize, found Transformer, Pooling, Dense",
    ),
    (
        _write("modules.json", json.dumps([{"type": "Transformer", "path": ""}, {"type": "Pooling", "path": "../x"}])),
        "/modules.json: a module lies outside the folder (../x); expected it inside",
    ),
    (
        _write(_POOLING, '{"pooling_mode_max_tokens": true}'),
        f"/{_POOLING}: expected either pooling_mode_mean_tokens or pooling_mode_cls_token, prompts included, found "
        "pooling_mode_max_tokens",
    ),
    (
        _write(_POOLING, "{}"),
        f"/{_POOLING}: expected either pooling_mode_mean_tokens or pooling_mode_cls_token, prompts included, "
        "found no mode",
    ),
    (_write(_POOLING, "[]"), f"/{_POOLING}: expected the Pooling module's configuration as a JSON object"),
    (lambda folder: (folder / _POOLING).unlink(), f"/{_POOLING}: cannot be read ([Errno 2] No such file"),
    (
        _write(_SETTINGS, '{"similarity_fn_name": "euclidean"}'),
        ": expected similarity cosine or dot, found euclidean",
    ),
    (_write(_SETTINGS, '{"prompts": {"query": 1}}'), ": expected a string as the prompt for query, found int"),
    (_write(_SETTINGS, "[1]"), f"/{_SETTINGS}: expected a JSON object, found another value; "),
    (lambda folder: (folder / "config.json").unlink(), ": cannot be loaded as an embedding model ("),
    (_pickle_alone, ": cannot be loaded as an embedding model ("),
    (_without_weights, ": its weights lack 1 parameters of BertModel, first encoder.layer.1.output.dense.bias; "),
    (_with_nan, ": expected finite vectors, found NaN or infinity; "),
]


@pytest.mark.parametrize(("spoil", "message"), BAD_FOLDERS, ids=[str(n) for n in range(len(BAD_FOLDERS))])
def test_bad_model_folder_is_one_line_that_names_it(
    spoil: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    folder = save_encoder(tmp_path / "e")
    spoil(folder)
    assert raised(lambda: load_encoder(folder), ModelError).startswith(f"{folder}{message}")


def test_missing_folder_and_device_are_one_line(encoder_folder: Path, tmp_path: Path) -> None:
    expected = f"{tmp_path / 'no'}: no such folder; expected the folder of a sentence-embedding model"
    assert raised(lambda: load_encoder(tmp_path / "no"), ModelError) == expected
    assert raised(lambda: load_encoder(encoder_folder, device="abacus"), OptionError).startswith(
        "`device`: expected auto, cpu or an available cuda or mps device, found 'abacus' ("
    )


def test_query_with_half_a_surrogate_pair_is_one_line_that_names_it(encoder_folder: Path) -> None:
    method = EmbeddingRetriever(pool(), load_encoder(encoder_folder))
    message = raised(lambda: method.scores([query("Paris is", "\ud800", "q7")]), CorpusError)
    assert message.startswith("query q7: the text holds half a surrogate pair (U+D800 at character 8)")
