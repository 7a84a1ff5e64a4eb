"""The command `trackstar audit`: what an answer's audit says, compared with what its auditor has, a line a thing."""

from typing import Any

import click

from trackstar.cli.framework import ERROR, Command, RareOption, prepare


@click.command(cls=Command)
@click.argument("audit", metavar="AUDIT")
@click.option("--results", metavar="FILE", help="The results.  [beside the audit]")
@click.option("--index", metavar="IDX", help="The index; every byte of it is read.")
@click.option("--model", metavar="M", help="The model, wherever it is now.")
@click.option("--data", multiple=True, metavar="D", help="The corpus; once for each of several.")
@click.option("--queries", metavar="FILE", help="The queries, where they came from a file.")
@click.option("--task", metavar="FILE", help="The queries that R_eval comes from.")
@click.option("--again", is_flag=True, help="Answer again; compare rankings and scores.")
@click.option("--device", default="cpu", metavar="NAME", help="cpu, cuda or cuda:1.  [cpu]")
@click.option("--second-moment", cls=RareOption, metavar="FILE", help="Optimizer's state, where V came from one.")
@click.option("--threads", cls=RareOption, type=int, metavar="N", help="CPU threads.  [as torch chooses]")
def audit(*, audit: str, again: bool, threads: int | None, **hand: Any) -> int:
    """Verify an answer by its .audit.json and what is at hand.

    Exit status 0: all that was given is the same.
    """
    prepare(threads)
    from trackstar.audit.again import check_audit
    from trackstar.audit.checks import AtHand
    from trackstar.text import printable

    report = check_audit(audit, AtHand(**hand), again=again)
    for check in report.checks:
        click.echo(printable(f"{check.outcome:<13}{check.name:<20}{check.said}").rstrip())
    same, differing, unchecked = (report.named(outcome) for outcome in ("same", "differs", "not checked"))
    rest = f"; not checked: {', '.join(unchecked)}" if unchecked else ""
    if report.ok:
        click.echo(printable(f"{audit}: all {len(same)} that were checked are the same{rest}"))
        return 0
    count = f"{len(differing)} of {len(same) + len(differing)} differ"
    click.echo(printable(f"{audit}: {count}: {', '.join(differing)}{rest}"), err=True)
    return ERROR
