"""The command `trackstar query`: what is asked, of which index or corpus, and how the answer is shown and kept."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trackstar.cli.framework import Command, prepare
from trackstar.cli.options import chosen_workers, clustered, note, rare, shared
from trackstar.errors import OptionError

if TYPE_CHECKING:
    from trackstar.corpus import Query
    from trackstar.model.language_model import LanguageModel

# Options that say how gradients are made where there is no index that says it.
_STREAMING = (
    "text_field", "id_field", "limit", "window_tokens", "second_moment", "whitening_examples", "side", "seed",
)  # fmt: skip


@click.command(cls=Command)
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
@shared
@click.option("--model", metavar="M", help="The model, where it is not where the index says.")
@rare("--prompt-field", metavar="NAME", help="Field of --queries that holds the prompt.  [found]")
@rare("--query-set", metavar="NAME", help="Name of the set of queries in results.  [the file's]")
@rare("--max-new-tokens", type=int, default=16, metavar="N", help="Most tokens to generate.  [16]")
@rare("--batch-tokens", type=int, default=2048, metavar="N", help="Most tokens of a batch.  [2048]")
@rare("--text-field", metavar="NAME", help="Of --data: field that holds the text.  [text]")
@rare("--id-field", metavar="NAME", help="Of --data: field that names an example.  [found]")
@rare("--limit", type=int, metavar="N", help="Of --data: read the first N records only.")
@rare("--window-tokens", type=int, metavar="N", help="Of --data: split longer documents.  [context or batch]")
@rare("--second-moment", metavar="V", help="With --data, as in index.  [auto]")
@rare("--whitening-examples", type=int, metavar="N", help="With --data: R_train from so many.  [4096]")
@rare("--side", type=int, metavar="N", help="With --data, as in index.  [64]")
@rare("--seed", type=int, metavar="N", help="With --data: of projections and samples.  [0]")
@clustered
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
    ray_cpus: int | None,
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
    prepare(threads)
    from trackstar.attribution.answering import answer_queries
    from trackstar.attribution.results import check_writable, release_lines, write_results
    from trackstar.attribution.streaming import stream_queries
    from trackstar.attribution.terminal import print_query_result
    from trackstar.audit.writing import write_audit
    from trackstar.corpus import Query, read_queries
    from trackstar.model.language_model import load_model
    from trackstar.store import Index
    from trackstar.workers.made_with import model_of_index

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
        with chosen_workers(ray, ray_workers, ray_cpus, ray_gpus) as workers:
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
        note(f"results: {lines}, how they were made: {beside}")
        note(f"for others to verify: trackstar audit {audit}")
    for line in report.summary():
        note(line)
    if as_json:
        for line in release_lines(report, query_set=name):
            click.echo(line)
    elif out is None:
        for result in report.results:
            print_query_result(result)


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
    from trackstar.model.generation import generate

    answered = []
    for query in queries:
        answer = generate(model, query.prompt, max_new_tokens=max_new_tokens)
        if answer:
            answered.append(dataclasses.replace(query, completion=answer))
        else:
            note(f"query {query.query_id}: the model says nothing after the prompt, so it is left out")
    if not answered:
        raise OptionError("--generate: the model says nothing after the prompt; give --completion TEXT")
    return answered
