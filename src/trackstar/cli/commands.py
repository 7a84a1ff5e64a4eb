"""The commands: each turns options into one call of the Python interface and prints what that gives.

Those of indexes, of queries and of audits have files of their own; here are the others, and the list of all.
"""

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from trackstar.cli.audit_command import audit
from trackstar.cli.framework import INTERRUPTED, Command, Group, prepare, run
from trackstar.cli.index_commands import add, convert, finish, index, merge, remove, verify
from trackstar.cli.options import chosen_workers, clustered, note, on_this_machine, one_of, rare, shared
from trackstar.cli.query_command import query
from trackstar.errors import OptionError


@click.group(cls=Group)
@click.version_option(package_name="trackstar-tda", prog_name="trackstar", message="%(prog)s %(version)s")
def trackstar() -> None:
    """Which training examples made this language model say that?"""


@click.command(cls=Command)
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.option("--port", type=int, default=0, metavar="N", help="On 127.0.0.1.  [any that is free]")
@click.option("--no-browser", is_flag=True, help="Print the address only.")
@click.option("--task", metavar="FILE", help="Queries that R_eval and λ come from.  [R_train alone]")
@click.option("--embedding-model", metavar="E", help="Folder of a sentence-embedding model.")
@shared
@rare("--model", metavar="M", help="The model, where it is not where the index says.")
@rare("--data", metavar="D", help="The corpus, likewise; its fields are shown.")
@rare("--mixing", type=float, metavar="X", help="λ, share of R_eval, 0 to 1.  [the paper's rule]")
@rare("--damping", type=float, metavar="X", help="Added to R, of its mean eigenvalue.  [shrinkage]")
@rare("--rerank", "reranked", type=int, metavar="N", help="Rank N again from gradients.  [by codec, at most 100]")
@rare("--batch-tokens", type=int, default=2048, metavar="N", help="Most tokens of a batch.  [2048]")
def explore(*, paths: tuple[str, ...], port: int, no_browser: bool, threads: int | None, **options: Any) -> int:
    """See results and an index in the browser: PATH is an index or a file of results."""
    prepare(threads)
    for package in ("fastapi", "uvicorn", "bm25s", "ahocorasick_rs"):
        if importlib.util.find_spec(package) is None:
            raise OptionError(f"{package} is not installed; explore needs it: pip install 'trackstar-tda[explore]'")
    from trackstar.explorer.server import IndexOptions, serve

    try:
        serve(paths, IndexOptions(**options), port=port, browser=not no_browser, say=note)
    except KeyboardInterrupt:
        note("explorer: ended")
        return INTERRUPTED
    return 0


@click.command(cls=Command)
@click.option("--config", required=True, metavar="FILE", help="Settings of the report (.toml).")
@click.option("--out", required=True, metavar="FOLDER", help="The report's folder.")
@rare("--threads", type=int, metavar="N", help="CPU threads.  [as torch chooses]")
@clustered
def evaluate(
    *,
    config: str,
    out: str,
    threads: int | None,
    ray: str | None,
    ray_workers: int | None,
    ray_cpus: int | None,
    ray_gpus: float | None,
) -> None:
    """The paper's tables on facts whose examples are known; resumable."""
    prepare(threads)
    for package in ("bm25s", "ahocorasick_rs", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            raise OptionError(f"{package} is not installed; evaluate needs it: pip install 'trackstar-tda[evaluate]'")
    on_this_machine(out)
    from trackstar.evaluation.config import read_config
    from trackstar.evaluation.run import run_evaluation
    from trackstar.evaluation.written import write_report

    with chosen_workers(ray, ray_workers, ray_cpus, ray_gpus) as workers:
        report = run_evaluation(read_config(config), out, workers=workers)
    click.echo(f"{write_report(report, Path(out))}: {len(report.facts):,} queries, {report.candidates:,} candidates")


@click.command(cls=Command)
@click.option("--data", required=True, metavar="D", help="Corpus: .jsonl, .txt, .parquet, a folder.")
@click.option("--out", required=True, metavar="RUN", help="Folder of the run's checkpoints.")
@click.option("--text-field", default="text", metavar="NAME", help="Field that holds the text.  [text]")
@click.option("--steps", type=int, default=10_000, metavar="N", help="Optimizer steps.  [10000]")
@click.option("--batch-tokens", type=int, default=4096, metavar="N", help="Most tokens of a batch.  [4096]")
@click.option("--width", type=int, default=256, metavar="N", help="Size of the hidden states.  [256]")
@click.option("--layers", type=int, default=6, metavar="N", help="Transformer layers.  [6]")
@click.option("--heads", type=int, default=4, metavar="N", help="Attention heads.  [4]")
@click.option("--mlp-width", type=int, default=1024, metavar="N", help="Size of the MLPs' hidden layer.  [1024]")
@click.option("--vocabulary", type=int, default=8192, metavar="N", help="Most tokens of a new tokenizer.  [8192]")
@click.option("--optimizer", default="adafactor", metavar="NAME", help="adafactor or adamw.  [adafactor]")
@click.option("--checkpoint-steps", type=int, default=1000, metavar="N", help="Steps between checkpoints.  [1000]")
@click.option("--device", default="cpu", metavar="NAME", help="cpu, cuda or cuda:1.  [cpu]")
@rare("--threads", type=int, metavar="N", help="CPU threads.  [as torch chooses]")
@rare("--limit", type=int, metavar="N", help="Read the first N records only.")
@rare("--tokenizer", metavar="T", help="Folder or hub name of a tokenizer.  [a new one]")
@rare("--key-value-heads", type=int, metavar="N", help="Heads of keys and values.  [--heads]")
@rare("--context-tokens", type=int, default=512, metavar="N", help="Most tokens read at once.  [512]")
@rare("--tied-embeddings/--untied-embeddings", default=True, help="Whether the head is the embedding.  [tied]")
@rare("--initial-spread", type=float, default=0.02, metavar="X", help="Of the initial weights.  [0.02]")
@rare("--base-learning-rate", type=float, default=1.0, metavar="X", help="Over √max(step, warm-up).  [1]")
@rare("--warmup-steps", type=int, default=10_000, metavar="N", help="Steps before the rate falls.  [10000]")
@rare("--pool-examples", type=int, default=2048, metavar="N", help="Sort lengths within so many.  [2048]")
@rare("--seed", type=int, default=0, metavar="N", help="Of weights and data order.  [0]")
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
    """Train a small Llama from scratch, keeping the optimizer's state."""
    one_of("--optimizer", settings["optimizer"], ("adafactor", "adamw"))
    prepare(threads)
    on_this_machine(out)
    from trackstar.corpus import open_corpus
    from trackstar.pretraining import PretrainingConfig
    from trackstar.pretraining import pretrain as train

    config = PretrainingConfig(**settings)
    corpus = open_corpus(data, text_field=text_field, limit=limit)
    checkpoint = train(corpus, out, config, tokenizer=tokenizer, device=device)
    click.echo(f"{checkpoint}: index its corpus with trackstar index --model {checkpoint} --data {data} --out IDX")


@click.command(cls=Command)
@click.option("--out", default="demo-out", metavar="FOLDER", help="Where everything goes.  [demo-out]")
@click.option("--seed", type=int, default=0, metavar="N", help="Of the demo's corpus.  [0]")
def demo(*, out: str, seed: int) -> None:
    """Train on real facts and show what moved the answers."""
    prepare(None)
    on_this_machine(out)
    from trackstar.demo.runner import run_demo

    run_demo(Path(out), seed=seed)


for _command in (
    index, finish, add, merge, remove, convert, query, explore, evaluate, pretrain, verify, audit, demo,
):  # fmt: skip
    trackstar.add_command(_command)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command `trackstar`."""
    sys.exit(run(trackstar, arguments))
