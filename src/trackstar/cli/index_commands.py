"""The commands that make, change and check indexes: index, finish, add, merge, remove, convert, verify."""

import shlex
from typing import TYPE_CHECKING, Any

import click

from trackstar.choices import (
    CODECS,
    COORDINATES,
    DTYPES,
    OUTPUTS,
    PARAMETERS,
    PRESETS,
    PROJECTIONS,
    SECOND_MOMENT_KINDS,
)
from trackstar.cli.framework import ERROR, Command, prepare
from trackstar.cli.options import (
    BATCH_HELP,
    CORPUS_HELP,
    DAMPING_HELP,
    choice,
    chosen_device,
    chosen_workers,
    cluster_options,
    corpus_options,
    default,
    device_options,
    duplicate_ids_option,
    index_argument,
    note,
    print_plan,
    rare,
    threads_option,
)
from trackstar.indexing.settings import IndexSettings

if TYPE_CHECKING:
    from trackstar.store import Index

_MODEL_OPTIONS = (
    "parameters", "dtype", "device", "device_map", "layer_blocks", "attention_pattern", "mlp_pattern", "revision",
    "gguf_file",
)  # fmt: skip
_CORPUS_OPTIONS = (
    "text_field", "id_field", "limit", "duplicate_ids", "format", "train_on", "join", "chat_template", "metadata",
)  # fmt: skip


@click.command(
    cls=Command,
    resumes=True,
    example="trackstar index --model demo-out/model/checkpoint-000450 --data demo-out/corpus.jsonl \\\n"
    "    --out demo-out/new-index",
)
@click.option("--model", required=True, metavar="MODEL", help="Model or adapter folder, .gguf file or hub name.")
@click.option("--data", required=True, metavar="DATA", help=CORPUS_HELP)
@click.option("--out", required=True, metavar="INDEX", help="Folder or URL of the new index.")
@corpus_options()
@click.option(
    "--second-moment",
    default=default("second_moment"),
    metavar="V",
    help="auto, estimate, none, or a file or folder of the optimizer's state.",
)
@choice("--parameters", PARAMETERS, default="merged", help="Of a PEFT adapter: the merged network's, or its own.")
@choice("--dtype", DTYPES, default="float32", help="Number format of the computation.")
@choice("--codec", CODECS, show_default="by size", help=f"How a row is stored: {', '.join(CODECS)}.")
@click.option(
    "--side",
    type=int,
    metavar="N",
    show_default="by size",
    help="Each layer block has N×N dimensions.",
)
@choice("--preset", PRESETS, rare=True, help="The paper's settings to the letter: float32, side 64, all of R_train.")
@click.option("--batch-tokens", type=int, default=default("batch_tokens"), metavar="N", help=BATCH_HELP)
@device_options
@click.option("--dry-run", is_flag=True, help="Print the plan (time, memory, disk) and write nothing.")
@rare(
    "--window-tokens",
    type=int,
    metavar="N",
    show_default="context or batch",
    help="Longest window; longer documents are split.",
)
@rare("--overlap", type=int, default=default("overlap"), metavar="N", help="Tokens that a window repeats as context.")
@rare("--truncate", is_flag=True, help="Cut longer documents to one window, as training with truncation does.")
@rare("--pack", type=int, metavar="N", help="Pack documents into rows of N tokens, as training on packed rows does.")
@rare("--layer-blocks", type=int, default=8, metavar="N", help="Blocks for each of attention and MLP.")
@rare("--attention-pattern", metavar="REGEX", help="Names of the attention matrices; group 1 is the layer.")
@rare("--mlp-pattern", metavar="REGEX", help="Names of the MLP matrices; group 1 is the layer.")
@choice(
    "--second-moment-kind",
    SECOND_MOMENT_KINDS,
    rare=True,
    default=default("second_moment_kind"),
    help="V as row and column factors, or one number per weight.",
)
@rare(
    "--second-moment-examples",
    type=int,
    default=default("second_moment_examples"),
    metavar="N",
    help="Examples that V is estimated from.",
)
@choice("--output", OUTPUTS, rare=True, default=default("output"), help="The function of the model to differentiate.")
@choice(
    "--projection",
    PROJECTIONS,
    rare=True,
    default=default("projection"),
    help="Eq. 4, or one dense matrix (small models only).",
)
@choice(
    "--coordinates",
    COORDINATES,
    rare=True,
    show_default="projected for a given codec of 16 bits or more",
    help="Store φ, or φ whitened by R_train.",
)
@rare(
    "--whitening-examples",
    type=int,
    default=default("whitening_examples"),
    metavar="N",
    help="Examples for R_train if rows are whitened.",
)
@rare("--damping", type=float, metavar="C", show_default="shrinkage", help=f"{DAMPING_HELP} For whitened rows.")
@rare("--seed", type=int, default=default("seed"), metavar="N", help="Seed of projections and samples.")
@rare("--shard-examples", type=int, metavar="N", show_default="to 64 MiB of codes", help="Examples per shard.")
@rare("--shard", "share", metavar="I/N", help="Make the I-th of N parts; `trackstar finish` completes the index.")
@rare("--revision", metavar="NAME", help="Revision of a model on the hub.")
@rare("--gguf-file", metavar="NAME", help="The GGUF file in the model folder.")
@cluster_options
def index(
    *,
    model: str,
    data: str,
    out: str,
    share: str | None,
    dry_run: bool,
    threads: int | None,
    ray: str | None,
    ray_workers: int | None,
    ray_cpus: int | None,
    ray_gpus: float | None,
    **options: Any,
) -> None:
    """Index a corpus for a model.

    Stores the projected gradient of every training example in DATA, after a plan of the work. If a
    run is interrupted, run the same command again to resume.
    """
    of_model = {name: options.pop(name) for name in _MODEL_OPTIONS}
    of_corpus = {name: options.pop(name) for name in _CORPUS_OPTIONS}
    settings = IndexSettings(**options)
    prepare(threads)
    from trackstar.corpus import open_corpus
    from trackstar.indexing.array_tasks import Share
    from trackstar.indexing.build import index_corpus
    from trackstar.model.language_model import load_model
    from trackstar.store import as_folder
    from trackstar.store.files.outputs import inputs, refuse_input_folder

    part = Share.parsed(share) if share is not None else None
    refuse_input_folder(out, inputs(data=data, model=model, second_moment=settings.second_moment))
    if dry_run:
        from trackstar.indexing.plan import plan_corpus

        of_model["device"] = chosen_device(of_model["device"], of_model["device_map"], ray=ray, has_workers=True)
        loaded = load_model(model, **of_model)
        corpus = open_corpus(data, **of_corpus, tokenizer=loaded.tokenizer)
        print_plan(plan_corpus(loaded, corpus, as_folder(out), settings, share=part))
        return
    with chosen_workers(ray, ray_workers, ray_cpus, ray_gpus) as workers:
        of_model["device"] = chosen_device(of_model["device"], of_model["device_map"], ray=ray, has_workers=True)
        loaded = load_model(model, **of_model)
        corpus = open_corpus(data, **of_corpus, tokenizer=loaded.tokenizer)
        made = index_corpus(loaded, corpus, out, settings, share=part, workers=workers)
    if part is None or made.manifest.completion is not None:
        _report(made)


@click.command(cls=Command, resumes=True, example="trackstar finish demo-out/index")
@click.argument("index", metavar="INDEX")
@threads_option
def finish(*, index: str, threads: int | None) -> None:
    """Complete an index made in parts.

    Run it once after all runs of `trackstar index --shard I/N`.
    """
    prepare(threads)
    from trackstar.indexing.array_tasks import finish_index

    _report(finish_index(index))


@click.command(
    cls=Command,
    resumes=True,
    example="trackstar add demo-out/index --data demo-out/queries.jsonl --text-field prompt \\\n"
    "    --out demo-out/larger-index",
)
@index_argument()
@click.option("--data", required=True, metavar="DATA", help=CORPUS_HELP)
@click.option("--out", required=True, metavar="NEW", help="Folder or URL of the new index.")
@corpus_options("the index's, or the tokenizer's")
@click.option("--batch-tokens", type=int, default=default("batch_tokens"), metavar="N", help=BATCH_HELP)
@device_options
@rare("--model", metavar="MODEL", help="Path to the model, if it has moved.")
def add(*, index: str, data: str, out: str, threads: int | None, **options: Any) -> None:
    """Add examples to an index.

    Writes a new index with the rows of INDEX, which stays as it is, and of the examples in DATA.
    """
    prepare(threads)
    from trackstar.editing.adding import add_examples

    options["device"] = chosen_device(options["device"], options["device_map"])
    _report(add_examples(index, data, out, **options))


@click.command(
    cls=Command,
    resumes=True,
    example="trackstar index --model demo-out/model/checkpoint-000450 --data demo-out/queries.jsonl \\\n"
    "    --text-field prompt --out demo-out/other-index --side 32 --codec float16\n"
    "trackstar merge demo-out/index demo-out/other-index --out demo-out/merged-index",
)
@click.argument("indexes", nargs=-1, required=True, metavar="INDEX INDEX...")
@click.option("--out", required=True, metavar="NEW", help="Folder or URL of the new index.")
@duplicate_ids_option
@threads_option
def merge(*, indexes: tuple[str, ...], out: str, duplicate_ids: Any, threads: int | None) -> None:
    """Merge indexes built with the same settings.

    Writes a new index; the given ones stay as they are.
    """
    prepare(threads)
    from trackstar.editing.merging import merge_indexes

    _report(merge_indexes(indexes, out, duplicate_ids=duplicate_ids))


@click.command(
    cls=Command,
    resumes=True,
    example="echo capital-FR-0 > demo-out/names.txt\n"
    "trackstar remove demo-out/index --names demo-out/names.txt --out demo-out/smaller-index",
)
@index_argument()
@click.option("--names", required=True, metavar="FILE", help="Names of examples or documents, one per line.")
@click.option("--out", required=True, metavar="NEW", help="Folder or URL of the new index.")
@threads_option
def remove(*, index: str, names: str, out: str, threads: int | None) -> None:
    """Remove examples from an index.

    Writes a new index; INDEX stays as it is.
    """
    prepare(threads)
    from trackstar.corpus import read_names
    from trackstar.editing.removing import remove_examples
    from trackstar.store.files.outputs import inputs, refuse_input_folder

    refuse_input_folder(out, inputs(names=names))
    _report(remove_examples(index, read_names(names), out))


@click.command(
    cls=Command, resumes=True, example="trackstar convert demo-out/index --codec 4-bit --out demo-out/index-4-bit"
)
@index_argument()
@choice("--codec", CODECS, required=True, help=f"Codec of the new index: {', '.join(CODECS)}.")
@click.option("--out", required=True, metavar="NEW", help="Folder or URL of the new index.")
@click.option("--damping", type=float, metavar="C", show_default="shrinkage", help=DAMPING_HELP)
@threads_option
def convert(*, index: str, codec: Any, out: str, damping: float | None, threads: int | None) -> None:
    """Store an index in fewer bits.

    Writes a new index; INDEX stays as it is.
    """
    prepare(threads)
    from trackstar.editing.converting import convert_index

    _report(convert_index(index, out, codec=codec, damping=damping))


@click.command(cls=Command, example="trackstar verify demo-out/index")
@click.argument("index", metavar="INDEX")
def verify(index: str) -> int:
    """Check every byte of an index against its checksums.

    Exit status 0 if the index is undamaged.
    """
    from trackstar.store import verify as check

    report = check(index)
    for line in (*report.notes, *report.problems):
        note(line)
    amount = f"{len(report.good_shards)} shards with {report.rows:,} examples, {report.checked_bytes / 1e6:,.1f} MB"
    if report.ok:
        click.echo(f"{index}: {'undamaged' if report.completed else 'undamaged so far, unfinished'}, {amount}")
        return 0
    click.echo(f"{index}: {len(report.problems)} faults; undamaged: {amount}", err=True)
    return ERROR


def _report(index: "Index") -> None:
    """Print what has been made and how to query it."""
    answer = "--completion TEXT" if index.manifest.chat_template is None else "--generate --chat"
    click.echo(
        f"{index.path}: {index.rows:,} examples, {index.dimensions:,} dimensions, {index.manifest.codec}; query it "
        f"with: trackstar query {shlex.quote(str(index.path))} --prompt TEXT {answer}"
    )
