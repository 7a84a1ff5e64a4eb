"""What is asked is exactly what the model read or said: tokens, probabilities, white space, special tokens."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import trackstar
from tiny_models import BOS, SENTENCES, SpecialTokens, tiny_model, tiny_tokenizer
from trackstar.attribution.answering import answer_queries
from trackstar.corpus import Query, open_corpus, read_queries, tokenize_query
from trackstar.corpus.queries import query_with_texts
from trackstar.corpus.token_spans import token_spans
from trackstar.corpus.tokenization import tokenize_examples
from trackstar.errors import CorpusError, OptionError
from trackstar.indexing.build import build_index
from trackstar.model.generation import GeneratedToken, Generation, generate, generate_samples
from trackstar.model.generation_settings import GenerationSettings
from trackstar.model.language_model import LanguageModel, wrap_model

SETTINGS: dict[str, Any] = {"side": 4, "codec": "float32", "second_moment": "none", "progress": False}
TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


def tiny(architecture: str = "llama", special: SpecialTokens = "bos") -> LanguageModel:
    return wrap_model(tiny_model(architecture), tiny_tokenizer(special), layer_blocks=2)


def probability(model: LanguageModel, token_ids: tuple[int, ...], first: int) -> float:
    """Product of the probabilities of the tokens from `first` on, by one plain forward pass."""
    with torch.no_grad():
        logits = model.module(input_ids=torch.tensor([token_ids])).logits[0].double()
    steps = [logits[place - 1].log_softmax(0)[token_ids[place]] for place in range(first, len(token_ids))]
    return math.exp(float(sum(steps)))


def explained(model: LanguageModel, query: Query, tmp_path: Path) -> float:
    """P of what is explained, as results give it."""
    index = build_index(model, list(SENTENCES), tmp_path / "index", **SETTINGS)
    (result,) = answer_queries(index, [query], model=model, k=2, progress=False).results
    return result.probability


@pytest.mark.parametrize("special", ["plain", "bos", "bos_eos"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_the_probability_of_what_is_explained_is_that_of_what_was_generated(
    architecture: str, special: SpecialTokens, tmp_path: Path
) -> None:
    """Sampled hot, so that bytes of characters, line breaks, spaces and special tokens come."""
    model = tiny(architecture, special)
    settings = GenerationSettings(max_new_tokens=24, temperature=3.0, stop="end")
    generations = generate_samples(model, "The capital of Fr", 6, settings)
    assert len({generation.token_ids for generation in generations}) > 1
    for generation in generations:
        query = generation.query("q")
        example = tokenize_query(query, model.tokenizer, window_tokens=64)
        assert tuple(example.token_ids.tolist()) == generation.token_ids
        assert example.target_mask.sum() == len(generation.tokens)
        expected = probability(model, generation.token_ids, len(generation.prompt_ids))
        assert generation.probability == pytest.approx(expected, rel=1e-3)
        assert query.prompt + query.completion == generation.prompt + generation.text
    longest = max(generations, key=lambda generation: len(generation.tokens))
    found = explained(model, longest.query("q"), tmp_path)
    assert math.log(found) == pytest.approx(math.log(longest.probability), rel=1e-4)


def said(model: LanguageModel, prompt: str, *texts: str) -> Generation:
    """A generation of the tokens of these texts, each tokenized alone, as no tokenizer would join them."""
    prompt_ids = tuple(model.tokenizer(prompt)["input_ids"])
    tokens: list[GeneratedToken] = []
    text = ""
    for part in texts:
        ids = model.tokenizer(part, add_special_tokens=False)["input_ids"]
        start, stop = len(text), len(text) + len(part)
        tokens += [GeneratedToken(token_id=token, start=start, stop=stop, probability=0.5) for token in ids]
        text += part
    return Generation(prompt=prompt, text=text, prompt_ids=prompt_ids, tokens=tuple(tokens))


@pytest.mark.parametrize(
    "texts", [(" ", " Paris", " "), ("\n", "\n", "Paris"), ("P", "a", "r", "i", "s"), ("</s>", "<s>", "Paris"), ("\t",)]
)
def test_white_space_line_breaks_and_special_tokens_are_asked_as_they_were_said(
    texts: tuple[str, ...], tmp_path: Path
) -> None:
    model = tiny()
    generation = said(model, "The capital of France is", *texts)
    expected = probability(model, generation.token_ids, len(generation.prompt_ids))
    found = explained(model, generation.query("q"), tmp_path)
    assert math.log(found) == pytest.approx(math.log(expected), rel=1e-5)


def test_any_run_of_generated_tokens_can_be_asked() -> None:
    model = tiny()
    generation = generate(model, "Gold is", GenerationSettings(max_new_tokens=8, stop="end"))
    count = len(generation.tokens)
    assert count > 3
    query = generation.query("q", first=2, last=3)
    assert query.token_ids == generation.token_ids[: len(generation.prompt_ids) + 4]
    assert query.target_mask is not None
    assert sum(query.target_mask) == 2
    assert query.prompt + query.completion == generation.prompt + generation.text[: generation.tokens[3].stop]
    with pytest.raises(OptionError, match=f"expected two of the {count} generated tokens"):
        generation.query("q", first=3, last=2)


def test_results_of_generated_answers_are_queries_of_the_same_tokens(tmp_path: Path) -> None:
    model = tiny()
    index = build_index(model, list(SENTENCES), tmp_path / "index", **SETTINGS)
    generation = generate(model, "Gold is", GenerationSettings(max_new_tokens=5, stop="end"))
    queries = [generation.query("said"), Query(query_id="none", prompt="Jap", completion="anese", join="none")]
    report = answer_queries(index, queries, model=model, k=2, progress=False)
    trackstar.write_results(report, tmp_path / "r.jsonl")
    again = read_queries(tmp_path / "r.jsonl")
    assert [(q.query_id, q.prompt, q.completion, q.token_ids, q.target_mask) for q in again] == [
        (q.query_id, q.prompt, q.completion, q.token_ids, q.target_mask) for q in queries
    ]
    second = answer_queries(index, again, model=model, k=2, progress=False)
    assert [result.loss for result in second.results] == [result.loss for result in report.results]


def test_queries_of_tokens_without_texts_get_the_texts_of_their_tokens(tmp_path: Path) -> None:
    model = tiny()
    token_ids = model.tokenizer("Gold is an element")["input_ids"]
    labels = [-100] * (len(token_ids) - 1) + token_ids[-1:]
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"input_ids": token_ids, "labels": labels}) + "\n")
    (query,) = read_queries(path)
    texts = query_with_texts(query, model.tokenizer)
    assert texts.prompt + texts.completion == "Gold is an element"
    assert tokenize_query(query, model.tokenizer, window_tokens=64).text == "Gold is an element"


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ({"input_ids": [0, 5], "labels": [5]}, "labels has 1 entries, input_ids 2"),
        (
            {"input_ids": [0, 5], "labels": [-100, 6]},
            r"labels\[1\] is 6; expected 5, the token of input_ids",
        ),
        ({"input_ids": [0, 5]}, "no labels; expected as many as input_ids"),
        ({"input_ids": [0, "a"], "labels": [0, 1]}, r"input_ids\[1\] is a string; expected a whole number"),
        ({"input_ids": [0, 5], "labels": [-100, -100]}, "has no token; expected at least one target"),
        ({"input_ids": [0, 5], "labels": [0, 5]}, "first token is a target, which has no context"),
        ({"input_ids": [0, 2**31], "labels": [-100, 2**31]}, "expected a whole number of 32 bits"),
        ({"input_ids": [0, -1], "labels": [-100, -1]}, "expected ids from 0 to"),
        ({"prompt": "a", "completion": "b", "separator": "\n"}, '"separator" is'),
    ],
)
def test_lines_of_tokens_that_cannot_be_asked_are_refused(line: dict[str, Any], found: str, tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(CorpusError, match=found) as error:
        read_queries(path)
    assert str(error.value).startswith(f"{path}:1")


def test_a_query_of_tokens_that_is_too_long_loses_the_tokens_after_the_first() -> None:
    tokenizer = tiny_tokenizer("bos")
    token_ids = tuple(tokenizer(" ".join(SENTENCES))["input_ids"])  # pyright: ignore[reportArgumentType]
    mask = (False,) * (len(token_ids) - 2) + (True, True)
    query = Query(query_id="q", prompt="", completion="", token_ids=token_ids, target_mask=mask)
    example = tokenize_query(query, tokenizer, window_tokens=10)
    assert example.token_ids.tolist() == [token_ids[0], *token_ids[-9:]]
    assert example.target_mask.tolist() == [False] * 8 + [True, True]
    assert len(token_spans(example, tokenizer)) == 10
    with pytest.raises(CorpusError, match="and 9 fit the window"):
        tokenize_query(
            dataclasses.replace(query, target_mask=(False, *(True,) * (len(mask) - 1))), tokenizer, window_tokens=10
        )


def test_samples_depend_on_the_seed_alone() -> None:
    model = tiny()
    settings = GenerationSettings(max_new_tokens=8, temperature=2.0, stop="end", sampling_seed=5)
    few, many = (generate_samples(model, "Gold is", count, settings) for count in (2, 5))
    assert [one.token_ids for one in few] == [one.token_ids for one in many[:2]]
    with mock.patch("trackstar.model.generation._AT_ONCE", 2):
        parted = generate_samples(model, "Gold is", 5, settings)
    assert [one.token_ids for one in parted] == [one.token_ids for one in many]
    other = generate_samples(model, "Gold is", 5, dataclasses.replace(settings, sampling_seed=6))
    assert [one.token_ids for one in other] != [one.token_ids for one in many]
    narrow = dataclasses.replace(settings, top_p=1e-6)
    greedy = generate(model, "Gold is", GenerationSettings(max_new_tokens=8, stop="end"))
    assert generate(model, "Gold is", narrow).token_ids == greedy.token_ids


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"temperature": -1.0}, "`temperature`"),
        ({"temperature": math.nan}, "`temperature`"),
        ({"top_p": 0.0}, "`top_p`"),
        ({"max_new_tokens": 0}, "`max_new_tokens`"),
        ({"sampling_seed": -1}, "`sampling_seed`"),
    ],
)
def test_settings_out_of_range_are_refused(fields: dict[str, Any], found: str) -> None:
    with pytest.raises(OptionError, match=found):
        GenerationSettings(**fields)


def test_a_chat_prompt_is_asked_in_the_template() -> None:
    import copy

    model = tiny()
    settings = GenerationSettings(max_new_tokens=4, chat=True, stop="end")
    with pytest.raises(OptionError, match="`chat`: expected a tokenizer with a chat template"):
        generate(model, "Where?", settings)
    tokenizer = copy.deepcopy(tiny_tokenizer("bos"))
    tokenizer.chat_template = TEMPLATE
    model = dataclasses.replace(model, tokenizer=tokenizer)
    generation = generate(model, "Where?", settings)
    rendered = "<s>user: Where?</s><s>assistant: "
    assert generation.prompt == rendered
    assert list(generation.prompt_ids) == tokenizer(rendered, add_special_tokens=False)["input_ids"]


def test_a_text_that_spells_out_the_beginning_of_text_has_it_once(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer("bos_eos")
    plain = [f"{BOS}{text}</s>" if number % 2 else text for number, text in enumerate(SENTENCES)]
    spelled = next(
        iter(zip(tokenize_examples(open_corpus(plain).examples(), tokenizer, window_tokens=64), strict=False))
    )
    assert spelled[0][0].token_ids.tolist().count(0) == 1
    for text, windows in zip(
        SENTENCES, tokenize_examples(open_corpus(plain).examples(), tokenizer, window_tokens=12), strict=True
    ):
        ids = [token for window in windows for token in window.token_ids.tolist()]
        assert ids.count(1) == 1
        assert [window.token_ids[0] for window in windows] == [0] * len(windows)
        whole = tokenizer(text)["input_ids"]
        assert windows[0].token_ids[:5].tolist() == whole[:5]  # pyright: ignore[reportIndexIssue]
    assert list(open_corpus(plain, tokenizer=tokenizer).survey().notes("it")) == [
        f"it: the texts of {len(SENTENCES) // 2} of {len(SENTENCES)} records spell out <s>, which the tokenizer adds; "
        "each has it once"
    ]
    assert list(open_corpus(plain, tokenizer=tiny_tokenizer("plain")).survey().notes("it")) == []
    model = tiny(special="bos")
    index = build_index(model, list(SENTENCES), tmp_path / "index", **SETTINGS)
    queries = [
        Query(query_id=name, prompt=f"{spell}The capital of France is", completion="Paris")
        for name, spell in (("plain", ""), ("spelled", BOS))
    ]
    report = answer_queries(index, queries, model=model, k=2, progress=False)
    assert report.results[0].loss == report.results[1].loss
    assert report.notes[-1] == "1 of 2 queries spell out <s>, which the tokenizer adds; each has it once"
    assert generate(model, f"{BOS}Gold is").prompt_ids == generate(model, "Gold is").prompt_ids


@pytest.mark.parametrize("special", ["plain", "bos", "bos_eos"])
def test_a_completion_that_spells_out_the_end_of_the_text_keeps_it_as_a_target(special: SpecialTokens) -> None:
    tokenizer = tiny_tokenizer(special)
    with_end, without = (
        tokenize_query(Query(query_id="q", prompt="Gold is", completion=text), tokenizer, window_tokens=64)
        for text in ("Au</s>", "Au")
    )
    assert with_end.token_ids.tolist() == [*without.token_ids.tolist(), 1]
    assert with_end.target_mask.tolist() == [*without.target_mask.tolist(), True]


def test_the_stop_at_a_line_keeps_whole_tokens() -> None:
    model = tiny()
    end = generate_samples(model, "Gold is", 8, GenerationSettings(max_new_tokens=30, temperature=4.0, stop="end"))
    line = generate_samples(model, "Gold is", 8, GenerationSettings(max_new_tokens=30, temperature=4.0, stop="line"))
    assert [one.token_ids for one in line] != [one.token_ids for one in end]
    for whole, cut in zip(end, line, strict=True):
        assert whole.token_ids[: len(cut.token_ids)] == cut.token_ids
        if cut.token_ids != whole.token_ids:
            rest = whole.text[len(cut.text) :]
            assert "\n" in cut.text.strip("\n") or rest.lstrip(" ").startswith(("\n", "\r"))
