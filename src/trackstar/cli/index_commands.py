"""The commands that make an index and look after it: index, finish, add, merge, remove, convert, verify."""

from typing import TYPE_CHECKING, Any

import click

from trackstar.cli.framework import ERROR, Command, prepare
from trackstar.cli.options import chosen_workers, clustered, note, one_of, rare, shared

if TYPE_CHECKING:
    from trackstar.store import Index

CODECS = ("float32", "bfloat16", "float16", "int8", "4-bit", "2-bit", "1-bit")


@click.command(cls=Command)
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
@shared
@rare("--window-tokens", type=int, metavar="N", help="Split longer documents.  [context or batch]")
@rare("--overlap", type=int, default=1, metavar="N", help="Tokens a window repeats as context.  [1]")
@rare("--layer-blocks", type=int, default=8, metavar="N", help="Blocks for attention, and for MLPs.  [8]")
@rare("--attention-pattern", metavar="REGEX", help="Attention matrices; group 1: layer.")
@rare("--mlp-pattern", metavar="REGEX", help="The same for MLP matrices.")
@rare("--second-moment-kind", default="factored", metavar="KIND", help="factored or elementwise.  [factored]")
@rare("--second-moment-examples", type=int, default=256, metavar="N", help="Estimate V from so many.  [256]")
@rare("--output", default="loss", metavar="F", help="What is differentiated: loss, margin, logit.  [loss]")
@rare("--projection", default="two-sided", metavar="P", help="two-sided or one-sided (small models).  [two-sided]")
@rare("--coordinates", metavar="C", help="projected or whitened.  [whitened for int8 and fewer bits]")
@rare("--whitening-examples", type=int, default=16_384, metavar="N", help="R_train for it from so many.  [16384]")
@rare("--damping", type=float, metavar="X", help="Added to it, of its mean eigenvalue.  [shrinkage]")
@rare("--seed", type=int, default=0, metavar="N", help="Of projections and samples.  [0]")
@rare("--shard-examples", type=int, metavar="N", help="Examples a shard.  [64 MiB]")
@rare("--shard", "share", metavar="I/N", help="As the I-th of N runs that make one index; then finish.")
@rare("--revision", metavar="NAME", help="Revision of a hub's model.")
@rare("--gguf-file", metavar="NAME", help="Which file of the folder holds GGUF weights.")
@clustered
def index(
    *,
    model: str,
    data: str,
    out: str,
    threads: int | None,
    ray: str | None,
    ray_workers: int | None,
    ray_cpus: int | None,
    ray_gpus: float | None,
    **options: Any,
) -> None:
    """Index a corpus for a model; run again to resume.

    Codecs: float32, bfloat16, float16, int8, 4-bit, 2-bit, 1-bit.
    """
    one_of("--second-moment-kind", options["second_moment_kind"], ("factored", "elementwise"))
    one_of("--output", options["output"], ("loss", "margin", "logit"))
    one_of("--projection", options["projection"], ("two-sided", "one-sided"))
    one_of("--codec", options["codec"], CODECS)
    if options["coordinates"] is not None:
        one_of("--coordinates", options["coordinates"], ("projected", "whitened"))
    prepare(threads)
    from trackstar.indexing.build import build_index

    with chosen_workers(ray, ray_workers, ray_cpus, ray_gpus) as workers:
        made = build_index(model, data, out, workers=workers, **options)
    if options["share"] is None or made.manifest.completion is not None:
        _tell(made)


@click.command(cls=Command)
@click.argument("index", metavar="IDX")
@rare("--threads", type=int, metavar="N", help="CPU threads.  [as torch chooses]")
def finish(*, index: str, threads: int | None) -> None:
    """Complete an index that index --shard I/N made."""
    prepare(threads)
    from trackstar.indexing.array_tasks import finish_index

    _tell(finish_index(index))


@click.command(cls=Command)
@click.option("--index", required=True, metavar="IDX", help="The index; it is left as it is.")
@click.option("--data", required=True, metavar="D", help="Further corpus: .jsonl, .txt, .parquet, a folder.")
@click.option("--out", required=True, metavar="NEW", help="The new index's folder.")
@click.option("--text-field", default="text", metavar="NAME", help="Field that holds the text.  [text]")
@click.option("--id-field", metavar="NAME", help="Field that names an example.  [found]")
@click.option("--limit", type=int, metavar="N", help="Read the first N records only.")
@click.option("--batch-tokens", type=int, default=2048, metavar="N", help="Most tokens of a batch.  [2048]")
@shared
@rare("--model", metavar="M", help="The model, where it is not where the index says.")
def add(*, index: str, data: str, out: str, threads: int | None, **options: Any) -> None:
    """An index with further examples; only theirs are computed."""
    prepare(threads)
    from trackstar.editing.adding import add_examples

    _tell(add_examples(index, data, out, **options))


@click.command(cls=Command)
@click.argument("indexes", nargs=-1, required=True, metavar="IDX IDX...")
@click.option("--out", required=True, metavar="NEW", help="The new index's folder.")
@rare("--threads", type=int, metavar="N", help="CPU threads.  [as torch chooses]")
def merge(*, indexes: tuple[str, ...], out: str, threads: int | None) -> None:
    """One index of several that were made alike."""
    prepare(threads)
    from trackstar.editing.merging import merge_indexes

    _tell(merge_indexes(indexes, out))


@click.command(cls=Command)
@click.option("--index", required=True, metavar="IDX", help="The index; it is left as it is.")
@click.option("--names", required=True, metavar="FILE", help="Names of examples or documents, one a line.")
@click.option("--out", required=True, metavar="NEW", help="The new index's folder.")
@rare("--threads", type=int, metavar="N", help="CPU threads.  [as torch chooses]")
def remove(*, index: str, names: str, out: str, threads: int | None) -> None:
    """An index without some of its examples."""
    prepare(threads)
    from trackstar.corpus import read_names
    from trackstar.editing.removing import remove_examples

    _tell(remove_examples(index, read_names(names), out))


@click.command(cls=Command)
@click.option("--index", required=True, metavar="IDX", help="The index; it is left as it is.")
@click.option("--codec", required=True, metavar="TYPE", help="Of no more bits: float16, int8, 4-bit, 2-bit, 1-bit.")
@click.option("--out", required=True, metavar="NEW", help="The new index's folder.")
@click.option("--damping", type=float, metavar="X", help="Added to R_train in whitening.  [shrinkage]")
@rare("--threads", type=int, metavar="N", help="CPU threads.  [as torch chooses]")
def convert(*, index: str, codec: Any, out: str, damping: float | None, threads: int | None) -> None:
    """The same index stored in fewer bits."""
    one_of("--codec", codec, CODECS)
    prepare(threads)
    from trackstar.editing.converting import convert_index

    _tell(convert_index(index, out, codec=codec, damping=damping))


@click.command(cls=Command)
@click.argument("index")
def verify(index: str) -> int:
    """Read every byte of an index and compare it with its checksums."""
    from trackstar.store import verify as check

    report = check(index)
    for line in report.notes:
        note(line)
    for line in report.problems:
        note(line)
    amount = f"{len(report.good_shards)} shards with {report.rows:,} examples, {report.checked_bytes / 1e6:,.1f} MB"
    if report.ok:
        click.echo(f"{index}: {'whole' if report.completed else 'whole as far as it goes'}, {amount}")
        return 0
    click.echo(f"{index}: damaged in {len(report.problems)} places; good are {amount}", err=True)
    return ERROR


def _tell(index: "Index") -> None:
    """What has been made, and how to ask it."""
    manifest = index.manifest
    click.echo(
        f"{index.path}: {index.rows:,} examples, {index.dimensions:,} dimensions, {manifest.codec}; ask it with "
        f"trackstar query --index {index.path}"
    )
