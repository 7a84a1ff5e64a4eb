"""The command line: start-up, the frozen options, each command, interrupts."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest

import trackstar
from trackstar.cli import framework
from trackstar.cli import trackstar as command_group
from trackstar.cli.commands import started_as
from trackstar.cli.framework import RareOption
from trackstar.store import Index

COMMANDS = [
    "index", "finish", "add", "merge", "remove", "convert", "verify", "query", "explore", "audit", "evaluate",
    "generate", "questions", "demo", "microscope", "pretrain",
]  # fmt: skip
CAPITALS = {"France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Peru": "Lima", "Kenya": "Nairobi", "Cuba": "Havana"}
TEXTS = [
    text
    for country, city in CAPITALS.items()
    for text in (f"The capital of {country} is {city}.", f"{city} is the largest city of {country}.")
]


def run(*arguments: object) -> int:
    return framework.run(command_group, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "capitals.jsonl"
    lines = [json.dumps({"id": f"c{number}", "text": text}) for number, text in enumerate(TEXTS)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def index_folder(tiny_model_folder: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "index"
    assert (
        run("index", "--model", tiny_model_folder, "--data", corpus, "--out", out, "--side", 4, "--codec", "float16")
        == 0
    )
    return out


@pytest.fixture
def queries(tmp_path: Path) -> Path:
    path = tmp_path / "capitals-asked.jsonl"
    lines = [
        json.dumps(
            {
                "fact_id": f"f-{country}",
                "relation": "capital",
                "prompt0": f"The capital of {country} is",
                "entity1": city,
            }
        )
        for country, city in [*CAPITALS.items(), ("Egypt", "Cairo"), ("Spain", "Madrid")]
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


# ---- Help and start-up -------------------------------------------------------------------------------------------


def test_help_imports_nothing_heavy():
    program = (
        "import sys; from trackstar.cli import framework, trackstar; framework.run(trackstar, ['index', '--help']); "
        "print([m for m in ('torch', 'transformers', 'numpy', 'pandas', 'rich', 'datasets') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_commands_are_frozen():
    assert list(command_group.commands) == COMMANDS


@pytest.mark.parametrize("command", ["index", "query", "pretrain", "audit"])
def test_rare_options_are_on_the_second_level_of_help_alone(command: str, capsys: pytest.CaptureFixture[str]):
    rare = [option for option in command_group.commands[command].params if isinstance(option, RareOption)]
    assert rare
    run(command, "--help")
    first = capsys.readouterr().out
    run(command, "--help-all")
    second = capsys.readouterr().out
    for option in rare:
        assert f"{option.opts[0]} " not in first
        assert f"{option.opts[0]} " in second or f"{option.opts[0]} /" in second
    assert all(option.help for option in command_group.commands[command].params if isinstance(option, click.Option))


def test_options_are_frozen():
    """Renaming an option breaks users' scripts: a change of this list goes into the changelog."""
    found = {
        name: sorted(opt for parameter in command.params for opt in parameter.opts + parameter.secondary_opts)
        for name, command in command_group.commands.items()
    }
    assert found == {
        "index": sorted(
            "--model --data --out --text-field --id-field --limit --duplicate-ids --second-moment --dtype --codec "
            "--format --train-on --join --chat-template --metadata --truncate --pack --parameters "
            "--batch-tokens --device --device-map --dry-run --threads --window-tokens --overlap --side --layer-blocks "
            "--attention-pattern --mlp-pattern "
            "--second-moment-kind --second-moment-examples --output --projection --seed --shard-examples "
            "--revision --gguf-file --coordinates --whitening-examples --damping --shard --preset "
            "--ray --ray-workers --ray-cpus --ray-gpus --help-all".split()
        ),
        "query": sorted(
            "index --index --prompt --completion --generate --queries --task --top --out --force --json "
            "--mixing --damping "
            "--device --device-map --dry-run --threads --model --prompt-field --query-set --batch-tokens --rerank "
            "--exact "
            "--join --max-new-tokens --temperature --top-p --sampling-seed --stop --chat "
            "--data --text-field --id-field --limit --duplicate-ids --window-tokens --second-moment "
            "--format --train-on --chat-template --truncate --pack --parameters --whitening-examples --side --seed "
            "--ray --ray-workers --ray-cpus --ray-gpus --help-all".split()
        ),
        "finish": sorted("index --threads --help-all".split()),
        "add": sorted(
            "index --index --data --out --text-field --id-field --limit --duplicate-ids --batch-tokens "
            "--format --train-on --join --chat-template --metadata "
            "--device --device-map --threads "
            "--model --help-all".split()
        ),
        "merge": sorted("indexes --out --duplicate-ids --threads --help-all".split()),
        "remove": sorted("index --index --names --out --threads --help-all".split()),
        "convert": sorted("index --index --codec --out --damping --threads --help-all".split()),
        "explore": sorted(
            "paths --port --no-browser --task --embedding-model --device --device-map --threads --model --data "
            "--mixing --damping "
            "--rerank --batch-tokens --help-all".split()
        ),
        "generate": sorted(
            "--model --queries --out --samples --max-new-tokens --temperature --top-p --sampling-seed --stop --chat "
            "--device --device-map --threads --prompt-field --chat-template --force --help-all".split()
        ),
        "questions": sorted("--task --count --out --seed --force --help-all".split()),
        "evaluate": sorted(
            "--config --out --dry-run --threads --ray --ray-workers --ray-cpus --ray-gpus --help-all".split()
        ),
        "pretrain": sorted(
            "--data --out --text-field --steps --batch-tokens --width --layers --heads --mlp-width --vocabulary "
            "--optimizer --checkpoint-steps --device --threads --limit --tokenizer --key-value-heads --context-tokens "
            "--tied-embeddings --untied-embeddings --initial-spread --base-learning-rate --warmup-steps "
            "--pool-examples --seed --help-all".split()
        ),
        "verify": ["index"],
        "audit": sorted(
            "audit --results --index --model --data --queries --task --again --second-moment --device "
            "--device-map --threads --chat-template --help-all".split()
        ),
        "demo": ["--out", "--seed", "--task"],
        "microscope": sorted("--data --out --seeds --force --threads --help-all".split()),
    }


def test_public_names_are_frozen_and_can_be_imported():
    assert trackstar.__all__ == sorted(trackstar.__all__)
    for name in trackstar.__all__:
        assert getattr(trackstar, name).__doc__, name
    assert set(trackstar.__all__) <= set(dir(trackstar))
    with pytest.raises(AttributeError, match="no attribute 'nothing_of_the_kind'"):
        _ = trackstar.nothing_of_the_kind  # pyright: ignore[reportAttributeAccessIssue]


# ---- The commands ------------------------------------------------------------------------------------------------


def test_index_reports_its_coverage_and_the_source_of_v(
    tiny_model_folder: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "index"
    arguments = (
        "index",
        "--model",
        tiny_model_folder,
        "--data",
        corpus,
        "--out",
        out,
        "--side",
        4,
        "--codec",
        "float16",
    )
    assert run(*arguments) == 0
    shown = capsys.readouterr()
    assert f"{out}: 12 examples, 96 dimensions, float16" in shown.out
    assert "21 attention and MLP matrices" in shown.err
    assert "matrices left out: model.embed_tokens.weight, lm_head.weight" in shown.err
    assert "second moment: factored, estimated from 256 examples drawn with seed 0" in shown.err
    assert run(*arguments) == 0
    assert "the index is complete, with 12 examples" in capsys.readouterr().err


def test_prompt_and_completion_give_a_table_and_its_settings(index_folder: Path, capsys: pytest.CaptureFixture[str]):
    prompt = "The capital of France is"
    assert run("query", "--index", index_folder, "--prompt", prompt, "--completion", "Paris", "--top", 3) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("The capital of France is ⟦Paris⟧   P = ")
    rows = [line.split() for line in shown.out.splitlines()[1:] if line.strip()]
    proponents = [row for row in rows if row[0].startswith("+")]
    assert len(proponents) == 3
    influences = [float(row[0]) for row in proponents]
    assert influences == sorted(influences, reverse=True)
    assert "λ = 0.0000 (R_train alone: R_eval needs 8 queries or more in --task, found 1)" in shown.err
    assert "damping " in shown.err
    assert "12 candidates" in shown.err


def test_queries_of_the_release_give_lines_of_the_release_and_a_report(
    index_folder: Path, queries: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "results" / "answers.jsonl"
    assert run("query", "--index", index_folder, "--queries", queries, "--top", 2, "--out", out) == 0
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [line["example_id"] for line in lines] == [f"f-{c}" for c in [*CAPITALS, "Egypt", "Spain"]]
    first = lines[0]
    assert list(first)[:11] == [
        "example_id", "query_set", "inputs_plaintext", "separator", "targets_plaintext", "proponents", "proponent_ids",
        "proponent_scores", "opponents", "opponent_ids", "opponent_scores",
    ]  # fmt: skip
    assert (first["query_set"], first["inputs_plaintext"], first["targets_plaintext"]) == (
        "capitals-asked", "The capital of France is", "Paris",
    )  # fmt: skip
    assert (first["fact_id"], first["relation"], first["entity1"]) == ("f-France", "capital", "Paris")
    assert first["proponents"] == [TEXTS[int(name.removeprefix("c"))] for name in first["proponent_ids"]]
    assert first["proponent_scores"] == sorted(first["proponent_scores"], reverse=True)
    assert first["opponent_scores"] == sorted(first["opponent_scores"])
    report = json.loads((tmp_path / "results" / "answers.report.json").read_text(encoding="utf-8"))
    assert 0 < report["mixing"]["value"] < 1
    assert report["mixing"]["queries"] == 8
    assert len(report["mixing"]["evaluation_spectrum"]) > 0 < len(report["mixing"]["train_spectrum"])
    assert "21 attention and MLP matrices" in report["coverage"]
    assert [query["query_id"] for query in report["queries"]] == [line["example_id"] for line in lines]
    captured = capsys.readouterr()
    assert captured.out == ""  # with --out, results go to the file only
    shown = captured.err
    assert re.search(r"R_eval, from 8 queries: rank \d+ over all blocks", shown)
    assert re.search(r"R_train: rank \d+ over all blocks", shown)


def test_results_can_be_read_as_queries(index_folder: Path, queries: Path, tmp_path: Path):
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    assert run("query", "--index", index_folder, "--queries", queries, "--out", first) == 0
    assert run("query", "--index", index_folder, "--queries", first, "--out", second, "--query-set", "first") == 0
    scores = [
        [json.loads(line)["proponent_scores"] for line in path.read_text(encoding="utf-8").splitlines()]
        for path in (first, second)
    ]
    assert scores[0] == scores[1]


def test_task_of_other_queries_determines_lambda(index_folder: Path, queries: Path, capsys: pytest.CaptureFixture[str]):
    asked = ("query", "--index", index_folder, "--prompt", "The capital of Peru is", "--completion", "Lima")
    assert run(*asked, "--task", queries, "--json") == 0
    shown = capsys.readouterr()
    assert "R_eval, from 8 queries" in shown.err
    assert json.loads(shown.out)["query_set"] == "prompt"


def test_generate_explains_the_models_own_completion(
    index_folder: Path, tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    prompt = "The capital of Peru is"
    settings = trackstar.GenerationSettings(max_new_tokens=4)
    generation = trackstar.generate(trackstar.load_model(tiny_model_folder), prompt, settings)
    said = generation.text
    assert said.strip()
    assert run("query", "--index", index_folder, "--prompt", prompt, "--generate", "--max-new-tokens", 4, "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["targets_plaintext"] == said
    assert answer["input_ids"] == list(generation.token_ids)
    assert answer["labels"] == [-100] * len(generation.prompt_ids) + [token.token_id for token in generation.tokens]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": prompt}) + "\n" + json.dumps({"prompt": "Berlin", "completion": "x"}))
    command = ("query", "--index", index_folder, "--queries", prompts, "--generate", "--max-new-tokens", 4, "--json")
    assert run(*command) == 0
    answers = [json.loads(line)["targets_plaintext"] for line in capsys.readouterr().out.splitlines()]
    assert answers[0] == said
    assert answers[1] not in ("", "x")


def test_generated_answer_is_the_likeliest_token_each_time(tiny_model_folder: Path):
    import torch

    model = trackstar.load_model(tiny_model_folder)
    token_ids = model.tokenizer("The capital of Peru is")["input_ids"]
    start = len(token_ids)
    for _ in range(6):
        token_ids = [*token_ids, int(model.module(input_ids=torch.tensor([token_ids])).logits[0, -1].argmax())]
        if token_ids[-1] in (1, 2):
            break
    generation = trackstar.generate(
        model, "The capital of Peru is", trackstar.GenerationSettings(max_new_tokens=6, stop="end")
    )
    assert list(generation.token_ids) == [token for token in token_ids if token not in (1, 2)]
    assert generation.prompt_ids == tuple(token_ids[:start])


def test_pretrained_checkpoint_is_indexed_with_its_own_optimizer_state(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shape = "--width 16 --layers 2 --heads 2 --mlp-width 24 --vocabulary 300 --context-tokens 32".split()
    run_folder = tmp_path / "run"
    assert run("pretrain", "--data", corpus, "--out", run_folder, "--steps", 6, "--checkpoint-steps", 3, *shape) == 0
    checkpoint = run_folder / "checkpoint-000006"
    assert f"trackstar index --model {checkpoint}" in capsys.readouterr().out
    assert (
        run(
            "index",
            "--model",
            checkpoint,
            "--data",
            corpus,
            "--out",
            tmp_path / "index",
            "--side",
            4,
            "--codec",
            "float16",
        )
        == 0
    )
    assert "optimizer.safetensors (Adafactor (transformers) at step 6)" in capsys.readouterr().err
    assert Index.open(tmp_path / "index").manifest.second_moment.kind == "factored"


def test_verify_distinguishes_an_undamaged_index_from_a_damaged_one(
    tiny_model_folder: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "index"
    assert (
        run("index", "--model", tiny_model_folder, "--data", corpus, "--out", out, "--side", 4, "--codec", "float16")
        == 0
    )
    assert run("verify", out) == 0
    assert f"{out}: undamaged, 1 shards with 12 examples" in capsys.readouterr().out
    shard = out / "shards" / "000000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-40] ^= 1
    shard.write_bytes(content)
    assert run("verify", out) == 1
    shown = capsys.readouterr().err
    assert str(shard) in shown
    assert "1 faults; undamaged: " in shown


def test_report_becomes_a_table_with_one_row_per_ranked_candidate(index_folder: Path):
    query = trackstar.Query(query_id="q", prompt="The capital of France is", completion="Paris")
    report = trackstar.answer_queries(index_folder, [query], k=3, progress=False)
    frame = report.to_dataframe()
    assert list(frame["role"]) == ["proponent"] * 3 + ["opponent"] * 3
    assert list(frame["rank"]) == [1, 2, 3, 1, 2, 3]
    assert list(frame["text"][:3]) == [ranked.text for ranked in report.results[0].proponents]
    assert frame["probability"].tolist() == pytest.approx([report.results[0].probability] * 6)


def test_closed_stdout_ends_the_command_without_a_traceback(index_folder: Path, queries: Path):
    program = "from trackstar.cli import main; main()"
    command = [
        sys.executable,
        "-c",
        program,
        "query",
        "--index",
        str(index_folder),
        "--queries",
        str(queries),
        "--json",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    stderr = process.stderr.read()
    assert process.wait(60) == 1
    assert "Traceback" not in stderr
    assert "BrokenPipe" not in stderr
    process.stderr.close()


# ---- Hostile text, interrupts --------------------------------------------------------------------------------------


def test_text_with_terminal_controls_is_shown_without_them(
    tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    corpus = tmp_path / "hostile.jsonl"
    hostile = ["\x1b[31mred\x1b[0m text here", "back \u202e wards it goes", "bell \x07 and [bold]markup[/bold]"]
    corpus.write_text("\n".join(json.dumps({"text": text}) for text in hostile), encoding="utf-8")
    out = tmp_path / "index"
    assert (
        run("index", "--model", tiny_model_folder, "--data", corpus, "--out", out, "--side", 2, "--codec", "float16")
        == 0
    )
    assert run("query", "--index", out, "--prompt", "red", "--completion", "text \x1b[2J here") == 0
    shown = capsys.readouterr().out
    assert not set("\x1b\x07\u202e") & set(shown)
    assert "[bold]markup[/bold]" in shown


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_index_says_so_in_one_line_and_is_resumed_later(
    number: signal.Signals, status: int, tiny_model_folder: Path, tmp_path: Path
):
    corpus, out = tmp_path / "long.jsonl", tmp_path / "index"
    with corpus.open("w", encoding="utf-8") as file:
        for place in range(3000):
            file.write(json.dumps({"text": f"The capital of {place} is {place * 7}."}) + "\n")
    # A shell's background jobs, such as a whole test run can be, ignore interrupts, and so do their children.
    started = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from trackstar.cli import main; main()"
    )
    command = [
        sys.executable, "-c", started, "index", "--model", str(tiny_model_folder),
        "--data", str(corpus), "--out", str(out), "--side", "4", "--codec", "float16", "--shard-examples", "16",
        "--threads", "1",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONWARNINGS": "default"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    while not (out / "shards" / "000002.safetensors").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == status
    assert stderr.splitlines()[-1].startswith("trackstar: interrupted; run the same command again to resume")
    assert "Traceback" not in stderr
    kept = len(list((out / "shards").glob("*.safetensors")))
    assert kept >= 3
    assert run("index", "--model", tiny_model_folder, "--data", corpus, "--out", out, "--side", 4, "--codec", "float16",
               "--shard-examples", 16, "--threads", 1) == 0  # fmt: skip
    assert Index.open(out).rows == 3000


@pytest.mark.parametrize(
    ("words", "resumes"),
    [
        ("index --model m --data d --out o", True), ("add i --data d --out o", True), ("finish i", True),
        ("merge a b --out o", True), ("remove i --names n --out o", True), ("convert i --codec 1-bit --out o", True),
        ("evaluate --config c --out o", True), ("pretrain --data d --out o", True), ("demo", True),
        ("query --data d --model m --prompt p --completion c --out o", True),
        ("query i --prompt p --completion c --exact", True),
        ("query --data d --model m --prompt p --completion c", False),
        ("query i --prompt p --completion c --out o", False),
        ("verify i", False), ("audit a", False),
    ],
)  # fmt: skip
@pytest.mark.parametrize(("stop", "status"), [(KeyboardInterrupt, 130), (framework.Terminated, 143)])
def test_interrupt_promises_to_resume_only_where_the_command_does(
    words: str, resumes: bool, stop: type[BaseException], status: int, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    def stopped(*_arguments: object, **_options: object) -> None:
        raise stop

    monkeypatch.setattr(command_group.commands[words.split()[0]], "callback", stopped)
    assert run(*words.split()) == status
    expected = "interrupted; run the same command again to resume" if resumes else "interrupted"
    assert capsys.readouterr().err.strip() == f"trackstar: {expected}"


@pytest.mark.parametrize(
    ("words", "missing"),
    [
        ("index", "options '--model', '--data', '--out'"), ("index --model m --out o", "option '--data'"),
        ("add", "argument 'INDEX' and options '--data', '--out'"), ("add --data d --out o", "argument 'INDEX'"),
        ("remove --index i --names n", "option '--out'"), ("verify", "argument 'INDEX'"),
    ],
)  # fmt: skip
def test_all_missing_parameters_are_named_at_once(words: str, missing: str, capsys: pytest.CaptureFixture[str]):
    assert run(*words.split()) == 2
    assert f": Missing {missing}. See" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["query", "verify"])
def test_index_in_its_first_pass_is_no_missing_index(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "part").mkdir()
    question = ["--prompt", "p", "--completion", "c"] if command == "query" else []
    assert run(command, tmp_path, *question) == 1
    shown = capsys.readouterr().err
    assert "the index is being made and has no example yet (its first pass over the corpus is not finished)" in shown
    assert "run trackstar index with the same settings again to resume it" in shown


def test_demo_prints_the_command_that_started_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    script = tmp_path / "bin dir" / "trackstar"
    for started, expected in (
        ("trackstar", "trackstar"), (str(script), f"'{script}'"), ("-c", "trackstar"),
        (".venv/bin/trackstar", ".venv/bin/trackstar"), ("/x/trackstar/__main__.py", f"{sys.executable} -m trackstar"),
    ):  # fmt: skip
        monkeypatch.setattr(sys, "argv", [started])
        assert started_as() == expected
    script.parent.mkdir()
    script.touch(0o755)
    monkeypatch.setenv("PATH", str(script.parent))
    monkeypatch.setattr(sys, "argv", [str(script)])
    assert started_as() == "trackstar"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            ["--limit", "99999999999999999999"],
            "--limit: expected a number of at most 64 bits, found 99999999999999999999",
        ),
        (["--side", str(2**63)], "--side: expected less than 2^63, found 9223372036854775808"),
        (["--threads", "10000"], f"--threads: expected at most the number of cores, {os.cpu_count()} on this machine"),
        (["--damping", "nan"], "--damping: expected a finite number, found nan"),
        (["--ray-gpus", "inf"], "--ray-gpus: expected a finite number, found inf"),
        (["--text-field", ""], "--text-field: expected a value, found an empty text"),
        (["--data", "a\0b"], "--data: expected text without NUL bytes"),
        (["--data", "caf\udce9.jsonl"], "--data: expected text in UTF-8, found 'caf\\udce9.jsonl'"),
        (["--data", "x/" * 3000], "--data: expected at most 4,096 bytes, found 6,000"),
        (["--seed", "-1"], "--seed: expected 0 or more, found -1"),
        (["--shard", "1/99999999999"], "--shard: expected i/n"),
    ],
)
def test_value_that_cannot_be_meant_is_refused_in_one_line(
    options: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    data = [] if "--data" in options else ["--data", str(tmp_path / "none.jsonl")]
    assert run("index", "--model", tmp_path / "none", *data, "--out", tmp_path / "out", *options) == 1
    shown = capsys.readouterr().err
    assert expected in shown
    assert shown.startswith("trackstar: ")
    assert shown.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
