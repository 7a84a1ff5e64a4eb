"""Queries of every form that a corpus's records have: the same tokens and targets as the record would have."""

import json
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_record_formats import CHAT, CHATML, UNMARKED, tokenizer_with, windows_of

from tiny_models import EOS, save_tiny_model
from trackstar import Attributor, add_examples, build_index, load_model
from trackstar.attribution.answering import answer_queries
from trackstar.attribution.writing import write_results
from trackstar.audit.checks import AtHand
from trackstar.audit.recomputation import check_audit
from trackstar.audit.writing import write_audit
from trackstar.cli.commands import trackstar
from trackstar.cli.framework import run
from trackstar.corpus import Query, prompt_of, query_with_texts, read_queries, tokenize_query
from trackstar.errors import CorpusError, ModelError, OptionError
from trackstar.model.generation import generate
from trackstar.model.generation_settings import GenerationSettings

SHAREGPT = [{"from": "human", "value": "The capital of France?"}, {"from": "gpt", "value": "Paris."}]
DIFFERS_LATER = "{{ messages | length }}" + UNMARKED
TOOLS = [{"type": "function", "function": {"name": "look_up"}}]


def written(folder: Path, *records: object, name: str = "q.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


def asked(record: dict[str, Any], tokenizer: Any, folder: Path, **options: Any) -> Any:
    (query,) = read_queries(written(folder, record), **options)
    return tokenize_query(query, tokenizer, window_tokens=400)


@pytest.mark.parametrize("template", [CHATML, UNMARKED])
@pytest.mark.parametrize(
    "record",
    [
        {"messages": CHAT},
        {"conversations": SHAREGPT},
        {"messages": CHAT[1:3], "system": "Answer."},
        {"messages": CHAT, "tools": TOOLS},
    ],
)
def test_a_conversation_is_asked_as_training_reads_it(record: dict[str, Any], template: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_with(template, "bos")
    (window,) = windows_of(record, tokenizer, train_on="completion")
    query = asked(record, tokenizer, tmp_path)
    count = len(query.token_ids)  # the query ends with its last target
    assert query.token_ids.tolist() == window.token_ids[:count].tolist()
    assert query.target_mask.tolist() == window.target_mask[:count].tolist()
    assert query.target_mask[-1]
    # What ends the turn is no target of a query, nor is it generated.
    assert tokenizer.decode(window.token_ids[count:][window.target_mask[count:]]).strip() == EOS


def test_white_space_of_an_answer_is_asked_too() -> None:
    for template, expected in ((CHATML, "x = 1\n\n"), (CHATML.replace("['content']", "['content'] | trim"), "x = 1")):
        chat = ({"role": "user", "content": "Code?"}, {"role": "assistant", "content": "x = 1\n\n"})
        query = query_with_texts(Query(query_id="q", messages=chat), tokenizer_with(template))
        assert query.completion == expected


def test_a_query_that_the_context_does_not_hold_is_noted(tmp_path: Path) -> None:
    model = load_model(save_tiny_model(tmp_path / "model"))
    index = build_index(
        model, [{"text": "The capital of France is Paris."}], tmp_path / "index", side=4, codec="float32",
        layer_blocks=1, progress=False,
    )  # fmt: skip
    short = Query(query_id="short", prompt="The capital of France is", completion="Paris")
    long = Query(query_id="long", prompt="The capital of France is " * 30, completion="Paris")
    note = "1 of 2 queries are longer than the model's context of 64 tokens; the beginning of each is not asked"
    assert note in answer_queries(index, [short, long], model=model, k=1, exact=True, progress=False).notes
    assert answer_queries(index, [short], model=model, k=1, exact=True, progress=False).notes == ()


def test_what_follows_the_last_answer_is_left_out(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(CHATML)
    longer = [*CHAT, {"role": "user", "content": "Of Spain?"}]
    queries = [asked({"messages": messages}, tokenizer, tmp_path) for messages in (CHAT, longer)]
    assert queries[0].text == queries[1].text
    assert queries[0].token_ids.tolist() == queries[1].token_ids.tolist()


def test_messages_may_be_divided_between_prompt_and_completion(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(CHATML)
    whole = asked({"messages": CHAT}, tokenizer, tmp_path)
    (as_record,) = windows_of({"messages": CHAT}, tokenizer, train_on="completion")
    for completion in (CHAT[-1:], CHAT[-1]["content"]):
        record = {"prompt": CHAT[:-1], "completion": completion, "source": "x"}
        (window,) = windows_of(record, tokenizer)
        assert window.token_ids.tolist() == as_record.token_ids.tolist()
        assert window.target_mask.tolist() == as_record.target_mask.tolist()
        assert window.metadata == '{"source":"x"}'
        query = asked(record, tokenizer, tmp_path)
        assert query.token_ids.tolist() == whole.token_ids.tolist()
        assert query.target_mask.tolist() == whole.target_mask.tolist()


def test_instructions_and_loss_masks_are_asked_as_training_reads_them(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(None, "bos")
    for record in (
        {"instruction": "Name the capital of {input}.", "input": "France {instruction}", "output": "Paris"},
        {"instruction": "Name a capital.", "output": "Paris"},
        {"input_ids": [0, 5, 6, 7], "loss_mask": [0, 0, 0, 1]},
        {"input_ids": [0, 5, 6, 7], "completion_mask": [0, 0, 1, 1], "assistant_masks": [0, 1, 0, 1]},
    ):
        (window,) = windows_of(record, tokenizer)
        query = asked(record, tokenizer, tmp_path)
        assert query.token_ids.tolist() == window.token_ids.tolist()
        assert query.target_mask.tolist() == window.target_mask.tolist()


def test_queries_are_read_from_every_container(tmp_path: Path) -> None:
    rows = [{"query_id": "a", "prompt": "x, y", "completion": "z"}, {"query_id": "b", "prompt": "u", "completion": "v"}]
    (tmp_path / "q.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "q.csv").write_text('query_id,prompt,completion\na,"x, y",z\nb,u,v\n')
    (tmp_path / "q.tsv").write_text("query_id\tprompt\tcompletion\na\tx, y\tz\nb\tu\tv\n")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "q.parquet")  # pyright: ignore[reportUnknownMemberType]
    expected = [(row["query_id"], row["prompt"], row["completion"]) for row in rows]
    for name in ("q.json", "q.csv", "q.tsv", "q.parquet"):
        found = [(query.query_id, query.prompt, query.completion) for query in read_queries(tmp_path / name)]
        assert found == expected, name


def test_a_generated_answer_follows_the_conversation(tmp_path: Path) -> None:
    tokenizer = tokenizer_with("{{ bos_token }}" + CHATML)
    rendered = tokenizer.apply_chat_template(CHAT[:-1], tokenize=False, add_generation_prompt=True)
    for messages in (CHAT, CHAT[:-1]):
        (query,) = read_queries(written(tmp_path, {"messages": messages}), needs_completion=False)
        assert prompt_of(query, tokenizer) == rendered
        assert query.completion == (CHAT[-1]["content"] if messages is CHAT else "")


def test_a_chat_prompt_is_put_once_in_the_template_of_conversations(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = save_tiny_model(tmp_path / "model")
    tokenizer_with(None).save_pretrained(folder)
    (tmp_path / "chat.jinja").write_text("{{ bos_token }}" + CHATML)
    message = {"role": "user", "content": "The capital of France?"}
    written(tmp_path, {"messages": [message, CHAT[2]]}, name="c.jsonl")
    written(tmp_path, {"messages": [message]})
    options = ["--model", str(folder), "--data", str(tmp_path / "c.jsonl"), "--side", "8", "--second-moment", "none"]
    options += ["--generate", "--stop", "end", "--max-new-tokens", "4", "--json"]
    template = ["--chat-template", str(tmp_path / "chat.jinja")]
    results = []
    for asked_as in (
        ["--queries", str(tmp_path / "q.jsonl"), *template],
        ["--queries", str(tmp_path / "q.jsonl"), "--chat", *template],
        ["--prompt", str(message["content"]), "--chat", *template],
    ):
        assert run(trackstar, ["query", *options, *asked_as]) == 0
        results.append(json.loads(capfd.readouterr().out)["input_ids"])
    assert results[0] == results[1] == results[2]
    assert run(trackstar, ["query", *options, "--prompt", "x", "--chat"]) == 1
    assert "pass a file with the template of the training run as --chat-template" in capfd.readouterr().err


def test_the_template_can_come_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text(CHATML)
    record = {"messages": CHAT}
    with pytest.raises(CorpusError, match="renders the first 4 messages by themselves differently"):
        asked(record, tokenizer_with(DIFFERS_LATER), tmp_path)
    with pytest.raises(ModelError, match="has no chat template"):
        asked(record, tokenizer_with(None), tmp_path)
    found = asked(record, tokenizer_with(None), tmp_path, chat_template=tmp_path / "chat.jinja")
    assert found.token_ids.tolist() == asked(record, tokenizer_with(CHATML), tmp_path).token_ids.tolist()


@pytest.mark.parametrize(
    ("record", "found"),
    [
        ({"messages": CHAT[:2]}, "no message of the assistant; expected one"),
        ({"messages": []}, "is empty"),
        ({"messages": [{"role": "king", "content": "x"}]}, "unknown role"),
        ({"prompt": [1], "completion": "x"}, "expected an object with role and content"),
        ({"instruction": "x"}, "no completion; expected a field output"),
        ({"instruction": 5, "output": "x"}, 'field "instruction" is'),
    ],
)
def test_a_record_that_is_no_query_is_one_line(record: dict[str, Any], found: str, tmp_path: Path) -> None:
    path = written(tmp_path, record)
    with pytest.raises(CorpusError, match=found) as error:
        read_queries(path)
    assert str(error.value).startswith(f"{path}:1: ")


def test_a_conversation_is_the_first_proponent_of_its_own_answer(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model")
    tokenizer_with(CHATML, "bos").save_pretrained(folder)
    model = load_model(folder)
    chats = [
        {"messages": [{"role": "user", "content": f"What is {word}?"}, {"role": "assistant", "content": f"A {word}."}]}
        for word in ("gold", "iron", "tin", "zinc")
    ]
    index = build_index(
        model, chats, tmp_path / "index", side=4, codec="float32", layer_blocks=1, batch_tokens=256, progress=False
    )
    path = written(tmp_path, *chats)
    queries = read_queries(path)
    report = answer_queries(index, queries, model=model, k=2, exact=True, progress=False)
    for number, result in enumerate(report.results):
        assert result.proponents[0].example_id == f"example:{number}"
        assert result.proponents[0].influence > result.proponents[1].influence
        assert result.query.completion.startswith("A ")
    write_results(report, tmp_path / "r.jsonl", query_set="chats")
    audit = write_audit(report, tmp_path / "r.jsonl", query_set="chats")
    without, with_model = (
        {check.name: check.outcome for check in check_audit(audit, hand).checks}
        for hand in (AtHand(queries=path), AtHand(queries=path, model=tmp_path / "model"))
    )
    assert without["queries"] == "not checked"
    assert with_model["queries"] == "same"
    changed = written(tmp_path, *chats[:3], chats[0] | {"query_id": "q:3"}, name="other.jsonl")
    outcomes = check_audit(audit, AtHand(queries=changed, model=tmp_path / "model")).checks
    assert {check.name: check.outcome for check in outcomes}["queries"] == "differs"


def test_questions_to_an_index_are_in_the_template_of_its_conversations(tmp_path: Path) -> None:
    """Also where the tokenizer has another template, and for prompts, added records and audits."""
    folder, template = save_tiny_model(tmp_path / "model"), tmp_path / "chat.jinja"
    tokenizer_with("other {{ messages[-1].content }}", "bos").save_pretrained(folder)
    template.write_text(CHATML)
    chat = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "There."}]
    index = build_index(
        load_model(folder), [{"messages": chat}], tmp_path / "index", side=4, codec="float32", layer_blocks=1,
        batch_tokens=256, chat_template=template, progress=False,
    )  # fmt: skip
    path = written(tmp_path, {"messages": chat})
    named, unnamed = (
        answer_queries(index, read_queries(path, **options), k=1, exact=True, progress=False)
        for options in cast("tuple[dict[str, Any], ...]", ({"chat_template": template}, {}))
    )
    assert unnamed.results == named.results
    assert unnamed.results[0].query.prompt.startswith("<|user|>")
    influences = Attributor(index, load_model(folder)).attribute(Query(query_id="q", messages=tuple(chat))).influences
    assert influences[0] == pytest.approx(named.results[0].proponents[0].influence, abs=1e-6)

    write_results(unnamed, tmp_path / "r.jsonl", query_set="chats")
    audit = write_audit(unnamed, tmp_path / "r.jsonl", query_set="chats")
    checks = check_audit(audit, AtHand(queries=path, model=folder)).checks
    assert {check.name: check.outcome for check in checks}["queries"] == "same"

    added = add_examples(index, [{"id": "new", "messages": chat}], tmp_path / "more", progress=False)
    assert added.example(1).example.text == index.example(0).example.text
    command = ["query", str(tmp_path / "index"), "--prompt", "Where?", "--generate", "--chat", "--max-new-tokens", "2"]
    run(trackstar, [*command, "--out", str(tmp_path / "said.jsonl")])
    (said,) = read_queries(tmp_path / "said.jsonl")
    assert said.prompt.startswith("<|user|>\nWhere?")


def test_instructions_are_asked_and_added_as_the_index_renders_them(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, template = save_tiny_model(tmp_path / "model"), tmp_path / "chat.jinja"
    template.write_text(CHATML)
    record = {"instruction": "Where?", "input": "Here", "output": "There."}
    data = written(tmp_path, record, name="alpaca.jsonl")
    options: dict[str, Any] = {"side": 4, "codec": "float32", "layer_blocks": 1, "batch_tokens": 256, "progress": False}
    model = load_model(folder)
    index = build_index(model, data, tmp_path / "index", chat_template=template, **options)
    text = index.example(0).example.text
    assert text.startswith("<|user|>\nWhere?\n\nHere\n<|assistant|>\nThere.")
    unnamed = answer_queries(index, read_queries(data), model=model, k=1, exact=True, progress=False)
    named = answer_queries(
        index, read_queries(data, chat_template=template), model=model, k=1, exact=True, progress=False
    )
    assert unnamed.results == named.results
    assert unnamed.results[0].query.prompt == "<|user|>\nWhere?\n\nHere\n<|assistant|>\n"
    capfd.readouterr()
    added = add_examples(index, [record | {"id": "new"}], tmp_path / "more", progress=False)
    assert added.example(1).example.text == text
    assert "first example new (instruction, train on completion;" in capfd.readouterr().err
    write_results(unnamed, tmp_path / "r.jsonl", query_set="alpaca")
    audit = write_audit(unnamed, tmp_path / "r.jsonl", query_set="alpaca")
    checks = check_audit(audit, AtHand(queries=data, model=folder)).checks
    assert {check.name: check.outcome for check in checks}["queries"] == "same"
    run(trackstar, ["query", str(tmp_path / "index"), "--queries", str(data), "--generate", "--max-new-tokens", "2",
                    "--out", str(tmp_path / "said.jsonl")])  # fmt: skip
    (said,) = read_queries(tmp_path / "said.jsonl")
    assert said.prompt == unnamed.results[0].query.prompt
    plain = build_index(model, data, tmp_path / "plain", **options)
    (asked_plainly,) = answer_queries(plain, read_queries(data), model=model, k=1, exact=True, progress=False).results
    assert asked_plainly.query.prompt.startswith("Below is an instruction")


def test_a_query_of_messages_can_be_made_in_python() -> None:
    tokenizer = tokenizer_with(CHATML)
    query = query_with_texts(Query(query_id="q", messages=tuple(CHAT)), tokenizer)
    assert query.messages is None
    assert query.prompt.endswith("<|assistant|>\n")
    assert query.completion == "Berlin."
    with pytest.raises(CorpusError, match="query q: the conversation has no message of the assistant"):
        query_with_texts(Query(query_id="q", messages=tuple(CHAT[:2])), tokenizer)
    with pytest.raises(OptionError, match="`chat_template`"):
        read_queries("q.jsonl", chat_template="missing.jinja")


def test_a_generated_answer_follows_the_tokens_of_training(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model")
    tokenizer_with(CHATML, "bos").save_pretrained(folder)  # the template has no <s>, which the tokenizer adds to texts
    model = load_model(folder)
    chat = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "There."}]
    (window,) = windows_of({"messages": chat}, model.tokenizer, train_on="completion")
    start = int(window.target_mask.argmax())
    settings = GenerationSettings(max_new_tokens=3, stop="end")
    query = Query(query_id="q", messages=tuple(chat))
    generation = generate(model, query, settings)
    assert list(generation.prompt_ids) == window.token_ids[:start].tolist()
    in_chat = generate(model, "Where?", GenerationSettings(max_new_tokens=3, stop="end", chat=True))
    assert in_chat.token_ids == generation.token_ids
