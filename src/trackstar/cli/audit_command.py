"""The command `trackstar audit`: compare an answer's audit with the user's own files, one line per item."""

from typing import Any

import click

from trackstar.cli.framework import ERROR, Command, RareOption, prepare
from trackstar.cli.options import chat_template_option, chosen_device, device_options
from trackstar.progress import reworded_line


@click.command(
    cls=Command,
    example="trackstar query demo-out/index --queries demo-out/queries.jsonl --out demo-out/answers.jsonl\n"
    "trackstar audit demo-out/answers.audit.json --index demo-out/index",
)
@click.argument("audit", metavar="AUDIT")
@click.option("--results", metavar="FILE", show_default="beside AUDIT", help="The results.")
@click.option("--index", metavar="INDEX", help="The index; every byte of it is read.")
@click.option("--model", metavar="MODEL", help="The model.")
@click.option("--data", multiple=True, metavar="DATA", help="The corpus; repeat the option for several.")
@click.option("--queries", metavar="FILE", help="The queries, if they came from a file.")
@click.option("--task", metavar="FILE", help="The queries that R_eval was computed from.")
@chat_template_option("The template of queries that are conversations.", usual="the index's, or the tokenizer's")
@click.option("--again", is_flag=True, help="Answer the queries again and compare rankings and scores.")
@device_options
@click.option("--second-moment", cls=RareOption, metavar="FILE", help="The optimizer's state, if V came from one.")
def audit(*, audit: str, again: bool, threads: int | None, **files: Any) -> int:
    """Verify someone else's answer.

    Compares the file AUDIT (.audit.json) with the files that you give, one line per item. Exit status
    0 if all of them are the same.
    """
    prepare(threads)
    from trackstar.audit.checks import AtHand
    from trackstar.audit.recomputation import check_audit

    if files["model"] is not None:
        files["device"] = chosen_device(files["device"], files["device_map"])
    report = check_audit(audit, AtHand(**files), again=again)
    for check in report.checks:
        click.echo(reworded_line(f"{check.outcome:<13}{check.name:<20}{check.said}").rstrip())
    same, differing, unchecked = (report.named(outcome) for outcome in ("same", "differs", "not checked"))
    rest = f"; not checked: {', '.join(unchecked)}" if unchecked else ""
    if report.ok:
        click.echo(reworded_line(f"{audit}: all {len(same)} checked items are the same{rest}"))
        return 0
    count = f"{len(differing)} of {len(same) + len(differing)} differ"
    click.echo(reworded_line(f"{audit}: {count}: {', '.join(differing)}{rest}"), err=True)
    return ERROR
