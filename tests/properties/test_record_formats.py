"""Records of every form give the tokens and targets that training counts, and a malformed one is one line."""

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors

from tiny_models import SENTENCES, save_tiny_model, tiny_tokenizer
from trackstar import Index, add_examples, build_index, merge_indexes, open_corpus, remove_examples
from trackstar.corpus import TokenizedExample, read_queries, tokenize_example
from trackstar.corpus.marked_text import first_example, marked
from trackstar.corpus.token_spans import token_spans
from trackstar.errors import CorpusError, ModelError, OptionError
from trackstar.store import verify

CHATML = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{% else %}{{ message['content'] }}"
    "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
UNMARKED = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")
LAST_DIFFERS = UNMARKED.replace("eos_token", "(eos_token if loop.last else '')")
SPECIAL = ("plain", "bos", "bos_eos")
CHAT = [
    {"role": "system", "content": "Answer."},
    {"role": "user", "content": "The capital of France?"},
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": "Of Germany?"},
    {"role": "assistant", "content": "Berlin."},
]


def tokenizer_with(template: str | None, special: Any = "bos") -> Any:
    tokenizer = tiny_tokenizer.__wrapped__(special)
    tokenizer.chat_template = template
    return tokenizer


def windows_of(record: dict[str, Any], tokenizer: Any, *, window_tokens: int = 400, **options: Any) -> Any:
    (example,) = open_corpus([record], tokenizer=tokenizer, **options).examples()
    return tokenize_example(example, tokenizer, window_tokens=window_tokens)


def targets_of(windows: list[TokenizedExample], tokenizer: Any) -> list[str]:
    """The texts of the runs of targets."""
    runs: list[list[int]] = []
    for window in windows:
        before = False
        for token, target in zip(window.token_ids.tolist(), window.target_mask.tolist(), strict=True):
            if target:
                runs[-1:] = [[*runs[-1], token]] if before else [*runs[-1:], [token]]
            before = target
    return [tokenizer.decode(run) for run in runs]


# ---- Prompt and completion, instructions ---------------------------------------------------------------------------


@pytest.mark.parametrize("special", SPECIAL)
def test_targets_of_a_completion_are_those_of_the_tokenizers_own_offsets(special: Any) -> None:
    tokenizer = tokenizer_with(None, special)
    (window,) = windows_of({"prompt": "The capital of France is", "completion": "Paris."}, tokenizer)
    whole = tokenizer("The capital of France is Paris.", return_offsets_mapping=True)
    assert window.token_ids.tolist() == whole["input_ids"]
    first = len("The capital of France is")
    expected = [stop > first for _, stop in whole["offset_mapping"]]
    if special == "bos_eos":
        expected[-1] = True  # the end of the completion is trained on
    assert window.target_mask.tolist() == expected


@given(parts=st.lists(st.sampled_from(SENTENCES), min_size=2, max_size=8), window_tokens=st.integers(12, 60))
def test_every_token_of_a_completion_is_a_target_once_also_in_windows(parts: list[str], window_tokens: int) -> None:
    tokenizer = tokenizer_with(None, "bos_eos")
    record = {"prompt": parts[0], "completion": " ".join(parts[1:])}
    (whole,) = windows_of(record, tokenizer, window_tokens=2000)
    windows = windows_of(record, tokenizer, window_tokens=window_tokens)
    targets = [token for window in windows for token in window.token_ids[window.target_mask].tolist()]
    assert targets == whole.token_ids[whole.target_mask].tolist()
    assert all(window.target_mask.any() for window in windows)
    assert all(window.example_id == f"example:0#{window.window}" for window in windows if window.window)


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [
        ("A: ", "\u5df4", ["\u5df4"]),  # the prompt's last space is a token of its own
        ("a  ", "b", ["b"]),
        ("a", "b ", ["b "]),
        ("a", "  b  ", ["  b  "]),
        ("a", " ", [" "]),
        ("a ", "<s>b", ["<s>b"]),
    ],
)
@pytest.mark.parametrize("trims", [True, False])
def test_white_space_belongs_to_its_own_side_also_where_the_tokenizer_trims_offsets(
    trims: bool, prompt: str, completion: str, expected: list[str]
) -> None:
    tokenizer = tokenizer_with(None)
    tokenizer.backend_tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=trims, add_prefix_space=False),
            processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]),
        ]
    )
    windows = windows_of({"prompt": prompt, "completion": completion}, tokenizer, join="none")
    assert targets_of(windows, tokenizer) == expected


def test_instructions_are_alpacas_prompts() -> None:
    tokenizer = tokenizer_with(None)
    with_input, alone = (
        {"instruction": "Name the capital.", "input": "France", "output": "Paris"},
        {"instruction": "Name a capital.", "input": "", "output": "Paris"},
    )
    corpus = open_corpus([with_input, alone])
    assert corpus.reading.format == "instruction"
    texts = [example.text for example in corpus.examples()]
    assert texts[0].endswith("\n\n### Instruction:\nName the capital.\n\n### Input:\nFrance\n\n### Response:\nParis")
    assert "### Input" not in texts[1]
    assert targets_of(windows_of(with_input, tokenizer), tokenizer) == ["Paris"]


def test_all_tokens_of_any_form_can_be_targets() -> None:
    tokenizer = tokenizer_with(CHATML)
    for record in (
        {"prompt": "a b", "completion": "c"},
        {"instruction": "a", "output": "c"},
        {"messages": CHAT},
        {"input_ids": [5, 6, 7], "labels": [-100, -100, 7]},
    ):
        (window,) = windows_of(record, tokenizer, train_on="all")
        assert window.target_mask.tolist() == [False] + [True] * (len(window.token_ids) - 1)


# ---- Conversations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [CHATML, UNMARKED], ids=["marked", "prefixes"])
def test_a_conversation_is_rendered_as_the_tokenizer_does(template: str) -> None:
    tokenizer = tokenizer_with(template)
    (window,) = windows_of({"messages": CHAT}, tokenizer)
    own = tokenizer.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=template == CHATML)
    assert window.token_ids.tolist() == own["input_ids"]
    ends = ["Paris.</s>", "Berlin.</s>"] if template == CHATML else ["Paris.</s>\n", "Berlin.</s>\n"]
    assert targets_of([window], tokenizer) == ends
    if template == CHATML:
        assert window.target_mask.astype(int).tolist() == own["assistant_masks"]
    last = windows_of({"messages": CHAT}, tokenizer, train_on="completion")
    assert targets_of(last, tokenizer) == ends[1:]


def test_the_last_answer_has_all_its_marks_and_none_of_an_earlier_one() -> None:
    """Also where the template marks an answer in parts, or the answer is empty between its marks."""
    parts = (
        "{% generation %}{{ message['content'][:3] }}{% endgeneration %}|{% generation %}{{ message['content'][3:] }}"
    )
    divided = CHATML.replace("{% generation %}{{ message['content'] + eos_token }}", parts)
    options: dict[str, Any] = {"train_on": "completion"}
    tokenizer = tokenizer_with(divided)
    assert targets_of(windows_of({"messages": CHAT}, tokenizer, **options), tokenizer) == ["Ber", "lin."]
    assert targets_of(windows_of({"messages": CHAT[3:]}, tokenizer, **options), tokenizer) == ["Ber", "lin."]
    assert targets_of(windows_of({"messages": [CHAT[4], CHAT[3]]}, tokenizer, **options), tokenizer) == ["Ber", "lin."]
    empty = [*CHAT[:4], {"role": "assistant", "content": ""}]
    assert windows_of({"messages": empty}, tokenizer, **options) == []
    assert targets_of(windows_of({"messages": empty}, tokenizer), tokenizer) == ["Par", "is."]


def test_forms_of_a_conversation_are_the_same_conversation() -> None:
    tokenizer = tokenizer_with(CHATML)
    sharegpt = [{"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]} for m in CHAT[1:]]
    parts = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in CHAT]
    expected = windows_of({"messages": CHAT}, tokenizer)[0].text
    for record in ({"system": "Answer.", "conversations": sharegpt}, {"messages": parts}, {"a": {"b": CHAT}}):
        options: dict[str, Any] = {"format": "messages", "text_field": "a.b"} if "a" in record else {}
        assert windows_of(record, tokenizer, **options)[0].text == expected


def test_tools_and_calls_reach_the_template_as_they_are() -> None:
    template = (
        "{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% for m in messages %}<{{ m.role }}>"
        "{{ m.content if m.content is defined else m.tool_calls[0].function.arguments.x }}{% endfor %}"
    )
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": 41}}}]}
    record = {"messages": [CHAT[1], call], "tools": [{"name": "f"}]}
    (example,) = open_corpus([record], tokenizer=tokenizer_with(template)).examples()
    assert example.text == '{"name": "f"}<user>The capital of France?<assistant>41'


def test_the_day_is_no_part_of_an_index() -> None:
    template = "{{ strftime_now('%Y-%m-%d') }} " + CHATML
    (example,) = open_corpus([{"messages": CHAT}], tokenizer=tokenizer_with(template)).examples()
    assert example.text.startswith("2024-07-26 <|system|>")


def test_answers_that_the_template_renders_differently_at_the_end_are_refused_with_ways_that_work(
    tmp_path: Path,
) -> None:
    tokenizer = tokenizer_with(LAST_DIFFERS)
    record = {"messages": CHAT}
    with pytest.raises(CorpusError, match="record 0: the chat template renders the first 3 messages by themselves"):
        windows_of(record, tokenizer)
    (tmp_path / "marked.jinja").write_text(CHATML)
    assert windows_of(record, tokenizer, chat_template=tmp_path / "marked.jinja")
    assert windows_of(record, tokenizer, train_on="all")


def test_spans_of_a_rendered_chat_are_those_of_its_tokens() -> None:
    tokenizer = tokenizer_with("{{ bos_token }}" + CHATML)
    (window,) = windows_of({"messages": CHAT}, tokenizer)
    spans = token_spans(window, tokenizer)
    assert "".join(window.text[span.start : span.stop] for span in spans) == window.text
    assert window.token_ids.tolist().count(0) == 1


def test_a_corpus_of_conversations_needs_a_tokenizer_with_a_template(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="`tokenizer`: record 0 is a conversation"):
        list(open_corpus([{"messages": CHAT}]).examples())
    with pytest.raises(ModelError, match="the tokenizer has no chat template"):
        open_corpus([{"messages": CHAT}], tokenizer=tokenizer_with(None))
    (tmp_path / "t.jinja").write_text(CHATML)
    assert windows_of({"messages": CHAT}, tokenizer_with(None), chat_template=tmp_path / "t.jinja")


# ---- Token ids -----------------------------------------------------------------------------------------------------


def test_token_ids_are_read_as_they_are_with_their_labels() -> None:
    tokenizer = tokenizer_with(None, "bos_eos")
    ids = tokenizer("The capital of France is Paris.")["input_ids"]
    labels = [-100] * 4 + ids[4:]
    for record in (
        {"input_ids": ids, "labels": labels},
        {"input_ids": ids, "loss_mask": [int(label != -100) for label in labels]},
        {"input_ids": ids, "completion_mask": [int(label != -100) for label in labels]},
        {"input_ids": ids, "completion_mask": [1] * len(ids), "assistant_masks": [int(x != -100) for x in labels]},
        {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)},
        {"input_ids": [2, *ids], "labels": [-100, *labels], "attention_mask": [0] + [1] * len(ids)},
    ):
        (window,) = windows_of(record, tokenizer)
        assert window.token_ids.tolist() == ids
        assert window.target_mask.tolist() == [label != -100 for label in labels]
        assert window.text == "<s>The capital of France is Paris.</s>"
    windows = windows_of({"input_ids": ids, "labels": labels}, tokenizer, window_tokens=8)
    assert [t for w in windows for t in w.token_ids[w.target_mask].tolist()] == ids[4:]


# ---- Malformed records ---------------------------------------------------------------------------------------------

MALFORMED: list[tuple[dict[str, Any], str]] = [
    ({"messages": [{"role": "robot", "content": "x"}]}, "[0]\" has the unknown role 'robot'; expected one of system"),
    ({"messages": [{"from": "robot", "value": "x"}]}, "has the unknown role 'robot'; expected one of system"),
    ({"messages": [{"content": "x"}]}, "has no role; found content; expected role and content"),
    ({"messages": ["x"]}, "is a string; expected an object with role and content"),
    ({"messages": []}, 'field "messages" is empty; expected messages'),
    ({"messages": "x"}, 'field "messages" is text that is no JSON; expected an array of messages'),
    ({"messages": CHAT[:2]}, "the conversation has no message of the assistant; expected at least one"),
    ({"messages": [{"role": "assistant"}]}, "has no content; expected a string"),
    ({"messages": [{"role": "user", "content": 3}]}, "the content is a number; expected a string"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]},
        "part 0 of the content is 'image'; expected text, as a causal language model reads no other; leave",
    ),
    ({"input_ids": [1, 2], "labels": [1]}, "labels has 1 entries, input_ids 2; expected one for each token"),
    ({"input_ids": [1, 2], "labels": [1, 3]}, "labels[1] is 3; expected 2, the token of input_ids there, or -100"),
    ({"input_ids": [1, -2]}, "input_ids[1] is -2; expected token ids, 0 or more"),
    ({"input_ids": [1, 2.5]}, "input_ids[1] is 2.5; expected a whole number of 32 bits"),
    ({"input_ids": [1], "labels": [1], "loss_mask": [1]}, "has both labels and loss_mask; expected one of them"),
    ({"input_ids": [1], "labels": [1], "assistant_masks": [1]}, "has both labels and assistant_masks; expected one"),
    ({"input_ids": [1, 2], "completion_mask": [1]}, "completion_mask has 1 entries, input_ids 2; expected one for"),
    ({"input_ids": [1, 2], "loss_mask": [0, 2]}, "loss_mask[1] is 2; expected 0 or 1"),
    ({"prompt": "x", "completion": 3}, 'field "completion" is a number; expected a string'),
    ({"prompt": CHAT, "completion": CHAT}, 'field "prompt" is an array; expected a string; write a conversation'),
    ({"instruction": "x", "output": None}, 'field "output" is null; expected a string'),
]


@pytest.mark.parametrize(("record", "message"), MALFORMED, ids=[each[1][:30] for each in MALFORMED])
def test_a_malformed_record_is_one_line_with_file_and_line(
    record: dict[str, Any], message: str, tmp_path: Path
) -> None:
    good: dict[str, Any] = {"messages": CHAT} if "messages" in record else {}
    good = good or ({"input_ids": [1, 2]} if "input_ids" in record else {"prompt": "a", "completion": "b"})
    if "instruction" in record:
        good = {"instruction": "a", "output": "b"}
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps(good) + "\n\n" + json.dumps(record) + "\n")
    corpus = open_corpus(path, tokenizer=tokenizer_with(CHATML))
    for read in (corpus.survey, lambda: list(corpus.examples())):
        with pytest.raises(CorpusError) as caught:
            read()
        assert str(caught.value).startswith(f"{path}:3: ")
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_record_that_the_template_refuses_is_found_by_the_survey(tmp_path: Path) -> None:
    template = "{% if messages[0].role != 'user' %}{{ raise_exception('begin with the user') }}{% endif %}" + CHATML
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps({"messages": CHAT[1:]}) + "\n" + json.dumps({"messages": CHAT}) + "\n")
    with pytest.raises(CorpusError, match=r"c\.jsonl:2: the chat template cannot render .*\(begin with the user\)"):
        open_corpus(path, tokenizer=tokenizer_with(template)).survey()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_on": "labels"}, "`train_on`: expected all for records of the format text, found labels; leave it out"),
        ({"chat_template": "x"}, "`chat_template`: expected none for records of the format text"),
        ({"metadata": ","}, "`metadata`: expected all, none, or names of fields"),
        ({"format": "messages", "chat_template": "/absent"}, "`chat_template`: /absent cannot be read (No such file"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    record = {"messages": CHAT} if options.get("format") == "messages" else {"text": "x"}
    with pytest.raises(OptionError) as caught:
        open_corpus([record], **options)
    assert str(caught.value).startswith(message)


# ---- The form is part of the corpus --------------------------------------------------------------------------------


def test_the_form_is_found_by_the_first_records_fields_and_can_be_given() -> None:
    for record, form in (
        ({"text": "x", "messages": CHAT}, "text"),
        ({"prompt": "x", "completion": "y"}, "prompt-completion"),
        ({"conversations": CHAT}, "messages"),
        ({"instruction": "x", "output": "y"}, "instruction"),
        ({"input_ids": [1, 2]}, "tokens"),
    ):
        assert open_corpus([record]).reading.format == form
    assert open_corpus([{"text": "x", "messages": CHAT}], format="messages").reading.text_field == "messages"
    with pytest.raises(CorpusError, match='record 0: no field "prompt"; found text; records of the format prompt-'):
        open_corpus([{"text": "x"}], format="prompt-completion")


def test_a_corpus_read_in_another_way_is_another_corpus(tmp_path: Path) -> None:
    record = {"text": "t", "prompt": "p", "completion": "c", "messages": CHAT, "source": "s"}
    (tmp_path / "c.jsonl").write_text(json.dumps(record))
    for data in (tmp_path / "c.jsonl", [record]):
        digests = [
            open_corpus(data).digest(),
            open_corpus(data, format="prompt-completion").digest(),
            open_corpus(data, format="prompt-completion", train_on="all").digest(),
            open_corpus(data, format="prompt-completion", join="none").digest(),
            open_corpus(data, format="messages", tokenizer=tokenizer_with(CHATML)).digest(),
            open_corpus(data, format="messages", tokenizer=tokenizer_with(UNMARKED)).digest(),
        ]
        assert len(set(digests)) == len(digests)


def test_the_digest_of_texts_is_that_of_indexes_made_before(tmp_path: Path) -> None:
    """Computed by the version before, for the same file and list."""
    (tmp_path / "c.jsonl").write_text('{"id": "a", "text": "x"}\n')
    assert open_corpus(tmp_path / "c.jsonl").digest() == "756d3c2bec3e05893d74dc7415eafc83"
    assert open_corpus([{"id": "a", "text": "x"}]).digest() == "1f2609e001ec4fc767c9b0b0a7e6533e"


def test_the_line_that_shows_an_example_marks_its_targets_and_moves_no_cursor() -> None:
    tokenizer = tokenizer_with(CHATML)
    chat = [{"role": "user", "content": "a\x1b[2Jb"}, CHAT[2]]
    line = first_example(open_corpus([{"messages": chat}], tokenizer=tokenizer), tokenizer, 64)
    assert line is not None
    assert line.isprintable()
    assert line.endswith("<|user|>⏎a [2Jb⏎<|assistant|>⏎⟦Paris.</s>⟧⏎")
    assert "(messages, train on assistant; " in line
    long = open_corpus([{"input_ids": [5] * 90, "labels": [-100] * 80 + [5] * 10}, {"input_ids": [5, 6]}])
    for truncate, name in ((False, "example:0#1"), (True, "example:1")):
        shown = first_example(long, tokenizer, 64, truncate=truncate)
        assert shown is not None
        assert shown.startswith(f"first example {name} (tokens, ")
    (window,) = windows_of({"text": "x" * 5000}, tokenizer, window_tokens=9000)
    assert len(marked(window, tokenizer)) < 400


# ---- Indexes -------------------------------------------------------------------------------------------------------

SETTINGS: dict[str, Any] = {"side": 8, "layer_blocks": 1, "codec": "float16", "shard_examples": 3, "progress": False}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny_model(tmp_path_factory.mktemp("records") / "model")
    tokenizer_with(CHATML).save_pretrained(folder)
    return folder


def _chats(folder: Path, first: int, stop: int) -> Path:
    path = folder / f"chats{first}.jsonl"
    records = [
        {"id": f"c{n}", "messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": f"{n}."}],
         "source": f"s{n % 2}", "year": n}
        for n in range(first, stop)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_metadata_are_kept_through_every_change_of_an_index(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = _chats(tmp_path, 0, 7)
    index = build_index(model, data, tmp_path / "index", **SETTINGS)
    notes = capsys.readouterr().err
    assert "bytes per record; " in notes
    assert "first example c0 (messages, train on assistant; " in notes
    assert "⟦0.</s>⟧" in notes
    expected = [{"source": f"s{n % 2}", "year": n} for n in range(7)]
    assert [stored.metadata for stored in index.examples()] == expected
    entry = index.manifest.corpora[0]
    assert (entry.format, entry.train_on, entry.text_field, entry.metadata) == (
        "messages",
        "assistant",
        "messages",
        None,
    )
    assert verify(tmp_path / "index").ok
    more = add_examples(index, _chats(tmp_path, 7, 9), tmp_path / "more", progress=False)
    assert [stored.metadata["year"] for stored in more.examples()] == list(range(9))
    fewer = remove_examples(more, ["c1"], tmp_path / "fewer", progress=False)
    assert [stored.metadata["year"] for stored in fewer.examples()] == [0, *range(2, 9)]
    other = build_index(model, _chats(tmp_path, 20, 22), tmp_path / "other", **SETTINGS, second_moment="none")
    plain = build_index(model, data, tmp_path / "plain", **SETTINGS, second_moment="none", metadata="none")
    assert [stored.metadata for stored in plain.examples()] == [{}] * 7
    merged = merge_indexes([plain, other], tmp_path / "merged", progress=False)
    assert [bool(stored.metadata) for stored in merged.examples()] == [False] * 7 + [True] * 2
    with pytest.raises(OptionError, match="already contains"):
        add_examples(plain, data, tmp_path / "twice", progress=False)


def test_records_without_a_target_are_skipped_and_counted(model: Path, tmp_path: Path) -> None:
    records = [{"input_ids": [5, 6, 7], "labels": labels} for labels in ([-100] * 3, [-100, 6, 7], [5, -100, -100])]
    index = build_index(model, records, tmp_path / "index", **SETTINGS)
    assert index.manifest.completion is not None
    assert (index.rows, index.manifest.completion.skipped) == (1, 2)


def test_packed_rows_are_the_stream_of_all_documents(model: Path, tmp_path: Path) -> None:
    records = [{"id": f"d{n}", "text": SENTENCES[n % 8] * (1 + n % 3), "n": n} for n in range(12)]
    index = build_index(model, records, tmp_path / "index", **SETTINGS, pack=20)
    tokenizer = tokenizer_with(None)
    stream = [token for r in records for token in [*tokenizer(r["text"])["input_ids"], tokenizer.eos_token_id]]
    rows = list(index.examples())
    assert [t for row in rows for t in row.example.token_ids.tolist()] == stream
    assert [len(row.example.token_ids) for row in rows[:-1]] == [20] * (len(rows) - 1)
    assert all(row.example.target_mask.tolist() == [False] + [True] * (len(row.example.token_ids) - 1) for row in rows)
    place = 0
    lengths = dict.fromkeys((f"d{n}" for n in range(12)), 0)
    for row in rows:
        assert row.metadata["parts"][0]["start"] == 0
        for part in row.metadata["parts"]:
            lengths[part["id"]] += part["stop"] - part["start"]
            assert part["metadata"] == {"n": int(part["id"][1:])}
        place += len(row.example.token_ids)
    assert list(lengths.values()) == [len(tokenizer(r["text"])["input_ids"]) + 1 for r in records]
    assert index.manifest.windows.pack == 20
    # A later start, as after an interruption, gives the same rows.
    corpus = open_corpus(records).for_tokenizer(tokenizer, pack=20)
    assert [e.example_id for e in corpus.examples(3)] == [row.example.example_id for row in rows[3:]]


def test_truncated_documents_are_the_tokenizers_own(model: Path, tmp_path: Path) -> None:
    text = " ".join(SENTENCES)
    index = build_index(model, [{"text": text}], tmp_path / "index", **SETTINGS, truncate=True, window_tokens=16)
    (stored,) = index.examples()
    for special in SPECIAL:
        tokenizer = tokenizer_with(None, special)
        (example,) = open_corpus([text]).examples()
        (window,) = tokenize_example(example, tokenizer, window_tokens=16, truncate=True)
        assert window.token_ids.tolist() == tokenizer(text, truncation=True, max_length=16)["input_ids"]
        assert text.startswith(window.text)
        if special == "bos":
            assert np.array_equal(stored.example.token_ids, window.token_ids)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pack": 500}, "`pack`: expected at most the 64 tokens that the model reads, found 500"),
        ({"pack": 1}, "`pack`: expected 2 or more, found 1"),
        ({"pack": 32, "window_tokens": 16}, "`pack`: expected at most the 16 tokens of a window, found 32"),
        ({"pack": 8, "truncate": True}, "`truncate`: expected False with `pack`"),
    ],
)
def test_rows_that_do_not_fit_are_refused(options: dict[str, Any], message: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError) as caught:
        build_index(model, [{"text": "a text"}], tmp_path / "index", **SETTINGS, **options)
    assert str(caught.value).startswith(message)


def test_an_index_resumed_with_another_form_is_refused(model: Path, tmp_path: Path) -> None:
    from trackstar.errors import IndexMismatchError

    data = _chats(tmp_path, 0, 4)
    build_index(model, data, tmp_path / "index", **SETTINGS)
    others: list[tuple[dict[str, Any], str]] = [
        ({"train_on": "all"}, r"index has `train_on` 'assistant', but 'all' was requested \(and 1 more differ\)"),
        ({"metadata": "none"}, "index was made with another `metadata` than requested"),
        ({"truncate": True}, "index has `truncate` False, but True was requested;"),
        ({"limit": 3}, r"index has `limit` None, but 3 was requested \(and 1 more differ\)"),
    ]
    for options, message in others:
        with pytest.raises(IndexMismatchError, match=message):
            build_index(model, data, tmp_path / "index", **SETTINGS, **options)
    assert dataclasses.replace(Index.open(tmp_path / "index").manifest.corpora[0], first_record=1).format == "messages"


def test_messages_and_tools_may_be_json_text_as_in_csv(tmp_path: Path) -> None:
    tokenizer, tools = tokenizer_with(CHATML), [{"type": "function", "function": {"name": "look_up"}}]
    path = tmp_path / "chats.csv"
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["messages", "tools", "system"])
        rows.writerow([json.dumps(CHAT[1:]), json.dumps(tools), "Answer."])
    record = {"messages": CHAT[1:], "tools": tools, "system": "Answer."}
    expected, found = (list(open_corpus(data, tokenizer=tokenizer).examples()) for data in ([record], path))
    assert (found[0].text, found[0].targets) == (expected[0].text, expected[0].targets)
    (query,) = read_queries(path)
    assert [message["role"] for message in query.messages or ()] == [message["role"] for message in CHAT]
    path.write_text("messages\n\"[{'role': 'user', 'content': 'x'}]\"\n")
    with pytest.raises(CorpusError, match=r'chats\.csv:2: field "messages" is text that is no JSON; expected an array'):
        open_corpus(path, tokenizer=tokenizer).survey()


def test_a_text_with_the_fields_of_another_form_is_pointed_out() -> None:
    record = {"text": "Capital of France? Paris.", "instruction": "Capital of France?", "output": "Paris."}
    shown = {
        form: first_example(open_corpus([record], format=form), tokenizer_with(None), 64)
        for form in (None, "instruction")
    }
    assert "its fields are also those of the form instruction, which `format` chooses" in str(shown[None])
    assert "also" not in str(shown["instruction"])
    assert "also" not in str(first_example(open_corpus([{"text": "x y"}]), tokenizer_with(None), 64))
