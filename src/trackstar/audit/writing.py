"""Write the audit of an answer."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from trackstar.attribution.question import queries_entry
from trackstar.attribution.results import QueryReport, replace_text
from trackstar.audit.checks import file_digest, without_completions
from trackstar.audit.record import AUDIT_VERSION, AnswerEntry, Audit, GenerationEntry, ResultsEntry, VersionsEntry
from trackstar.corpus import Query
from trackstar.errors import AuditError


def write_audit(
    report: QueryReport,
    path: str | os.PathLike[str],
    *,
    query_set: str = "queries",
    prompt_field: str | None = None,
    prompts: Sequence[Query] | None = None,
    max_new_tokens: int = 16,
) -> Path:
    """Write what another person needs to verify results, beside them.

    Args:
        report: What `answer_queries` or `stream_queries` gave.
        path: Where `write_results` wrote it; the audit goes beside it as `STEM.audit.json`.
        query_set: As given to `write_results`.
        prompt_field: As given to `read_queries`.
        prompts: Where the model itself gave the completions, the queries without them.
        max_new_tokens: Where it did, the most tokens of each.

    Returns:
        The audit's path.

    Raises:
        AuditError: The results are not there, or the report does not say how it was asked for.
        OptionError: The audit cannot be written.
    """
    lines = Path(path)
    if report.asked is None:
        raise AuditError(f"{lines}: its report does not say how it was asked for; expected what answer_queries gave")
    asked = report.asked
    audit = Audit(
        audit_version=AUDIT_VERSION,
        results=ResultsEntry(file=lines.name, digest=file_digest(lines), query_set=query_set),
        queries=queries_entry([result.query for result in report.results]),
        generation=None
        if prompts is None
        else GenerationEntry(max_new_tokens=max_new_tokens, prompts=queries_entry(without_completions(prompts))),
        question=dataclasses.replace(asked.question, prompt_field=prompt_field),
        answer=AnswerEntry(
            mixing=float(report.mixing.value),
            damping=float(report.damping),
            candidates=report.candidates,
            codec=report.codec,
            reranked=report.reranked,
        ),
        made_with=asked.made_with,
        index=asked.index,
        stream=asked.stream,
        versions=VersionsEntry.here(),
        device=asked.device,
        threads=torch.get_num_threads(),
    )
    beside = lines.with_name(f"{lines.stem}.audit.json")
    replace_text(beside, audit.to_json())
    return beside
