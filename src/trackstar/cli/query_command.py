"""The command `trackstar query`: queries, their source of answers, and how the answers are shown."""

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from trackstar.choices import JOINS, PARAMETERS, DeviceMap, Join, Stop
from trackstar.cli.framework import Command, prepare
from trackstar.cli.options import (
    BATCH_HELP,
    DAMPING_HELP,
    chat_template_option,
    choice,
    chosen_device,
    chosen_workers,
    cluster_options,
    default,
    device_options,
    generation_options,
    index_argument,
    note,
    print_plan,
    rare,
    record_options,
)
from trackstar.errors import OptionError, TrackstarError
from trackstar.indexing.settings import STREAM_WHITENING_EXAMPLES
from trackstar.model.generation_settings import GenerationSettings

if TYPE_CHECKING:
    from trackstar.attribution.results import QueryReport
    from trackstar.attribution.stream_plan import StreamPlan
    from trackstar.corpus import Query
    from trackstar.model.language_model import LanguageModel
    from trackstar.store.files.outputs import Input

_STREAMING = (
    "text_field", "id_field", "limit", "duplicate_ids", "format", "train_on", "window_tokens", "truncate", "pack",
    "second_moment", "whitening_examples", "side", "seed", "parameters",
)  # fmt: skip
"""Options of a streamed corpus; an index has settings of its own."""
_SHARED = ("join", "chat_template")
"""Options of the queries and of a streamed corpus."""
_GENERATION = ("max_new_tokens", "temperature", "top_p", "sampling_seed", "stop", "chat")
"""Options of `--generate`."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What the queries are answered from: an index, or a corpus without one.

    Attributes:
        index: Folder or URL of the index.
        data: The corpus.
        model: The model; None is the index's own.
        device: Where the model computes.
        device_map: How the model is spread over several GPUs, or None.
        reranked: Number of candidates to re-rank; None is chosen by the codec.
        exact: Whether every candidate's gradient is computed.
        scoring: λ, damping and batch size.
        streaming: Settings of the gradients of a streamed corpus, as given.
        cluster: Address and limits of a Ray cluster.
    """

    index: str | None
    data: str | None
    model: str | None
    device: str
    device_map: DeviceMap | None
    reranked: int | None
    exact: bool
    scoring: Mapping[str, Any]
    streaming: Mapping[str, Any]
    cluster: Mapping[str, Any]

    def check(self, top: int) -> None:
        """Raise if options contradict each other.

        Raises:
            OptionError: Both an index and a corpus are given, or neither, or an option of the other
                one.
        """
        if self.index is not None and self.data is not None:
            raise OptionError("found both INDEX and --data; query an index, or stream a corpus without one")
        if self.index is None and (self.data is None or self.model is None):
            raise OptionError("expected INDEX, or --data and --model to stream a corpus without an index")
        if self.index is not None and self.streaming:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in self.streaming)
            raise OptionError(f"{flags}: only with --data; an index was built with its own settings")
        if self.data is not None and (self.exact or self.reranked is not None):
            raise OptionError("--exact, --rerank: only with INDEX; --data is always ranked exactly")
        if self.data is not None and any(value is not None for value in self.cluster.values()):
            flags = ", ".join(
                f"--{name.replace('_', '-')}" for name, value in self.cluster.items() if value is not None
            )
            raise OptionError(f"{flags}: only with INDEX; one process streams --data")
        if self.exact and self.reranked is not None:
            raise OptionError("found both --exact and --rerank; --exact re-ranks every candidate")
        if self.reranked is not None and not (self.reranked == 0 or self.reranked >= max(top, 1)):
            raise OptionError(f"--rerank: expected at least --top {top}, or 0 for no re-ranking, found {self.reranked}")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """Prompts and completions, from the command line or from a file.

    Attributes:
        prompt: The prompt of a single query.
        completion: Its completion.
        generate: Whether the model's own completions are explained.
        queries: File of queries.
        prompt_field: The field of the file that holds the prompt; None finds it.
        join: How prompts and completions are joined.
        chat_template: File with the template of conversations; None is the index's, or else the tokenizer's.
        max_new_tokens: See `GenerationSettings`.
        temperature: See `GenerationSettings`.
        top_p: See `GenerationSettings`.
        sampling_seed: See `GenerationSettings`.
        stop: See `GenerationSettings`.
        chat: See `GenerationSettings`.
        query_set: Name of the set in results; None is the file's name.
    """

    prompt: str | None
    completion: str | None
    generate: bool
    queries: str | None
    prompt_field: str | None
    join: Join
    chat_template: str | None
    max_new_tokens: int
    temperature: float
    top_p: float
    sampling_seed: int
    stop: Stop
    chat: bool
    query_set: str | None

    @property
    def name(self) -> str:
        """The name of the set of queries in results."""
        return self.query_set or (Path(self.queries).name.split(".")[0] if self.queries is not None else "prompt")

    def settings(self) -> GenerationSettings:
        """The settings of a generation.

        Raises:
            OptionError: One is out of range.
        """
        return GenerationSettings(
            max_new_tokens=self.max_new_tokens, temperature=self.temperature, top_p=self.top_p,
            sampling_seed=self.sampling_seed, stop=self.stop, chat=self.chat,
        )  # fmt: skip

    def check(self, given: Collection[str]) -> None:
        """Raise if options contradict each other.

        Args:
            given: Names of the options that the user gave.

        Raises:
            OptionError: There is no query, or two sources of queries or completions, or an option of
                a generation without one.
        """
        if (self.prompt is None) == (self.queries is None):
            found = "neither" if self.prompt is None else "both"
            raise OptionError(f"found {found} of --prompt and --queries; give one of them")
        if self.completion is not None and self.generate:
            raise OptionError("found both --completion and --generate; give one of them")
        if self.prompt is not None and self.completion is None and not self.generate:
            raise OptionError(
                "--prompt: found no completion to explain; give --completion TEXT, or --generate to explain what the "
                "model says"
            )
        if self.queries is not None and self.completion is not None:
            raise OptionError(
                "--completion: only with --prompt; each line of --queries has its own, or give --generate"
            )
        useless = [f"--{name.replace('_', '-')}" for name in _GENERATION if name in given]
        if useless and not self.generate:
            raise OptionError(f"{', '.join(useless)}: only with --generate, which lets the model answer")

    def read(self) -> "list[Query]":
        """Read the queries, with empty completions if they are to be generated."""
        from trackstar.corpus import Query, read_queries

        if self.queries is not None:
            return read_queries(
                self.queries, prompt_field=self.prompt_field, needs_completion=not self.generate, join=self.join,
                chat_template=self.chat_template,
            )  # fmt: skip
        return [Query(query_id="prompt", prompt=self.prompt or "", completion=self.completion or "", join=self.join)]


def _resumes(options: Mapping[str, Any]) -> bool:
    """Whether the same query resumes: a streamed one with a file for its results, or an exact one."""
    return bool(options["exact"]) or (options["data"] is not None and options["out"] is not None)


@click.command(
    cls=Command,
    resumes=_resumes,
    example='trackstar query demo-out/index --prompt "The capital of France is" --generate --top 3',
)
@index_argument(required=False)
@click.option("--prompt", metavar="TEXT", help="Text before the completion.")
@click.option("--completion", metavar="TEXT", help="The completion to explain.")
@click.option("--generate", is_flag=True, help="Explain what the model itself says after the prompt.")
@click.option("--queries", metavar="FILE", help="Prompts and completions, one JSON object per line.")
@click.option("--task", metavar="FILE", show_default="facts of --queries", help="Queries to compute R_eval and λ from.")
@click.option("--top", type=int, default=10, metavar="K", help="Number of proponents and of opponents.")
@click.option("--out", metavar="FILE", help="Write results (.jsonl), a report and an audit; print no table.")
@rare("--force", is_flag=True, help="With --out: replace existing files that are no earlier results.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON lines, no table.")
@click.option(
    "--mixing", type=float, metavar="X", show_default="the paper's rule", help="λ, the weight of R_eval, from 0 to 1."
)
@click.option("--damping", type=float, metavar="C", show_default="shrinkage", help=DAMPING_HELP)
@click.option(
    "--rerank",
    "reranked",
    type=int,
    metavar="N",
    show_default="by codec",
    help="Re-rank the best N candidates from recomputed gradients.",
)
@click.option("--exact", is_flag=True, help="Recompute every candidate's gradient.")
@click.option("--data", metavar="DATA", help="Stream this corpus through --model, without an index.")
@rare("--dry-run", is_flag=True, help="With --data: print the plan (time, memory) and compute nothing.")
@device_options
@click.option("--model", metavar="MODEL", show_default="the index's", help="Path to the model, if it has moved.")
@rare("--prompt-field", metavar="NAME", show_default="found", help="Field of --queries that holds the prompt.")
@rare("--query-set", metavar="NAME", show_default="the file's", help="Name of the set of queries in results.")
@choice(
    "--join",
    JOINS,
    rare=True,
    default="auto",
    help="Between prompt and completion: a space where writing has one, always, or never.",
)
@generation_options("With --generate: ")
@rare("--batch-tokens", type=int, default=default("batch_tokens"), metavar="N", help=BATCH_HELP)
@chat_template_option("Template of conversations.", usual="the index's, or the tokenizer's")
@record_options("With --data: ", rare_ones=True)
@rare(
    "--window-tokens",
    type=int,
    metavar="N",
    show_default="context or batch",
    help="With --data: split longer documents.",
)
@rare("--truncate", is_flag=True, help="With --data: cut longer documents instead.")
@rare("--pack", type=int, metavar="N", help="With --data: pack documents into rows of N tokens.")
@choice(
    "--parameters",
    PARAMETERS,
    rare=True,
    default="merged",
    help="With --data: of a PEFT adapter, the merged network's or its own.",
)
@rare(
    "--second-moment",
    default=default("second_moment"),
    metavar="V",
    help="With --data: auto, estimate, none, or a file.",
)
@rare(
    "--whitening-examples",
    type=int,
    default=STREAM_WHITENING_EXAMPLES,
    metavar="N",
    help="With --data: examples for R_train.",
)
@rare(
    "--side",
    type=int,
    show_default="by size",
    metavar="N",
    help="With --data: each layer block has N×N dimensions.",
)
@rare("--seed", type=int, default=default("seed"), metavar="N", help="With --data: seed of projections and samples.")
@cluster_options
@click.pass_context
def query(
    context: click.Context,
    /,
    *,
    top: int,
    task: str | None,
    out: str | None,
    force: bool,
    as_json: bool,
    dry_run: bool,
    threads: int | None,
    **options: Any,
) -> None:
    """Find the training examples that moved a model towards a completion.

    Ranks the examples of INDEX: proponents moved the model towards the completion, opponents away
    from it.
    """
    given = {name for name in context.params if context.get_parameter_source(name) is not ParameterSource.DEFAULT}
    source = Source(
        **{name: options[name] for name in ("index", "data", "model", "device", "device_map", "reranked", "exact")},
        scoring={name: options[name] for name in ("mixing", "damping", "batch_tokens")},
        streaming={
            name: options[name]
            for name in (*_STREAMING, *(_SHARED if options["data"] is not None else ()))
            if name in given
        },
        cluster={name: options[name] for name in ("ray", "ray_workers", "ray_cpus", "ray_gpus")},
    )
    question = Question(**{field.name: options[field.name] for field in dataclasses.fields(Question)})
    question.check(given)
    source.check(top)
    if dry_run and source.data is None:
        raise OptionError("--dry-run: only with --data; a query of an index takes seconds")
    prepare(threads)
    if question.generate:
        question.settings()  # raises if one is out of range
    from trackstar.attribution.writing import ResultFiles, check_writable
    from trackstar.corpus import read_queries

    if out is not None and not dry_run:
        check_writable(out, read=_inputs(source, question, task), force=force, streamed=source.data is not None)
    elif out is None and force:
        raise OptionError("--force: only with --out, whose files it replaces")
    queries = question.read()
    task_queries = None
    if task is not None:
        task_queries = read_queries(
            task, prompt_field=question.prompt_field, join=question.join, chat_template=question.chat_template
        )
    unfinished = ResultFiles.at(out).unfinished if out is not None and source.data is not None else None
    prompts = queries if question.generate else None
    if dry_run:
        with contextlib.suppress(_PlanPrintedError):
            _answer(source, question, queries, task_queries, top, unfinished, on_plan=_print_only)
        return
    report = _answer(source, question, queries, task_queries, top, unfinished)
    if out is not None:
        _save(report, out, question, prompts, force=force)
        if unfinished is not None:
            unfinished.unlink(missing_ok=True)
    _show(report, as_json=as_json, query_set=question.name, listed=out is None)


def _show(report: "QueryReport", *, as_json: bool, query_set: str, listed: bool) -> None:
    """Print a report: its summary, and its results as JSON lines or, if they are listed, as text."""
    from trackstar.attribution.terminal import print_query_result
    from trackstar.attribution.writing import release_lines

    for line in report.summary():
        note(line)
    if as_json:
        for line in release_lines(report, query_set=query_set):
            click.echo(line)
    elif listed:
        for result in report.results:
            print_query_result(result)


class _PlanPrintedError(Exception):
    """Ends a dry run after its plan."""


def _print_only(plan: "StreamPlan") -> None:
    print_plan(plan)
    raise _PlanPrintedError


def _answer(
    source: Source,
    question: Question,
    queries: "Sequence[Query]",
    task: "Sequence[Query] | None",
    top: int,
    unfinished: Path | None,
    on_plan: "Callable[[StreamPlan], None] | None" = None,
) -> "QueryReport":
    from trackstar.attribution.answering import answer_queries
    from trackstar.attribution.streaming import stream_queries
    from trackstar.model.language_model import load_model
    from trackstar.store import Index
    from trackstar.workers.index_model import model_of_index

    device = chosen_device(
        source.device, source.device_map, ray=source.cluster["ray"], has_workers=source.index is not None
    )
    if source.index is None:
        settings = dict(source.streaming)
        parameters = settings.pop("parameters", "merged")
        streamed = load_model(str(source.model), device=device, device_map=source.device_map, parameters=parameters)
        if question.generate:
            queries = _with_generated_completions(queries, streamed, question, None)
        return stream_queries(
            streamed, source.data, queries, k=top, task=task, kept=unfinished, on_plan=on_plan, **source.scoring,
            **_streaming(source.data, settings, queries),
        )  # fmt: skip
    index, model = Index.open(source.index), source.model
    if question.generate:  # else `answer_queries` loads the model, which reads its weights for their digest once
        model = model_of_index(index, source.model, device=device, device_map=source.device_map)
        manifest = index.manifest
        queries = _with_generated_completions(manifest.in_template(queries), model, question, manifest.chat_template)
    with chosen_workers(**source.cluster) as workers:
        return answer_queries(
            index, queries, model=model, k=top, task=task, device=device, device_map=source.device_map,
            reranked=source.reranked, exact=source.exact, workers=workers, **source.scoring,
        )  # fmt: skip


def _inputs(source: Source, question: Question, task: str | None) -> "list[Input]":
    """What a run reads: its options' files, and the model that the index names."""
    from trackstar.store import as_folder, is_url, load_manifest
    from trackstar.store.files.outputs import Input, inputs
    from trackstar.store.locations import recorded_corpora, recorded_model

    model, corpora = source.model, list[Input]()
    if source.index is not None and not is_url(source.index):
        with contextlib.suppress(TrackstarError, OSError):  # opening the index says what is wrong with it
            manifest, folder = load_manifest(source.index), as_folder(source.index)
            if manifest is not None:
                model = recorded_model(manifest, folder) if model is None else model
                corpora = [one for path in recorded_corpora(manifest, folder) for one in inputs(data=path)]
    return corpora + inputs(
        index=source.index, data=source.data, model=model, queries=question.queries, task=task,
        second_moment=source.streaming.get("second_moment"),
    )  # fmt: skip


def _streaming(data: str | None, settings: Mapping[str, Any], queries: "Sequence[Query]") -> dict[str, Any]:
    """The settings of a streamed corpus, without a chat template that only the queries need."""
    from trackstar.corpus import open_corpus

    options = dict(settings)
    of_queries = any(query.chat_template is not None or query.token_ids is not None for query in queries)
    if "chat_template" in options and of_queries:
        reading = {name: options[name] for name in ("text_field", "id_field", "limit", "format") if name in options}
        if not open_corpus(data, **reading).reading.may_be_conversations:
            del options["chat_template"]
    return options


def _save(
    report: "QueryReport", out: str, question: Question, prompts: "Sequence[Query] | None", *, force: bool
) -> None:
    """Write results, report and audit, and say where they are."""
    from trackstar.attribution.writing import write_results
    from trackstar.audit.writing import write_audit

    results, settings = write_results(report, out, query_set=question.name, force=force)
    audit = write_audit(
        report, out, query_set=question.name, prompt_field=question.prompt_field, prompts=prompts,
        generation=question.settings(), join=question.join, force=force,
    )  # fmt: skip
    note(f"results: {results}; report: {settings}")
    note(f"others can verify the results with: trackstar audit {audit}")


def _with_generated_completions(
    queries: "Sequence[Query]", model: "LanguageModel", question: Question, template: str | None
) -> "list[Query]":
    """Return the queries of the tokens that the model says, without prompts that it does not
    complete.

    Each prompt that is left out is named in a note. `template` is the index's chat template, which
    the question's takes the place of.
    """
    from trackstar.corpus.chat import read_template
    from trackstar.model.generation import generate

    settings = question.settings()
    if question.chat_template is not None:
        template = read_template(question.chat_template)
    answered = []
    for query in queries:
        asked = dataclasses.replace(query, chat_template=query.chat_template or template)
        generation = generate(model, asked, settings, query_id=query.query_id)
        unknown = "" if query.kind not in (None, "open") else None
        if generation.text.strip():
            answered.append(
                dataclasses.replace(
                    generation.query(query.query_id, record=query.record), kind=query.kind,
                    alternatives=query.alternatives, truth=query.truth or query.completion or unknown,
                )
            )  # fmt: skip
        else:
            note(f"query {query.query_id}: left out, because the model says nothing after the prompt")
    if not answered:
        raise OptionError("--generate: the model says nothing after the prompt; give --completion TEXT")
    return answered
