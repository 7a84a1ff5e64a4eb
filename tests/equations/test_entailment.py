"""Entailment by examples: sentences, windows, their maximum, and the probability of a classifier."""

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from trackstar.errors import CorpusError, ModelError, OptionError, TrackstarError
from trackstar.evaluation.entailment import (
    EntailmentScorer,
    entailment_scores,
    entails,
    load_entailment_classifier,
    sentences,
    windows,
)


def raised(run: Callable[[], object], kind: type[TrackstarError]) -> str:
    with pytest.raises(kind) as caught:
        run()
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ("One line\nanother line\n\n  third. Fourth ", ["One line", "another line", "third.", "Fourth"]),
        ('He said "No." Then he left. (It rained.) So?', ['He said "No."', "Then he left.", "(It rained.)", "So?"]),
        ("It cost 3.50 francs. 20 more...  Wait?! Yes", ["It cost 3.50 francs.", "20 more...", "Wait?!", "Yes"]),
        ("Dr. Who met J. S. Bach in St. Gallen. Then Prof. X came.", None),
        ("The U.S. Army, e.g. the 5th. It went.", ["The U.S. Army, e.g. the 5th.", "It went."]),
        ("He left (see No. 5) etc. and so on. it says", ["He left (see No. 5) etc. and so on. it says"]),
        ("“Come.” “Why?” she asked.", ["“Come.”", "“Why?” she asked."]),
        ("彼は来た。彼女も来た。", ["彼は来た。", "彼女も来た。"]),
        ("Plan B. Plan C", ["Plan B. Plan C"]),  # a capital letter counts as an initial
        ("... . Yes", ["...", ".", "Yes"]),
        ("", []),
        (" \n\t", []),
    ],
)
def test_sentences_are_split_by_the_rule(text: str, expected: list[str] | None) -> None:
    if expected is None:
        expected = ["Dr. Who met J. S. Bach in St. Gallen.", "Then Prof. X came."]
    assert sentences(text) == expected


def test_splitting_is_fast_for_any_text() -> None:
    start = time.perf_counter()
    for text in ("." * 300_000, '."' * 150_000, ". " * 150_000, ("A" * 9 + ". ") * 30_000, ". " + '"' * 300_000):
        assert "".join(sentences(text)).replace(" ", "") == text.replace(" ", "")
    assert time.perf_counter() - start < 10  # half a second; a quadratic algorithm takes hours


def test_windows_are_three_consecutive_sentences() -> None:
    assert windows("A a. B b. C c. D d. E e.") == ["A a. B b. C c.", "B b. C c. D d.", "C c. D d. E e."]
    assert windows("A a. B b. C c.") == ["A a. B b. C c."]
    assert windows("A a.\nB b.") == ["A a. B b."]
    assert windows("A a. B b. C c.", size=1) == ["A a.", "B b.", "C c."]
    assert windows(" ") == []
    assert raised(lambda: windows("A", size=0), OptionError) == "`size`: expected 1 or more, found 0"


class WordShare:
    """Scores by the share of the premise's words that are the hypothesis; records its calls."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    def scores(self, premises: Sequence[str], hypotheses: Sequence[str]) -> Float[Tensor, "pairs"]:
        pairs = list(zip(premises, hypotheses, strict=True))
        self.asked += pairs
        shares = [premise.split().count(hypothesis) / len(premise.split()) for premise, hypothesis in pairs]
        return torch.tensor(shares, dtype=torch.float32)


def test_example_scores_the_maximum_over_its_windows() -> None:
    scorer = WordShare()
    assert isinstance(scorer, EntailmentScorer)
    texts = ["x x. B b. C c. D d.", "", "y x", "A. b"]
    found = entailment_scores(texts, ["x", "x", "x", "x"], scorer)
    torch.testing.assert_close(found, torch.tensor([1 / 6, 0.0, 0.5, 0.0]))  # "x x." holds the word x once
    assert scorer.asked == [("x x. B b. C c.", "x"), ("B b. C c. D d.", "x"), ("y x", "x"), ("A. b", "x")]
    assert entails(found).tolist() == [False] * 4  # above the threshold of ½, not at it
    assert entails(found, threshold=0.4).tolist() == [False, False, True, False]


def test_windows_belong_to_their_examples_across_batches() -> None:
    texts = [f"w{n} a. B w{n + 1}. C c. D w{n + 2} w{n + 2} E." for n in range(600)]
    found = entailment_scores(texts, [f"w{n + 2}" for n in range(600)], WordShare(), window_sentences=1, progress=False)
    torch.testing.assert_close(found, torch.full((600,), 0.5))
    assert entailment_scores([], [], WordShare()).shape == (0,)
    message = raised(lambda: entailment_scores(["a"], [], WordShare()), OptionError)
    assert message == "`hypotheses`: expected one for each of 1 texts, found 0"


# A classifier


LABELS = {0: "contradiction", 1: "Entailment", 2: "neutral"}


def save_classifier(folder: Path) -> Path:
    """A tiny random BERT with a classification head over three labels."""
    from transformers import BertConfig, BertForSequenceClassification

    from tiny_models import VOCABULARY, tiny_tokenizer

    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=40, pad_token_id=2, id2label=LABELS,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BertForSequenceClassification(config)
        for parameter in model.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    tiny_tokenizer("bos_eos").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def classifier_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_classifier(tmp_path_factory.mktemp("classifier"))


PREMISES = ["Paris is large.", "A", "Berlin is the capital of Germany. " * 6, "Gold.", "The river Danube flows."] * 14
HYPOTHESES = ["Paris", "The capital of France is Paris", "A river", "Gold is an element", "x"] * 14


def test_classifier_gives_the_probability_of_its_entailment_label(classifier_folder: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    scorer = load_entailment_classifier(classifier_folder)
    assert isinstance(scorer, EntailmentScorer)
    found = scorer.scores(PREMISES, HYPOTHESES)
    module = AutoModelForSequenceClassification.from_pretrained(classifier_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(classifier_folder)
    for place in range(5):
        inputs = tokenizer(PREMISES[place], HYPOTHESES[place], truncation=True, max_length=40, return_tensors="pt")
        with torch.no_grad():
            expected = module(**inputs).logits[0].double().exp()
        torch.testing.assert_close(found[place].double(), expected[1] / expected.sum(), rtol=1e-4, atol=1e-5)


def test_classifier_does_not_depend_on_batch_order_or_padding(classifier_folder: Path) -> None:
    scorer = load_entailment_classifier(classifier_folder)
    found = scorer.scores(PREMISES, HYPOTHESES)
    alone = [scorer.scores([premise], [hypothesis]) for premise, hypothesis in zip(PREMISES, HYPOTHESES, strict=True)]
    torch.testing.assert_close(found, torch.cat(alone), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scorer.scores(PREMISES[::-1], HYPOTHESES[::-1]).flip(0), found, rtol=1e-4, atol=1e-5)
    assert torch.equal(scorer.scores(PREMISES, HYPOTHESES), found)
    assert scorer.scores([], []).shape == (0,)
    assert found.std() > 0.001


def test_classifier_judges_examples(classifier_folder: Path) -> None:
    scorer = load_entailment_classifier(classifier_folder)
    text = "Paris is large. It is old. The Seine flows there. France is near."
    found = entailment_scores([text], ["Paris"], scorer)
    expected = scorer.scores(windows(text), ["Paris"] * 2).max()
    torch.testing.assert_close(found[0], expected)


def _without_head(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["classifier.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _with_infinity(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["classifier.bias"][0] = math.inf
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _labelled(*labels: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        config["id2label"] = {str(number): label for number, label in enumerate(labels)}
        config["label2id"] = {label: number for number, label in enumerate(labels)}
        (folder / "config.json").write_text(json.dumps(config))

    return change


def _pickle_alone(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


BAD_FOLDERS: list[tuple[Callable[[Path], object], str]] = [
    (
        _labelled("LABEL_0", "LABEL_1", "LABEL_2"),
        ": expected one label named entailment (config.id2label), found LABEL_0, LABEL_1, LABEL_2",
    ),
    (
        _labelled("not_entailment", "yes", "no"),
        ": expected one label named entailment (config.id2label), found not_entailment, yes, no",
    ),
    (_without_head, ": its weights lack 1 parameters of BertForSequenceClassification, first classifier.weight; "),
    (_with_infinity, ": expected finite scores, found NaN or infinity; "),
    (_pickle_alone, ": cannot be loaded as a sequence classification model ("),
    (lambda folder: (folder / "config.json").unlink(), ": cannot be loaded as a sequence classification model ("),
]


@pytest.mark.parametrize(("spoil", "message"), BAD_FOLDERS, ids=[str(n) for n in range(len(BAD_FOLDERS))])
def test_bad_classifier_is_one_line_that_names_it(
    spoil: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    folder = save_classifier(tmp_path / "c")
    spoil(folder)
    assert raised(lambda: load_entailment_classifier(folder), ModelError).startswith(f"{folder}{message}")


def test_bad_device_and_bad_text_are_one_line(classifier_folder: Path) -> None:
    message = raised(lambda: load_entailment_classifier(classifier_folder, device="abacus"), OptionError)
    assert message.startswith("`device`: expected auto, cpu or an available cuda or mps device, found 'abacus' (")
    scorer = load_entailment_classifier(classifier_folder)
    message = raised(lambda: scorer.scores(["fine", "\ud800"], ["a", "b"]), CorpusError)
    assert message.startswith("premise 1 holds half a surrogate pair (U+D800 at character 0)")
