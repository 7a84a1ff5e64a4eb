"""Help pages: they fit a screen, show the real defaults and choices, and end with an example that runs."""

import dataclasses
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import trackstar
from trackstar.choices import CODECS, COORDINATES, DTYPES, OPTIMIZERS, OUTPUTS, PROJECTIONS, SECOND_MOMENT_KINDS
from trackstar.cli import framework
from trackstar.cli import trackstar as command_group
from trackstar.cli.framework import RareOption
from trackstar.indexing.settings import IndexSettings

PAGES = ["", *command_group.commands]
NOT_RUN = {"demo", "explore", "microscope", "pretrain", "evaluate"}
"""Commands whose examples take minutes or serve until they are stopped."""


def help_page(command: str, flag: str = "--help") -> str:
    words = [command, flag] if command else [flag]
    # On a terminal of 100 columns, click leaves two free.
    result = CliRunner().invoke(command_group, words, prog_name="trackstar", terminal_width=98)
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout


def example_of(command: str) -> str:
    group_or_command = command_group.commands[command] if command else command_group
    return group_or_command.example  # pyright: ignore[reportAttributeAccessIssue]


def default_of(option: click.Parameter) -> object:
    """The value of an option that is not given."""
    default = option.get_default(click.Context(command_group))
    return None if repr(default) == "Sentinel.UNSET" else default  # click 8.3 and later


def commands_in(example: str) -> list[list[str]]:
    """The words of every trackstar command of an example."""
    lines = example.replace("\\\n", " ").splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("trackstar ")]


@pytest.mark.parametrize("command", PAGES)
def test_help_fits_a_screen_of_40_lines_and_100_columns(command: str):
    lines = help_page(command).splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("command", PAGES)
def test_help_ends_with_an_example(command: str):
    page = help_page(command)
    indented = "".join(f"  {line}\n" for line in example_of(command).splitlines())
    assert page.endswith(f"\nExample:\n{indented}")
    assert f"trackstar {command}".rstrip() in example_of(command)
    assert "demo-out" in example_of(command)


@pytest.mark.parametrize("command", PAGES)
def test_example_has_the_arguments_and_options_that_exist(command: str):
    assert commands_in(example_of(command))
    for name, *words in commands_in(example_of(command)):
        with click.Context(command_group, info_name="trackstar") as parent:
            command_group.commands[name].make_context(name, words, parent=parent)


@pytest.mark.parametrize("command", PAGES)
def test_help_is_in_the_imperative(command: str):
    first = help_page(command).splitlines()[2].split()[0]
    imperatives = {
        "Index", "Complete", "Add", "Merge", "Remove", "Store", "Check", "Find", "Explore", "Verify", "Compute",
        "Train", "Sample", "Take", "Write",
    }  # fmt: skip
    assert first in imperatives


def test_bare_command_shows_its_help(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert framework.run(command_group, []) == 0
    assert capsys.readouterr() == (help_page(""), "")


def test_module_runs_as_the_command():
    result = subprocess.run(
        [sys.executable, "-m", "trackstar"],
        capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "100"},
    )  # fmt: skip
    assert (result.stdout, result.stderr) == (help_page(""), "")


@pytest.mark.parametrize("command", PAGES)
def test_short_flag_shows_the_same_help(command: str):
    assert help_page(command, "-h") == help_page(command)


def test_every_command_is_in_one_section():
    listed = [name for names in command_group.sections.values() for name in names]  # pyright: ignore[reportAttributeAccessIssue]
    assert listed == list(command_group.commands)
    page = help_page("")
    for name in listed:
        assert re.search(rf"^  {name} +[A-Z]", page, re.MULTILINE)


def test_options_of_an_index_have_the_defaults_of_its_settings():
    options = {option.name: option for option in command_group.commands["index"].params}
    for field in dataclasses.fields(IndexSettings):
        assert default_of(options[field.name]) == field.default, field.name


@pytest.mark.parametrize(
    ("command", "function"),
    [
        ("index", "trackstar.build_index"),
        ("add", "trackstar.add_examples"),
        ("convert", "trackstar.convert_index"),
        ("query", "trackstar.answer_queries"),
        ("query", "trackstar.stream_queries"),
        ("query", "trackstar.GenerationSettings"),
        ("pretrain", "trackstar.PretrainingConfig"),
        ("pretrain", "trackstar.pretrain"),
        ("explore", "trackstar.explorer.server.IndexOptions"),
    ],
)
def test_options_have_the_defaults_of_the_python_interface(command: str, function: str):
    home, _, name = function.rpartition(".")
    target = getattr(__import__(home, fromlist=[name]), name)
    aliases = {"k": "top"}
    options = {option.name: option for option in command_group.commands[command].params}
    compared = 0
    for parameter in inspect.signature(target).parameters.values():
        option = options.get(aliases.get(parameter.name, parameter.name))
        if isinstance(option, click.Option) and parameter.default is not parameter.empty and not option.required:
            compared += 1
            assert default_of(option) == parameter.default, parameter.name
    assert compared


@pytest.mark.parametrize(
    ("command", "flag", "choices"),
    [
        ("index", "--codec", CODECS),
        ("convert", "--codec", CODECS),
        ("index", "--dtype", DTYPES),
        ("index", "--output", OUTPUTS),
        ("index", "--projection", PROJECTIONS),
        ("index", "--coordinates", COORDINATES),
        ("index", "--second-moment-kind", SECOND_MOMENT_KINDS),
        ("pretrain", "--optimizer", OPTIMIZERS),
    ],
)
def test_choices_are_shown_and_checked(
    command: str, flag: str, choices: tuple[str, ...], capsys: pytest.CaptureFixture[str]
):
    (option,) = [option for option in command_group.commands[command].params if flag in option.opts]
    assert isinstance(option.type, click.Choice)
    assert tuple(option.type.choices) == choices
    page = help_page(command, "--help-all")
    assert f"{flag} [{choices[0]}|" in page
    for choice in choices:
        assert choice in page
    assert framework.run(command_group, [command, flag, "jpeg"]) == 1
    assert capsys.readouterr().err == f"trackstar: {flag}: expected one of {', '.join(choices)}, found jpeg\n"


@pytest.mark.parametrize("command", ["query", "add", "remove", "convert"])
def test_index_is_an_argument_or_an_option_but_not_both(command: str, capsys: pytest.CaptureFixture[str]):
    rest = {
        "query": ["--prompt", "a", "--completion", "b"],
        "add": ["--data", "d", "--out", "o"],
        "remove": ["--names", "n", "--out", "o"],
        "convert": ["--codec", "1-bit", "--out", "o"],
    }[command]
    assert framework.run(command_group, [command, "one", "--index", "two", *rest]) == 1
    assert capsys.readouterr().err == "trackstar: found both INDEX one and --index two; give one of them\n"
    if command != "query":
        assert framework.run(command_group, [command, *rest]) == 2
        assert f"trackstar {command}: Missing argument 'INDEX'. See" in capsys.readouterr().err


def test_rare_options_are_hidden_on_the_first_level():
    for name, command in command_group.commands.items():
        rare = [option for option in command.params if isinstance(option, RareOption)]
        page = help_page(name)
        for option in rare:
            assert not re.search(rf"^  {option.opts[0]}\b(?!-)", page, re.MULTILINE), option.opts
        assert bool(rare) == ("--help-all" in page)


# ---- The examples, run on what a small demo leaves -----------------------------------------------------------------


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `demo-out` as the demo leaves it, of a tiny model and few sentences."""
    folder = tmp_path_factory.mktemp("demo")
    out = folder / "demo-out"
    out.mkdir()
    capitals = {"FR": ("France", "Paris"), "IT": ("Italy", "Rome"), "JP": ("Japan", "Tokyo"), "PE": ("Peru", "Lima")}
    forms = ("The capital of {country} is {city}.", "{city} is the capital of {country}.", "{country} has {city}.")
    sentences, queries = [], []
    for code, (country, city) in capitals.items():
        for number, form in enumerate(forms):
            text = form.format(country=country, city=city)
            sentences.append({"id": f"capital-{code}-{number}", "text": text, "topic": "capital", "role": "fact"})
        prompt = f"The capital of {country} is"
        queries.append(
            {"fact_id": f"capital-{code}", "prompt0": prompt, "query_id": f"capital-{code}", "prompt": prompt,
             "completion": city}
        )  # fmt: skip
    for name, lines in (("corpus", sentences), ("queries", queries)):
        (out / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    shape = "--width 16 --layers 2 --heads 2 --mlp-width 24 --vocabulary 300 --context-tokens 32 --steps 2".split()
    before = Path.cwd()
    os.chdir(folder)
    try:
        train = ["pretrain", "--data", "demo-out/corpus.jsonl", "--out", "demo-out/model", *shape]
        assert framework.run(command_group, train) == 0
        checkpoint = "demo-out/model/checkpoint-000450"
        Path("demo-out/model/checkpoint-000002").rename(checkpoint)
        index = ["index", "--model", checkpoint, "--data", "demo-out/corpus.jsonl", "--out", "demo-out/index"]
        assert framework.run(command_group, [*index, "--side", "32", "--codec", "float16"]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.mark.parametrize("command", [name for name in PAGES if name not in NOT_RUN])
def test_example_runs_on_the_output_of_the_demo(command: str, demo_folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(demo_folder)
    for line in example_of(command).replace("\\\n", " ").splitlines():
        words = shlex.split(line)
        if words[0] != "trackstar":
            subprocess.run(["sh", "-ec", line], check=True)
            continue
        if command == "query":  # this model, trained for two steps, may say nothing after the prompt
            words = shlex.split(line.replace("--generate", "--completion Paris"))
        assert framework.run(command_group, words[1:]) == 0


def test_public_interface_is_what_the_defaults_were_compared_with():
    assert {"build_index", "answer_queries", "stream_queries", "PretrainingConfig"} <= set(trackstar.__all__)
