"""The group of all commands, and those that neither make, query nor audit an index.

Each command turns its options into one call of the Python interface and prints the result.
"""

import dataclasses
import importlib.util
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from trackstar.choices import DEMO_TASKS, OPTIMIZERS
from trackstar.cli.audit_command import audit
from trackstar.cli.framework import INTERRUPTED, TERMINATED, Command, Group, Terminated, prepare, run
from trackstar.cli.generate_command import generate
from trackstar.cli.index_commands import add, convert, finish, index, merge, remove, verify
from trackstar.cli.options import (
    BATCH_HELP,
    CORPUS_HELP,
    DAMPING_HELP,
    check_local,
    choice,
    chosen_device,
    chosen_workers,
    cluster_options,
    default,
    device_option,
    device_options,
    note,
    print_plan,
    rare,
    threads_option,
)
from trackstar.cli.query_command import query
from trackstar.cli.questions_command import questions
from trackstar.errors import OptionError


@click.group(cls=Group, example='trackstar query demo-out/index --prompt "The capital of France is" --completion Paris')
@click.version_option(package_name="trackstar-tda", prog_name="trackstar", message="%(prog)s %(version)s")
@click.pass_context
def trackstar(context: click.Context) -> None:
    """Find the training examples that moved a language model towards what it says.

    `trackstar COMMAND --help` explains a command. `trackstar demo` makes the files of the examples.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@click.command(cls=Command, example="trackstar explore demo-out/index demo-out/results.jsonl")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.option("--port", type=int, default=0, metavar="N", show_default="any free one", help="Port on 127.0.0.1.")
@click.option("--no-browser", is_flag=True, help="Only print the address.")
@click.option("--task", metavar="FILE", show_default="R_train alone", help="Queries to compute R_eval and λ from.")
@click.option("--embedding-model", metavar="MODEL", help="Folder of a sentence-embedding model.")
@device_options
@rare("--model", metavar="MODEL", show_default="the index's", help="Path to the model, if it has moved.")
@rare("--data", metavar="DATA", show_default="the index's", help="Path to the corpus, if it has moved.")
@rare("--mixing", type=float, metavar="X", show_default="the paper's rule", help="λ, the weight of R_eval, 0 to 1.")
@rare("--damping", type=float, metavar="C", show_default="shrinkage", help=DAMPING_HELP)
@rare(
    "--rerank",
    "reranked",
    type=int,
    metavar="N",
    show_default="by codec, at most 100",
    help="Re-rank the best N candidates from recomputed gradients.",
)
@rare("--batch-tokens", type=int, default=default("batch_tokens"), metavar="N", help=BATCH_HELP)
def explore(*, paths: tuple[str, ...], port: int, no_browser: bool, threads: int | None, **options: Any) -> int:
    """Explore results and an index in the browser.

    Each PATH is a file of results or an index, of which there can be one.
    """
    prepare(threads)
    _require("explore", ("fastapi", "uvicorn", "bm25s", "ahocorasick_rs"))
    from trackstar.explorer.server import IndexOptions, serve

    try:
        serve(paths, IndexOptions(**options), port=port, browser=not no_browser, note=note)
    except (KeyboardInterrupt, Terminated) as stop:
        note("explorer: stopped")
        return TERMINATED if isinstance(stop, Terminated) else INTERRUPTED
    return 0


@click.command(
    cls=Command,
    resumes=True,
    example="printf '%s\\n' 'model = \"model/checkpoint-000450\"' 'corpus = \"corpus.jsonl\"' \\\n"
    "    'facts = \"queries.jsonl\"' 'side = 32' > demo-out/facts.toml\n"
    "trackstar evaluate --config demo-out/facts.toml --out demo-out/report",
)
@click.option("--config", required=True, metavar="FILE", help="Settings of the report (.toml).")
@click.option("--out", required=True, metavar="FOLDER", help="Folder of the report.")
@click.option("--dry-run", is_flag=True, help="Print the plan (time, memory, disk) and write nothing.")
@threads_option
@cluster_options
def evaluate(
    *,
    config: str,
    out: str,
    dry_run: bool,
    threads: int | None,
    ray: str | None,
    ray_workers: int | None,
    ray_cpus: int | None,
    ray_gpus: float | None,
) -> None:
    """Compute the paper's tables for a model and a set of facts.

    The facts name the examples that state them. If a run is interrupted, run the same command again
    to resume.
    """
    prepare(threads)
    _require("evaluate", ("bm25s", "ahocorasick_rs", "matplotlib"))
    check_local(out)
    from trackstar.evaluation.config import read_config
    from trackstar.evaluation.report_files import write_report
    from trackstar.evaluation.run import planned_evaluation, run_evaluation
    from trackstar.store.files.outputs import inputs, refuse_input_folder

    refuse_input_folder(out, inputs(config=config))
    if dry_run:
        settings = read_config(config)
        device = chosen_device(settings.device, settings.device_map, ray=ray, has_workers=True)
        print_plan(planned_evaluation(dataclasses.replace(settings, device=device), out))
        return
    with chosen_workers(ray, ray_workers, ray_cpus, ray_gpus) as workers:
        settings = read_config(config)
        device = chosen_device(settings.device, settings.device_map, ray=ray, has_workers=True)
        report = run_evaluation(dataclasses.replace(settings, device=device), out, workers=workers)
    click.echo(f"{write_report(report, Path(out))}: {len(report.facts):,} queries, {report.candidates:,} candidates")


@click.command(
    cls=Command,
    resumes=True,
    example="trackstar pretrain --data demo-out/corpus.jsonl --out demo-out/other-model --steps 100 \\\n"
    "    --width 128 --layers 4 --mlp-width 512 --vocabulary 2048",
)
@click.option("--data", required=True, metavar="DATA", help=CORPUS_HELP)
@click.option("--out", required=True, metavar="RUN", help="Folder of the checkpoints.")
@click.option("--text-field", default="text", metavar="NAME", help="Field that holds the text.")
@click.option("--steps", type=int, default=10_000, metavar="N", help="Optimizer steps.")
@click.option("--batch-tokens", type=int, default=4096, metavar="N", help=BATCH_HELP)
@click.option("--width", type=int, default=256, metavar="N", help="Size of the hidden states.")
@click.option("--layers", type=int, default=6, metavar="N", help="Transformer layers.")
@click.option("--heads", type=int, default=4, metavar="N", help="Attention heads.")
@click.option("--mlp-width", type=int, default=1024, metavar="N", help="Size of the MLPs' hidden layer.")
@click.option("--vocabulary", type=int, default=8192, metavar="N", help="Maximum number of tokens of a new tokenizer.")
@choice("--optimizer", OPTIMIZERS, default="adafactor", help="The optimizer.")
@click.option("--checkpoint-steps", type=int, default=1000, metavar="N", help="Steps between checkpoints.")
@device_option
@threads_option
@rare("--limit", type=int, metavar="N", help="Read only the first N records.")
@rare("--tokenizer", metavar="NAME", show_default="a new one", help="Folder or hub name of a tokenizer.")
@rare("--key-value-heads", type=int, metavar="N", show_default="--heads", help="Heads of keys and values.")
@rare(
    "--context-tokens",
    type=int,
    default=512,
    metavar="N",
    help="Maximum number of tokens in a context.",
)
@rare("--tied-embeddings/--untied-embeddings", default=True, help="Whether the output head is the embedding.")
@rare(
    "--initial-spread",
    type=float,
    default=0.02,
    metavar="X",
    help="Standard deviation of the initial weights.",
)
@rare("--base-learning-rate", type=float, default=1.0, metavar="X", help="Divided by √max(step, warm-up steps).")
@rare("--warmup-steps", type=int, default=10_000, metavar="N", help="Steps before the learning rate falls.")
@rare("--pool-examples", type=int, default=2048, metavar="N", help="Examples per pool that is sorted by length.")
@rare("--seed", type=int, default=0, metavar="N", help="Seed of the weights and of the order of the data.")
def pretrain(
    *,
    data: str,
    out: str,
    text_field: str,
    limit: int | None,
    tokenizer: str | None,
    device: str,
    threads: int | None,
    **settings: Any,
) -> None:
    """Train a small Llama from scratch.

    Checkpoints in RUN keep the optimizer's state, which `trackstar index` reads V from. If a run is
    interrupted, run the same command again to resume.
    """
    prepare(threads)
    check_local(out)
    from trackstar.corpus import open_corpus
    from trackstar.pretraining import PretrainingConfig
    from trackstar.pretraining import pretrain as train

    config = PretrainingConfig(**settings)
    corpus = open_corpus(data, text_field=text_field, limit=limit)
    checkpoint = train(corpus, out, config, tokenizer=tokenizer, device=chosen_device(device))
    click.echo(f"{checkpoint}: index its corpus with: trackstar index --model {checkpoint} --data {data} --out INDEX")


@click.command(
    cls=Command,
    resumes=True,
    example="trackstar demo --out demo-out\ntrackstar demo --task arithmetic --out demo-sums",
)
@choice("--task", DEMO_TASKS, default="facts", help="Facts of the real world, or sums of two numbers.")
@click.option("--out", default="demo-out", metavar="FOLDER", help="Folder of everything that the demo makes.")
@click.option("--seed", type=int, default=0, metavar="N", help="Seed of the demo's corpus.")
def demo(*, task: str, out: str, seed: int) -> None:
    """Train a model on real facts or on sums and explain its answers.

    Makes a corpus, a model, indexes and results in a few minutes on two cores. If a run is
    interrupted, run the same command again to resume.
    """
    prepare(None)
    check_local(out)
    from trackstar.attribution.terminal import print_line

    if task == "arithmetic":
        from trackstar.demo.arithmetic_runner import run_arithmetic_demo

        files = run_arithmetic_demo(Path(out), seed=seed).files
    else:
        from trackstar.demo.runner import run_demo

        files = run_demo(Path(out), seed=seed).files
    command = started_as()
    print_line(f"Everything is in {out}. Ask your own questions:")
    print_line(f'   {command} query {files.index} --prompt "{files.prompt}" --generate')
    print_line(f"   {command} query {files.index} --queries {files.queries} --out answers.jsonl")
    print_line(f"   {command} explore {files.index} {files.results}")


@click.command(cls=Command, example="trackstar microscope --out demo-out/microscope")
@click.option("--data", metavar="FILE", show_default="scikit-learn's digits", help="Images x and classes y (.npz).")
@click.option("--out", default="microscope", metavar="FOLDER", help="Folder of page, notebook, numbers and figures.")
@click.option("--seeds", type=int, default=5, metavar="N", help="Networks of each kind.")
@rare("--force", is_flag=True, help="Replace the files of an earlier run.")
@threads_option
def microscope(*, data: str | None, out: str, seeds: int, force: bool, threads: int | None) -> None:
    """Take the method's equation apart on small networks.

    Trains networks on images of digits, and measures what each part of Eq. 2 does.
    """
    prepare(threads)
    _require("microscope", ("sklearn", "matplotlib"))
    check_local(out)
    from trackstar.attribution.terminal import print_line
    from trackstar.microscope.runner import run_microscope
    from trackstar.microscope.study import Settings

    done = run_microscope(out, data, settings=Settings(seeds=seeds), force=force)
    for claim in done.study.claims:
        found = claim.difference
        print_line(
            f"{claim.verdict}: {claim.statement} ({found.mean:+.1f} points [{found.low:+.1f}, {found.high:+.1f}])"
        )
    print_line(f"page: {done.files['microscope.md']}; notebook: {done.files['microscope.ipynb']}")


trackstar.add_section("Make and change indexes", [index, finish, add, merge, remove, convert, verify])
trackstar.add_section("Query", [query, explore, audit])
trackstar.add_section("Evaluate", [evaluate, generate, questions, demo, microscope])
trackstar.add_section("Train", [pretrain])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command `trackstar` and exit with its status."""
    sys.exit(run(trackstar, arguments))


def started_as() -> str:
    """The command as it was started: `trackstar`, or its script's path if that is not on the search path."""
    started = Path(sys.argv[0])
    if started.name == "__main__.py":
        return f"{shlex.quote(sys.executable)} -m trackstar"
    if started.name != "trackstar" or started.parent == Path() or shutil.which("trackstar") == sys.argv[0]:
        return "trackstar"
    return shlex.quote(sys.argv[0])


def _require(extra: str, packages: Sequence[str]) -> None:
    """Raise if a package of an extra is not installed.

    Raises:
        OptionError: A package is missing; the message names it and the extra.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise OptionError(f"{package} is not installed; {extra} needs it: pip install 'trackstar-tda[{extra}]'")
