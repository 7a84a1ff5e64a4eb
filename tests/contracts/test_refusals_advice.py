"""What a refusal advises works: each row makes the mistake, and then does to the letter what its message says."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tiny_models import save_tiny_model, tiny_model, tiny_tokenizer
from trackstar import build_index, load_model, open_corpus, read_queries, wrap_model
from trackstar.corpus import Query, tokenize_query
from trackstar.errors import TrackstarError
from trackstar.evaluation.made_questions import made_questions
from trackstar.model.generation import generate
from trackstar.model.generation_settings import GenerationSettings
from trackstar.model.language_model import LanguageModel

TEMPLATE = (
    "{% for message in messages %}{{ message.role + ': ' + message.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
CHAT = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "There."}]
SETTINGS: Mapping[str, Any] = {"side": 2, "codec": "float32", "batch_tokens": 128, "progress": False}


class World:
    """A folder, and a tiny model whose tokenizer has no chat template."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = save_tiny_model(folder / "model")
        (folder / "chat.jinja").write_text(TEMPLATE)

    @property
    def template(self) -> Path:
        return self.folder / "chat.jinja"

    @property
    def model(self) -> LanguageModel:
        return load_model(self.path)

    def file(self, name: str, *records: object) -> Path:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(f"{one if isinstance(one, str) else json.dumps(one)}\n" for one in records))
        return path

    def index(self, data: object, **options: Any) -> None:
        out = self.folder / f"index-{len(list(self.folder.iterdir()))}"
        build_index(self.model, data, out, **{**SETTINGS, **options})  # pyright: ignore[reportArgumentType]

    def ask(self, query: Query, special: Any = "bos") -> None:
        tokenize_query(query, tiny_tokenizer(special), window_tokens=64)

    def say(self, prompt: str | Query, **settings: Any) -> None:
        generate(self.model, prompt, GenerationSettings(**{"max_new_tokens": 2, **settings}))


class Row(NamedTuple):
    """A mistake, the message's advice, and the ways that it names."""

    name: str
    mistake: Callable[[World], object]
    advice: str
    ways: tuple[Callable[[World], object], ...]


def _queries(world: World, *records: object, **options: Any) -> list[Query]:
    return read_queries(world.file("queries.jsonl", *records), **options)


def _tokens(ids: tuple[int, ...], mask: tuple[bool, ...]) -> Query:
    return Query(query_id="q", token_ids=ids, target_mask=mask)


def _corpus(world: World, *records: object, **options: Any) -> object:
    tokenizer = tiny_tokenizer("bos")
    return list(open_corpus(world.file("data.jsonl", *records), tokenizer=tokenizer, **options).examples())


def _pieces(world: World, pattern: str) -> object:
    world.file("mixed/a.jsonl", {"text": "one"})
    world.file("mixed/b.txt", "two")
    return open_corpus(str(world.folder / "mixed" / pattern))


def _splits(world: World, split: str) -> object:
    from datasets import Dataset, DatasetDict

    DatasetDict({"train": Dataset.from_dict({"text": ["one"]})}).save_to_disk(world.folder / "saved")
    return open_corpus(str(world.folder / f"saved{split}"))


def _renamed(world: World, name: str) -> object:
    return open_corpus(world.file(name, {"text": "one"}))


def _changing(world: World, data: Callable[[], object]) -> None:
    world.index(data())


class _Counting:
    """Iterates other records each time."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> Any:
        self.count += 1
        return iter([{"text": f"number {self.count}"}])


def _run_folder(world: World, name: str) -> object:
    shutil.copytree(world.path, world.folder / "run" / "checkpoint-5", dirs_exist_ok=True)
    return load_model(world.folder / "run" / name)


def _patterns(attention: str, mlp: str) -> object:
    return wrap_model(tiny_model("llama"), tiny_tokenizer("bos"), attention_pattern=attention, mlp_pattern=mlp)


def _packed(world: World, *, end: bool, pack: int | None = 8) -> object:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(world.path)
    tokenizer.eos_token = "</s>" if end else None
    corpus = open_corpus(world.file("data.jsonl", {"text": "one two three four five"}))
    return list(corpus.for_tokenizer(tokenizer, pack=pack).examples())


CONVERSATION = {"messages": CHAT}
QUESTION = {"messages": CHAT[:1]}
ASKED = {"prompt": "The capital of France is", "completion": "Paris"}
PIQA = {"goal": "To keep bread soft,", "sol1": "store it in the sun.", "sol2": "store it in a box."}
ATTENTION, MLP = r"model\.layers\.(\d+)\.self_attn\.._proj", r"model\.layers\.(\d+)\.mlp\..*_proj"

ROWS = [
    # Queries
    Row(
        "no context",
        lambda w: w.ask(Query(query_id="q", completion="Paris"), "plain"),
        "give a prompt",
        (lambda w: w.ask(Query(query_id="q", prompt="The", completion="Paris"), "plain"),),
    ),
    Row(
        "a target without context",
        lambda w: w.ask(_tokens((5, 6), (True, True))),
        "put a token before it, or make it no target",
        (lambda w: w.ask(_tokens((4, 5, 6), (False, True, True))), lambda w: w.ask(_tokens((5, 6), (False, True)))),
    ),
    Row(
        "a completion longer than the window",
        lambda w: w.ask(Query(query_id="q", prompt="The", completion="Paris and Rome " * 40)),
        "shorten it",
        (lambda w: w.ask(Query(query_id="q", prompt="The", completion="Paris and Rome")),),
    ),
    Row(
        "a question without an answer",
        lambda w: _queries(w, QUESTION),
        "expected one, whose probability is to be explained; add it",
        (lambda w: _queries(w, CONVERSATION),),
    ),
    Row(
        "a name twice",
        lambda w: _queries(w, {"id": 1, **CONVERSATION}, {"id": 1, **CONVERSATION}),
        "name each once",
        (lambda w: _queries(w, {"id": 1, **CONVERSATION}, {"id": 2, **CONVERSATION}),),
    ),
    Row(
        "queries as plain text",
        lambda w: read_queries(w.file("queries.txt", "The capital is")),
        "queries are records with a prompt; write JSON lines",
        (lambda w: _queries(w, {"prompt": "The capital is", "completion": "Paris"}),),
    ),
    Row(
        "tokens without labels",
        lambda w: _queries(w, {"input_ids": [4, 5]}),
        "expected as many as input_ids, each the token or, for a token that is no target, -100",
        (lambda w: _queries(w, {"input_ids": [4, 5], "labels": [-100, 5]}),),
    ),
    Row(
        "--chat without a template",
        lambda w: w.say("Where?", chat=True),
        "leave it out, or pass a file with the template of the training run as `chat_template`",
        (
            lambda w: w.say("Where?"),
            lambda w: w.say(Query(query_id="q", prompt="Where?", chat_template=w.template.read_text()), chat=True),
        ),
    ),
    Row(
        "no room for an answer",
        lambda w: w.say("The capital of France", max_new_tokens=64),
        "shorten the prompt, or pass a smaller `max_new_tokens`",
        (lambda w: w.say("The capital of France", max_new_tokens=2),),
    ),
    # Kinds of queries
    Row(
        "a kind that is none",
        lambda w: _queries(w, {**ASKED, "kind": "riddle"}),
        "expected one of fact, choice, generation, open; if it says something else, give it another name",
        (lambda w: _queries(w, {**ASKED, "kind": "open"}), lambda w: _queries(w, {**ASKED, "sort": "riddle"})),
    ),
    Row(
        "a choice of one",
        lambda w: _queries(w, {**ASKED, "kind": "choice"}),
        "expected the completion that is compared with its own, or an array of several; add it",
        (
            lambda w: _queries(w, {**ASKED, "kind": "choice", "alternative": "Rome"}),
            lambda w: _queries(w, {**ASKED, "kind": "choice", "alternative": ["Rome", "Oslo"]}),
        ),
    ),
    Row(
        "an alternative to a story",
        lambda w: _queries(w, {**ASKED, "kind": "open", "alternative": "Rome"}),
        "expected it for a choice only; leave one of the two out",
        (lambda w: _queries(w, {**ASKED, "kind": "open"}), lambda w: _queries(w, {**ASKED, "alternative": "Rome"})),
    ),
    Row(
        "PIQA without its labels",
        lambda w: _queries(w, PIQA),
        "put the labels there, as PIQA's authors do",
        (lambda w: (w.file("queries-labels.lst", "1"), _queries(w, PIQA)), lambda w: _queries(w, {**PIQA, "label": 1})),
    ),
    Row(
        "too many sums",
        lambda _: made_questions("arithmetic", 10_000),
        "expected at most 9,801",
        (lambda _: made_questions("arithmetic", 9_801),),
    ),
    # Records
    Row(
        "no template",
        lambda w: _corpus(w, CONVERSATION),
        "pass a file with the template of the training run as `chat_template`",
        (lambda w: _corpus(w, CONVERSATION, chat_template=w.template),),
    ),
    Row(
        "a template for texts",
        lambda w: _corpus(w, {"text": "one"}, chat_template=w.template),
        "leave it out, or choose another `format`",
        (
            lambda w: _corpus(w, {"text": "one"}),
            lambda w: _corpus(w, {"text": "one", **CONVERSATION}, format="messages", chat_template=w.template),
        ),
    ),
    Row(
        "a conversation without an answer",
        lambda w: _corpus(w, CONVERSATION, QUESTION, chat_template=w.template),
        'leave the record out, or pass `train_on="all"`',
        (
            lambda w: _corpus(w, CONVERSATION, chat_template=w.template),
            lambda w: _corpus(w, CONVERSATION, QUESTION, chat_template=w.template, train_on="all"),
        ),
    ),
    Row(
        "a role of another name",
        lambda w: _corpus(w, {"messages": [{"role": "king", "content": "x"}, CHAT[1]]}, chat_template=w.template),
        "expected one of system, developer, user, assistant, tool, function; rename it",
        (lambda w: _corpus(w, {"messages": [{"role": "user", "content": "x"}, CHAT[1]]}, chat_template=w.template),),
    ),
    Row(
        "targets that the form does not tell",
        lambda w: _corpus(w, {"text": "one"}, train_on="assistant"),
        "expected all for records of the format text, found assistant; leave it out, or choose another `format`",
        (
            lambda w: _corpus(w, {"text": "one"}),
            lambda w: _corpus(
                w, {"text": "one", **CONVERSATION}, format="messages", train_on="assistant", chat_template=w.template
            ),
        ),
    ),
    Row(
        "messages under another name",
        lambda w: _corpus(w, {"talk": CHAT}, format="messages", chat_template=w.template),
        "name the one with the messages with `text_field`",
        (lambda w: _corpus(w, {"talk": CHAT}, format="messages", text_field="talk", chat_template=w.template),),
    ),
    Row(
        "the text under another name",
        lambda w: _corpus(w, {"body": "one"}),
        "name the one to read with `text_field`",
        (lambda w: _corpus(w, {"body": "one"}, text_field="body"),),
    ),
    Row(
        "a prompt that is an array",
        lambda w: _corpus(w, {"prompt": "a", "completion": "b"}, {"prompt": ["Where?"], "completion": "There."}),
        "write a conversation as one field messages that ends with the answer",
        (lambda w: _corpus(w, CONVERSATION, chat_template=w.template),),
    ),
    Row(
        "labels and a mask",
        lambda w: _corpus(w, {"input_ids": [4, 5], "labels": [-100, 5], "loss_mask": [0, 1]}),
        "expected one of them; leave one out",
        (
            lambda w: _corpus(w, {"input_ids": [4, 5], "labels": [-100, 5]}),
            lambda w: _corpus(w, {"input_ids": [4, 5], "loss_mask": [0, 1]}),
        ),
    ),
    Row(
        "labels that are shifted",
        lambda w: _corpus(w, {"input_ids": [4, 5, 6], "labels": [5, 6, -100]}),
        "or -100 for no target; labels are not shifted",
        (lambda w: _corpus(w, {"input_ids": [4, 5, 6], "labels": [-100, 5, 6]}),),
    ),
    Row(
        "names in bare text",
        lambda w: open_corpus(w.file("data.txt", "one"), id_field="id"),
        "leave it out",
        (lambda w: open_corpus(w.file("data.txt", "one")),),
    ),
    Row(
        "a text without an end-of-text token to pack with",
        lambda w: _packed(w, end=False),
        "set its `eos_token`, or leave `pack` out",
        (lambda w: _packed(w, end=True), lambda w: _packed(w, end=False, pack=None)),
    ),
    Row(
        "a conversation without a tokenizer",
        lambda w: list(open_corpus(w.file("data.jsonl", CONVERSATION)).examples()),
        "pass the model's tokenizer",
        (lambda w: _corpus(w, CONVERSATION, chat_template=w.template),),
    ),
    # Files
    Row(
        "files of two kinds",
        lambda w: _pieces(w, ""),
        "select the files of one with a pattern such as *.jsonl",
        (lambda w: _pieces(w, "*.jsonl"),),
    ),
    Row(
        "a saved dataset of splits",
        lambda w: _splits(w, ""),
        "name one of them: ",
        (lambda w: _splits(w, "/train"),),
    ),
    Row(
        "an unknown ending",
        lambda w: _renamed(w, "data.json1"),
        "rename it",
        (lambda w: _renamed(w, "data.jsonl"),),
    ),
    Row(
        "records that change",
        lambda w: _changing(w, _Counting),
        "pass a list, or a function whose iterators give the same records each time",
        (
            lambda w: _changing(w, lambda: [{"text": "number 1"}]),
            lambda w: _changing(w, lambda: lambda: iter([{"text": "number 1"}])),
        ),
    ),
    # Models
    Row(
        "an adapter's gradients of a model without one",
        lambda w: load_model(w.path, parameters="adapter"),
        "pass the adapter's folder as `model`, or leave `parameters` out",
        (lambda w: load_model(w.path),),  # the other way: test_adapters.py
    ),
    Row(
        "a training run's folder",
        lambda w: _run_folder(w, ""),
        "expected one of its models, such as ",
        (lambda w: _run_folder(w, "checkpoint-5"),),
    ),
    Row(
        "a pattern without a group",
        lambda w: _patterns(r"model\.layers\.\d+\.self_attn\.._proj", MLP),
        "expected a first group that captures the layer's number, such as (\\d+)",
        (lambda w: _patterns(ATTENTION, MLP),),
    ),
    Row(
        "a matrix of two kinds",
        lambda w: _patterns(ATTENTION, r"model\.layers\.(\d+)\..*_proj"),
        "narrow either",
        (lambda w: _patterns(ATTENTION, MLP),),
    ),
]


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_what_a_refusal_advises_works(row: Row, tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]), pytest.raises(TrackstarError) as refused:
        row.mistake(World(tmp_path / "wrong"))
    assert row.advice in str(refused.value)
    for number, way in enumerate(row.ways):
        way(World(tmp_path / str(number)))
