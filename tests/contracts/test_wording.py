"""Messages of the library in the words of the command line: parameters as flags, functions as commands."""

import io
from pathlib import Path

import pytest

from trackstar.cli import framework
from trackstar.cli import trackstar as command_group
from trackstar.cli.wording import ALIASES, COMMAND_OF, CONFIGURED, Wording
from trackstar.errors import check_at_least, check_choice
from trackstar.progress import Progress, reworded, reworded_line


def reword(message: str, command: str | None = "query") -> str:
    return Wording(command=command, commands=command_group.commands)(message)


@pytest.mark.parametrize(
    ("message", "command", "expected"),
    [
        # A parameter is a flag of the running command.
        ("`k`: expected 1 or more, found 0", "query", "--top: expected 1 or more, found 0"),
        ("`reranked` and `batch_tokens`", "query", "--rerank and --batch-tokens"),
        ("`share`: expected i/n", "index", "--shard: expected i/n"),
        ("`index`: no manifest", "audit", "--index: no manifest"),
        ("`index`: no manifest", "query", "INDEX: no manifest"),
        ("`indexes`: expected two or more", "merge", "INDEX...: expected two or more"),
        ("`paths`: found none", "explore", "PATH...: found none"),
        ("`address`, `workers`, `cpus`, `gpus`", "index", "--ray, --ray-workers, --ray-cpus, --ray-gpus"),
        # With a value.
        ('pass `codec="float16"`', "index", "pass --codec float16"),
        ("pass `codec='float16'`", "index", "pass --codec float16"),
        ("pass `side=32`", "index", "pass --side 32"),
        ("pass `damping=0.1`", "convert", "pass --damping 0.1"),
        ('pass `share="3/8"`', "index", "pass --shard 3/8"),
        ('pass `completion="New York"`', "query", "pass --completion 'New York'"),
        ("`exact=True` checks it", "query", "--exact checks it"),
        ("pass `exact=False`", "query", "pass no --exact"),
        ("pass `coordinates=None`", "index", "pass no --coordinates"),
        ("pass `tied_embeddings=False`", "pretrain", "pass --untied-embeddings"),
        ("pass `tied_embeddings=True`", "pretrain", "pass --tied-embeddings"),
        ("pass `damping=c`", "query", "pass --damping c"),
        ('pass `index="a folder"`', "query", "pass 'a folder'"),
        ('`codec="float16", coordinates="projected"`', "index", "--codec float16 --coordinates projected"),
        # A function is a command.
        ("call `build_index` again", "query", "run trackstar index again"),
        ("Call `finish_index`", "index", "Run trackstar finish"),
        ("`verify` finds the damaged file", "query", "trackstar verify finds the damaged file"),
        ("`trackstar.convert_index` makes one", "query", "trackstar convert makes one"),
        ("call `merge_indexes(...)`", "add", "run trackstar merge"),
        ('call `build_index(codec="float16", side=8)`', "query", "run trackstar index --codec float16 --side 8"),
        # What the running command has not is a flag of the command that is named, else of any.
        (
            'call `build_index` with `coordinates="projected"`',
            "query",
            "run trackstar index with --coordinates projected",
        ),
        ("`names` of `remove_examples`", "query", "--names of trackstar remove"),
        ("pass `damping` to `answer_queries`", "finish", "pass --damping to trackstar query"),
        ("pass `task`", "index", "pass --task"),
        ("pass `k`", None, "pass --top"),
        # Settings of `evaluate` are keys of a file.
        ("`methods`: found none", "evaluate", "methods: found none"),
        ("`tail_patch.queries`: found -1", "evaluate", "tail_patch.queries: found -1"),
        ("`codec`: found jpeg", "evaluate", "codec: found jpeg"),
        ('pass `codec="float16"`', "evaluate", 'pass codec = "float16"'),
        ("pass `strict=True`", "evaluate", "pass strict = true"),
        ("`out`: cannot be written", "evaluate", "--out: cannot be written"),
        ("call `convert_index`", "evaluate", "run trackstar convert"),
        ("pass `workers`", "evaluate", "pass --ray-workers"),
        # Anything else stays as it is.
        ("`model.norm.weight` is NaN", "index", "`model.norm.weight` is NaN"),
        ("a `SecondMoment`", "index", "a `SecondMoment`"),
        ("`no_such_thing=3`", "index", "`no_such_thing=3`"),
        ("`k` of `top_k`", "query", "--top of `top_k`"),
        ("`narrow_index` has no command", "index", "`narrow_index` has no command"),
        ("`help` and `help_all`", "index", "`help` and `help_all`"),
        ("a lone ` and `", "index", "a lone ` and `"),
        ("``", "index", "``"),
        ("no backtick: k, codec", "index", "no backtick: k, codec"),
        ('`codec="float16", no_such_thing=3`', "index", '`codec="float16", no_such_thing=3`'),
        ("`f(`", "index", "`f(`"),
        ("`k=`", "query", "`k=`"),
    ],
)
def test_message_is_translated(message: str, command: str | None, expected: str):
    assert reword(message, command) == expected


def test_helpers_messages_are_translated():
    with pytest.raises(ValueError, match="`k`") as error:
        check_at_least("k", 0)
    assert reword(str(error.value)) == "--top: expected 1 or more, found 0"
    with pytest.raises(ValueError, match="`codec`") as error:
        check_choice("codec", "jpeg", ("a", "b"))
    assert reword(str(error.value), "index") == "--codec: expected one of a, b, found jpeg"


def test_every_function_and_alias_leads_to_a_command_that_exists():
    assert set(COMMAND_OF.values()) == set(command_group.commands)
    assert set(command_group.commands) >= CONFIGURED
    flags = {parameter.name for command in command_group.commands.values() for parameter in command.params}
    assert set(ALIASES.values()) <= flags


def test_every_parameter_of_every_command_is_translated():
    for name, command in command_group.commands.items():
        for parameter in command.params:
            if parameter.expose_value:
                assert "`" not in reword(f"`{parameter.name}`", name), (name, parameter.name)


def test_hostile_text_is_neither_run_nor_slow():
    for text in (
        "`" * 10_000,
        "`k`" * 2000,
        "`" + "a=1," * 3000 + "`",
        "`" + "(" * 400 + "`",
        "`k=\x00`",
        "`k=`" * 500,
    ):
        reword(text)


def test_notes_are_translated_only_inside(capsys: pytest.CaptureFixture[str]):
    stream = io.StringIO()
    before = Progress("Indexing", unit="tokens", stream=stream)
    with reworded(lambda line: line.replace("`k`", "--top")):
        inside = Progress("Indexing", unit="tokens", stream=stream)
        assert reworded_line("`k`\n") == "--top "
    assert reworded_line("`k`") == "`k`"
    for progress in (before, inside, Progress("Indexing", unit="tokens", stream=stream)):
        progress.note("`k`")
    assert stream.getvalue() == "`k`\n--top\n`k`\n"


def test_errors_of_commands_name_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A whole command: the library's message names `share` and `k`, the user reads `--shard` and `--top`."""
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("A text.\n")
    command = ("index", "--model", str(tmp_path), "--data", str(corpus), "--out", str(tmp_path / "index"))
    assert framework.run(command_group, [*command, "--shard", "9/8"]) == 1
    assert "trackstar: --shard: expected i/n" in capsys.readouterr().err
    assert framework.run(command_group, [*command, "--side", "0"]) == 1
    assert "trackstar: --side: expected 1 or more, found 0" in capsys.readouterr().err
    low_bits = [*command, "--codec", "4-bit", "--coordinates", "projected"]
    assert framework.run(command_group, low_bits) == 1
    shown = capsys.readouterr().err
    assert "trackstar: --coordinates: expected whitened for --codec 4-bit" in shown
    assert "`" not in shown
