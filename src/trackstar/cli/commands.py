"""The commands: each turns options into one call of the Python interface and prints what that gives."""

import contextlib
import dataclasses
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from trackstar.cli.audit_command import audit
from trackstar.cli.framework import ERROR, INTERRUPTED, Group, RareOption, run
from trackstar.cli.framework import prepare as _prepare
from trackstar.errors import OptionError

if TYPE_CHECKING:
    from trackstar.examples import Query
    from trackstar.model import LanguageModel
    from trackstar.store import Index
    from trackstar.workers import Workers

Function = TypeVar("Function", bound=Callable[..., Any])


def _rare(*names: str, **settings: Any) -> Callable[[Function], Function]:
    return click.option(*names, cls=RareOption, **settings)


def _shared(function: Function) -> Function:
    """Options of every command that computes."""
    device = click.option("--device", default="cpu", metavar="NAME", help="cpu, cuda, cuda:1; auto: all GPUs.  [cpu]")
    threads = _rare("--threads", type=int, metavar="N", help="CPU threads.  [as torch chooses]")
    return device(threads(function))


def _clustered(function: Function) -> Function:
    """Options of the commands that a cluster can do."""
    for option in (
        _rare("--ray-gpus", type=float, metavar="N", help="GPUs of a worker.  [1 where there are any]"),
        _rare("--ray-cpus", type=int, default=1, metavar="N", help="CPU cores of a worker.  [1]"),
        _rare("--ray-workers", type=int, metavar="N", help="Most workers.  [all that have room]"),
        _rare("--ray", metavar="ADDRESS", help="Compute on a Ray cluster: auto, local, HOST:PORT."),
    ):
        function = option(function)
    return function


@contextlib.contextmanager
def _workers(ray: str | None, ray_workers: int | None, ray_cpus: int, ray_gpus: float | None) -> "Iterator[Workers]":
    """Who computes: this process, or a cluster's workers."""
    if ray is None:
        if ray_workers is not None or ray_gpus is not None:
            raise OptionError("--ray-workers, --ray-gpus: belong to a cluster; say which with --ray")
        from trackstar.workers import THIS_PROCESS

        yield THIS_PROCESS
        return
    from trackstar.cluster import RayWorkers

    with RayWorkers(ray, workers=ray_workers, cpus=ray_cpus, gpus=ray_gpus) as workers:
        yield workers


# Options of `query` that say how gradients are made where there is no index that says it.
_STREAMING = (
    "text_field", "id_field", "limit", "window_tokens", "second_moment", "whitening_examples", "side", "seed",
)  # fmt: skip
_CODECS = ("float32", "bfloat16", "float16", "int8", "4-bit", "2-bit", "1-bit")


@click.group(cls=Group)
@click.version_option(package_name="trackstar-tda", prog_name="trackstar", message="%(prog)s %(version)s")
def trackstar() -> None:
    """Which training examples made this language model say that?"""


@trackstar.command()
@click.option("--model", required=True, metavar="M", help="Model folder, .gguf file or hub name.")
@click.option("--data", required=True, metavar="D", help="Corpus: .jsonl, .txt, .parquet, a folder.")
@click.option("--out", required=True, metavar="IDX", help="The index's folder.")
@click.option("--text-field", default="text", metavar="NAME", help="Field that holds the text.  [text]")
@click.option("--id-field", metavar="NAME", help="Field that names an example.  [found]")
@click.option("--limit", type=int, metavar="N", help="Read the first N records only.")
@click.option("--second-moment", default="auto", metavar="V", help="auto, estimate, none, or optimizer state.  [auto]")
@click.option("--dtype", default="float32", metavar="TYPE", help="float32 or bfloat16 computation.  [float32]")
@click.option("--codec", default="1-bit", metavar="TYPE", help="float32 to 1-bit; see below.  [1-bit]")
@click.option("--side", type=int, default=64, metavar="N", help="φ has 16 blocks of side² numbers.  [64]")
@click.option("--batch-tokens", type=int, default=2048, metavar="N", help="Most tokens of a batch.  [2048]")
@_shared
@_rare("--window-tokens", type=int, metavar="N", help="Split longer documents.  [context or batch]")
@_rare("--overlap", type=int, default=1, metavar="N", help="Tokens a window repeats as context.  [1]")
@_rare("--layer-blocks", type=int, default=8, metavar="N", help="Blocks for attention, and for MLPs.  [8]")
@_rare("--attention-pattern", metavar="REGEX", help="Attention matrices; group 1: layer.")
@_rare("--mlp-pattern", metavar="REGEX", help="The same for MLP matrices.")
@_rare("--second-moment-kind", default="factored", metavar="KIND", help="factored or elementwise.  [factored]")
@_rare("--second-moment-examples", type=int, default=256, metavar="N", help="Estimate V from so many.  [256]")
@_rare("--output", default="loss", metavar="F", help="What is differentiated: loss, margin, logit.  [loss]")
@_rare("--projection", default="two-sided", metavar="P", help="two-sided or one-sided (small models).  [two-sided]")
@_rare("--coordinates", metavar="C", help="projected or whitened.  [whitened for int8 and fewer bits]")
@_rare("--whitening-examples", type=int, default=16_384, metavar="N", help="R_train for it from so many.  [16384]")
@_rare("--damping", type=float, metavar="X", help="Added to it, of its mean eigenvalue.  [shrinkage]")
@_rare("--seed", type=int, default=0, metavar="N", help="Of projections and samples.  [0]")
@_rare("--shard-examples", type=int, metavar="N", help="Examples a shard.  [64 MiB]")
@_rare("--shard", "share", metavar="I/N", help="As the I-th of N runs that make one index; then finish.")
@_rare("--revision", metavar="NAME", help="Revision of a hub's model.")
@_rare("--gguf-file", metavar="NAME", help="Which file of the folder holds GGUF weights.")
@_clustered
def index(
    *,
    model: str,
    data: str,
    out: str,
    threads: int | None,
    ray: str | None,
    ray_workers: int | None,
    ray_cpus: int,
    ray_gpus: float | None,
    **options: Any,
) -> None:
    """Index a corpus for a model; run again to resume.

    Codecs: float32, bfloat16, float16, int8, 4-bit, 2-bit, 1-bit.
    """
    _one_of("--second-moment-kind", options["second_moment_kind"], ("factored", "elementwise"))
    _one_of("--output", options["output"], ("loss", "margin", "logit"))
    _one_of("--projection", options["projection"], ("two-sided", "one-sided"))
    _one_of("--codec", options["codec"], _CODECS)
    if options["coordinates"] is not None:
        _one_of("--coordinates", options["coordinates"], ("projected", "whitened"))
    _prepare(threads)
    from trackstar.pipeline import build_index

    with _workers(ray, ray_workers, ray_cpus, ray_gpus) as workers:
        made = build_index(model, data, out, workers=workers, **options)
    if options["share"] is None or made.manifest.completion is not None:
        _tell(made)


@trackstar.command()
@click.argument("index", metavar="IDX")
@_rare("--threads", type=int, metavar="N", help="CPU threads.  [as torch chooses]")
def finish(*, index: str, threads: int | None) -> None:
    """Complete an index that index --shard I/N made."""
    _prepare(threads)
    from trackstar.arrays import finish_index

    _tell(finish_index(index))


@trackstar.command()
@click.option("--index", required=True, metavar="IDX", help="The index; it is left as it is.")
@click.option("--data", required=True, metavar="D", help="Further corpus: .jsonl, .txt, .parquet, a folder.")
@click.option("--out", required=True, metavar="NEW", help="The new index's folder.")
@click.option("--text-field", default="text", metavar="NAME", help="Field that holds the text.  [text]")
@click.option("--id-field", metavar="NAME", help="Field that names an example.  [found]")
@click.option("--limit", type=int, metavar="N", help="Read the first N records only.")
@click.option("--batch-tokens", type=int, default=2048, metavar="N", help="Most tokens of a batch.  [2048]")
@_shared
@_rare("--model", metavar="M", help="The model, where it is not where the index says.")
def add(*, index: str, data: str, out: str, threads: int | None, **options: Any) -> None:
    """An index with further examples; only theirs are computed."""
    _prepare(threads)
    from trackstar.growing import add_examples

    _tell(add_examples(index, data, out, **options))


@trackstar.command()
@click.argument("indexes", nargs=-1, required=True, metavar="IDX IDX...")
@click.option("--out", required=True, metavar="NEW", help="The new index's folder.")
@_rare("--threads", type=int, metavar="N", help="CPU threads.  [as torch chooses]")
def merge(*, indexes: tuple[str, ...], out: str, threads: int | None) -> None:
    """One index of several that were made alike."""
    _prepare(threads)
    from trackstar.rewriting import merge_indexes

    _tell(merge_indexes(indexes, out))


@trackstar.command()
@click.option("--index", required=True, metavar="IDX", help="The index; it is left as it is.")
@click.option("--names", required=True, metavar="FILE", help="Names of examples or documents, one a line.")
@click.option("--out", required=True, metavar="NEW", help="The new index's folder.")
@_rare("--threads", type=int, metavar="N", help="CPU threads.  [as torch chooses]")
def remove(*, index: str, names: str, out: str, threads: int | None) -> None:
    """An index without some of its examples."""
    _prepare(threads)
    from trackstar.examples import read_names
    from trackstar.rewriting import remove_examples

    _tell(remove_examples(index, read_names(names), out))


@trackstar.command()
@click.option("--index", required=True, metavar="IDX", help="The index; it is left as it is.")
@click.option("--codec", required=True, metavar="TYPE", help="Of no more bits: float16, int8, 4-bit, 2-bit, 1-bit.")
@click.option("--out", required=True, metavar="NEW", help="The new index's folder.")
@click.option("--damping", type=float, metavar="X", help="Added to R_train in whitening.  [shrinkage]")
@_rare("--threads", type=int, metavar="N", help="CPU threads.  [as torch chooses]")
def convert(*, index: str, codec: Any, out: str, damping: float | None, threads: int | None) -> None:
    """The same index stored in fewer bits."""
    _one_of("--codec", codec, _CODECS)
    _prepare(threads)
    from trackstar.rewriting import convert_index

    _tell(convert_index(index, out, codec=codec, damping=damping))


@trackstar.command()
@click.option("--index", metavar="IDX", help="Folder made by trackstar index.")
@click.option("--prompt", metavar="TEXT", help="What the model reads.")
@click.option("--completion", metavar="TEXT", help="What it says, to be explained.")
@click.option("--generate", is_flag=True, help="Explain what the model itself says.")
@click.option("--queries", metavar="FILE", help="JSON lines of prompts and completions.")
@click.option("--task", metavar="FILE", help="Queries that R_eval and λ come from.  [--queries]")
@click.option("--top", type=int, default=10, metavar="K", help="Proponents and opponents to show.  [10]")
@click.option("--out", metavar="FILE", help="Write results (.jsonl) and a report, no table.")
@click.option("--json", "as_json", is_flag=True, help="JSON lines on stdout, no table.")
@click.option("--mixing", type=float, metavar="X", help="λ, share of R_eval, 0 to 1.  [the paper's rule]")
@click.option("--damping", type=float, metavar="X", help="Added to R, of its mean eigenvalue.  [shrinkage]")
@click.option("--rerank", "reranked", type=int, metavar="N", help="Rank N again from gradients.  [by codec]")
@click.option("--exact", is_flag=True, help="Compute every candidate's gradient.")
@click.option("--data", metavar="D", help="Without --index: stream this corpus through --model.")
@_shared
@click.option("--model", metavar="M", help="The model, where it is not where the index says.")
@_rare("--prompt-field", metavar="NAME", help="Field of --queries that holds the prompt.  [found]")
@_rare("--query-set", metavar="NAME", help="Name of the set of queries in results.  [the file's]")
@_rare("--max-new-tokens", type=int, default=16, metavar="N", help="Most tokens to generate.  [16]")
@_rare("--batch-tokens", type=int, default=2048, metavar="N", help="Most tokens of a batch.  [2048]")
@_rare("--text-field", metavar="NAME", help="Of --data: field that holds the text.  [text]")
@_rare("--id-field", metavar="NAME", help="Of --data: field that names an example.  [found]")
@_rare("--limit", type=int, metavar="N", help="Of --data: read the first N records only.")
@_rare("--window-tokens", type=int, metavar="N", help="Of --data: split longer documents.  [context or batch]")
@_rare("--second-moment", metavar="V", help="With --data, as in index.  [auto]")
@_rare("--whitening-examples", type=int, metavar="N", help="With --data: R_train from so many.  [4096]")
@_rare("--side", type=int, metavar="N", help="With --data, as in index.  [64]")
@_rare("--seed", type=int, metavar="N", help="With --data: of projections and samples.  [0]")
@_clustered
def query(
    *,
    index: str | None,
    prompt: str | None,
    completion: str | None,
    generate: bool,
    queries: str | None,
    task: str | None,
    out: str | None,
    as_json: bool,
    model: str | None,
    prompt_field: str | None,
    query_set: str | None,
    max_new_tokens: int,
    device: str,
    threads: int | None,
    top: int,
    data: str | None,
    reranked: int | None,
    exact: bool,
    ray: str | None,
    ray_workers: int | None,
    ray_cpus: int,
    ray_gpus: float | None,
    **options: Any,
) -> None:
    """Which training examples moved the model towards a completion?"""
    _check_query_options(prompt, completion, generate, queries)
    given = {name: options.pop(name) for name in _STREAMING}
    streaming = {name: value for name, value in given.items() if value is not None}
    _check_source(index, data, model, streaming)
    if data is not None and (exact or reranked is not None):
        raise OptionError("--exact, --rerank: belong to an index; --data is gone through exactly")
    if data is not None and ray is not None:
        raise OptionError(f"--ray {ray}: goes with --index; --data is gone through by one process")
    if exact and reranked is not None:
        raise OptionError(f"--rerank {reranked}: --exact ranks every candidate from its gradient; give one of them")
    if (reranked is not None and 0 < reranked < top) or (reranked or 0) < 0:
        raise OptionError(f"--rerank {reranked}: expected at least as many as --top {top}, or 0 to leave it out")
    if max_new_tokens < 1:
        raise OptionError(f"--max-new-tokens {max_new_tokens}: expected 1 or more")
    _prepare(threads)
    from trackstar.audit import write_audit
    from trackstar.examples import Query, read_queries
    from trackstar.model import load_model
    from trackstar.pipeline import answer_queries
    from trackstar.provenance import model_of_index
    from trackstar.results import check_writable, release_lines, write_results
    from trackstar.store import Index
    from trackstar.streaming import stream_queries
    from trackstar.terminal import print_query_result

    if out is not None:
        check_writable(out)
    kept = Path(f"{out}.unfinished") if out is not None and data is not None else None
    asked = (
        read_queries(queries, prompt_field=prompt_field, needs_completion=not generate)
        if queries is not None
        else [Query(query_id="prompt", prompt=prompt or "", completion=completion or "")]
    )
    about = read_queries(task, prompt_field=prompt_field) if task is not None else None
    if index is not None:
        opened = Index.open(index)
        used = model_of_index(opened, model, device=device)
    else:
        opened, used = None, load_model(str(model), device=device)
    prompts = asked if generate else None
    if generate:
        asked = _with_own_completions(asked, used, max_new_tokens)
    if opened is not None:
        with _workers(ray, ray_workers, ray_cpus, ray_gpus) as workers:
            report = answer_queries(
                opened, asked, model=used, k=top, task=about, device=device, reranked=reranked, exact=exact,
                workers=workers, **options,
            )  # fmt: skip
    else:
        report = stream_queries(used, data, asked, k=top, task=about, kept=kept, **options, **streaming)
    name = query_set or (Path(queries).name.split(".")[0] if queries is not None else "prompt")
    if out is not None:
        lines, beside = write_results(report, out, query_set=name)
        audit = write_audit(
            report, out, query_set=name, prompt_field=prompt_field, prompts=prompts, max_new_tokens=max_new_tokens
        )
        if kept is not None:
            kept.unlink(missing_ok=True)
        _note(f"results: {lines}, how they were made: {beside}")
        _note(f"for others to verify: trackstar audit {audit}")
    for line in report.summary():
        _note(line)
    if as_json:
        for line in release_lines(report, query_set=name):
            click.echo(line)
    elif out is None:
        for result in report.results:
            print_query_result(result)


@trackstar.command()
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.option("--port", type=int, default=0, metavar="N", help="On 127.0.0.1.  [any that is free]")
@click.option("--no-browser", is_flag=True, help="Print the address only.")
@click.option("--task", metavar="FILE", help="Queries that R_eval and λ come from.  [R_train alone]")
@click.option("--embedding-model", metavar="E", help="Folder of a sentence-embedding model.")
@_shared
@_rare("--model", metavar="M", help="The model, where it is not where the index says.")
@_rare("--data", metavar="D", help="The corpus, likewise; its fields are shown.")
@_rare("--mixing", type=float, metavar="X", help="λ, share of R_eval, 0 to 1.  [the paper's rule]")
@_rare("--damping", type=float, metavar="X", help="Added to R, of its mean eigenvalue.  [shrinkage]")
@_rare("--rerank", "reranked", type=int, metavar="N", help="Rank N again from gradients.  [by codec, at most 100]")
@_rare("--batch-tokens", type=int, default=2048, metavar="N", help="Most tokens of a batch.  [2048]")
def explore(*, paths: tuple[str, ...], port: int, no_browser: bool, threads: int | None, **options: Any) -> int:
    """See results and an index in the browser: PATH is an index or a file of results."""
    _prepare(threads)
    for package in ("fastapi", "uvicorn", "bm25s", "ahocorasick_rs"):
        if importlib.util.find_spec(package) is None:
            raise OptionError(f"{package} is not installed; explore needs it: pip install 'trackstar-tda[explore]'")
    from trackstar.explorer.server import IndexOptions, serve

    try:
        serve(paths, IndexOptions(**options), port=port, browser=not no_browser, say=_note)
    except KeyboardInterrupt:
        _note("explorer: ended")
        return INTERRUPTED
    return 0


@trackstar.command()
@click.option("--config", required=True, metavar="FILE", help="Settings of the report (.toml).")
@click.option("--out", required=True, metavar="FOLDER", help="The report's folder.")
@_rare("--threads", type=int, metavar="N", help="CPU threads.  [as torch chooses]")
@_clustered
def evaluate(
    *,
    config: str,
    out: str,
    threads: int | None,
    ray: str | None,
    ray_workers: int | None,
    ray_cpus: int,
    ray_gpus: float | None,
) -> None:
    """The paper's tables on facts whose examples are known; resumable."""
    _prepare(threads)
    for package in ("bm25s", "ahocorasick_rs", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            raise OptionError(f"{package} is not installed; evaluate needs it: pip install 'trackstar-tda[evaluate]'")
    _on_this_machine(out)
    from trackstar.evaluation.config import read_config
    from trackstar.evaluation.run import run_evaluation
    from trackstar.evaluation.written import write_report

    with _workers(ray, ray_workers, ray_cpus, ray_gpus) as workers:
        report = run_evaluation(read_config(config), out, workers=workers)
    click.echo(f"{write_report(report, Path(out))}: {len(report.facts):,} queries, {report.candidates:,} candidates")


@trackstar.command()
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
@_shared
@_rare("--limit", type=int, metavar="N", help="Read the first N records only.")
@_rare("--tokenizer", metavar="T", help="Folder or hub name of a tokenizer.  [a new one]")
@_rare("--key-value-heads", type=int, metavar="N", help="Heads of keys and values.  [--heads]")
@_rare("--context-tokens", type=int, default=512, metavar="N", help="Most tokens read at once.  [512]")
@_rare("--tied-embeddings/--untied-embeddings", default=True, help="Whether the head is the embedding.  [tied]")
@_rare("--initial-spread", type=float, default=0.02, metavar="X", help="Of the initial weights.  [0.02]")
@_rare("--base-learning-rate", type=float, default=1.0, metavar="X", help="Over √max(step, warm-up).  [1]")
@_rare("--warmup-steps", type=int, default=10_000, metavar="N", help="Steps before the rate falls.  [10000]")
@_rare("--pool-examples", type=int, default=2048, metavar="N", help="Sort lengths within so many.  [2048]")
@_rare("--seed", type=int, default=0, metavar="N", help="Of weights and data order.  [0]")
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
    _one_of("--optimizer", settings["optimizer"], ("adafactor", "adamw"))
    _prepare(threads)
    _on_this_machine(out)
    from trackstar.examples import open_corpus
    from trackstar.pretraining import PretrainingConfig
    from trackstar.pretraining import pretrain as train

    config = PretrainingConfig(**settings)
    corpus = open_corpus(data, text_field=text_field, limit=limit)
    checkpoint = train(corpus, out, config, tokenizer=tokenizer, device=device)
    click.echo(f"{checkpoint}: index its corpus with trackstar index --model {checkpoint} --data {data} --out IDX")


@trackstar.command()
@click.argument("index")
def verify(index: str) -> int:
    """Read every byte of an index and compare it with its checksums."""
    from trackstar.store import verify as check

    report = check(index)
    for line in report.notes:
        _note(line)
    for line in report.problems:
        _note(line)
    amount = f"{len(report.good_shards)} shards with {report.rows:,} examples, {report.checked_bytes / 1e6:,.1f} MB"
    if report.ok:
        click.echo(f"{index}: {'whole' if report.completed else 'whole as far as it goes'}, {amount}")
        return 0
    click.echo(f"{index}: damaged in {len(report.problems)} places; good are {amount}", err=True)
    return ERROR


trackstar.add_command(audit)


@trackstar.command()
@click.option("--out", default="demo-out", metavar="FOLDER", help="Where everything goes.  [demo-out]")
@click.option("--seed", type=int, default=0, metavar="N", help="Of the demo's corpus.  [0]")
def demo(*, out: str, seed: int) -> None:
    """Train on real facts and show what moved the answers."""
    _prepare(None)
    _on_this_machine(out)
    from trackstar.demo.runner import run_demo

    run_demo(Path(out), seed=seed)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command `trackstar`."""
    sys.exit(run(trackstar, arguments))


def _check_source(index: str | None, data: str | None, model: str | None, streaming: Mapping[str, Any]) -> None:
    if index is not None and data is not None:
        raise OptionError("found both --index and --data; ask an index, or go through a corpus without one")
    if index is None and (data is None or model is None):
        raise OptionError("expected --index, or --data and --model to go through a corpus without an index")
    if index is not None and streaming:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in streaming)
        raise OptionError(f"{options}: with --data only; with --index it is what the index was made with")


def _check_query_options(prompt: str | None, completion: str | None, generate: bool, queries: str | None) -> None:
    if (prompt is None) == (queries is None):
        found = "neither" if prompt is None else "both"
        raise OptionError(f"found {found} of --prompt and --queries; expected one of them")
    if completion is not None and generate:
        raise OptionError("found both --completion and --generate; expected one of them")
    if prompt is not None and completion is None and not generate:
        raise OptionError(
            "--prompt: found nothing to explain; give --completion TEXT, or --generate to let the model answer"
        )
    if queries is not None and completion is not None:
        raise OptionError("--completion: goes with --prompt; with --queries each line has its own, or give --generate")


def _with_own_completions(queries: "Sequence[Query]", model: "LanguageModel", max_new_tokens: int) -> "list[Query]":
    """The same prompts with what the model itself says; a prompt after which it says nothing is left out and named."""
    from trackstar.generation import generate

    answered = []
    for query in queries:
        answer = generate(model, query.prompt, max_new_tokens=max_new_tokens)
        if answer:
            answered.append(dataclasses.replace(query, completion=answer))
        else:
            _note(f"query {query.query_id}: the model says nothing after the prompt, so it is left out")
    if not answered:
        raise OptionError("--generate: the model says nothing after the prompt; give --completion TEXT")
    return answered


def _tell(index: "Index") -> None:
    """What has been made, and how to ask it."""
    manifest = index.manifest
    click.echo(
        f"{index.path}: {index.rows:,} examples, {index.dimensions:,} dimensions, {manifest.codec}; ask it with "
        f"trackstar query --index {index.path}"
    )


def _on_this_machine(out: str) -> None:
    from trackstar.store import is_url

    if is_url(out):
        raise OptionError(f"--out {out}: a URL, expected a folder of this machine: only indexes can be elsewhere")


def _one_of(option: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise OptionError(f"{option} {value}: expected one of {', '.join(choices)}")


def _note(line: str) -> None:
    from trackstar.progress import printable

    click.echo(printable(line), err=True)
