"""Write the audit of an answer beside its result file."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from trackstar.attribution.question import queries_entry
from trackstar.attribution.results import QueryReport
from trackstar.attribution.writing import ResultFiles
from trackstar.audit.checks import file_digest, without_completions
from trackstar.audit.record import AUDIT_VERSION, AnswerEntry, Audit, GenerationEntry, ResultsEntry, VersionsEntry
from trackstar.choices import Join
from trackstar.corpus import Query
from trackstar.errors import AuditError
from trackstar.model.generation_settings import GenerationSettings
from trackstar.store.files.outputs import replace_text


def write_audit(
    report: QueryReport,
    path: str | os.PathLike[str],
    *,
    query_set: str = "queries",
    prompt_field: str | None = None,
    prompts: Sequence[Query] | None = None,
    generation: GenerationSettings | None = None,
    join: Join = "auto",
    force: bool = False,
) -> Path:
    """Write the record from which another person can verify results.

    Args:
        report: The report of `answer_queries` or `stream_queries`.
        path: The result file that `write_results` wrote; the audit is written beside it as
            `STEM.audit.json`.
        query_set: The value passed to `write_results`.
        prompt_field: The value passed to `read_queries`.
        prompts: If the model generated the completions, the queries without them.
        generation: The settings with which the model generated them; None is the defaults.
        join: The value passed to `read_queries`.
        force: Whether to replace an existing file that is no audit of results under this name.

    Returns:
        Path of the audit file.

    Raises:
        AuditError: The result file cannot be read, or the report does not record its question.
        OptionError: The audit cannot be written, or an existing file is something else.
    """
    files = ResultFiles.at(path)
    results = files.lines
    if report.provenance is None:
        raise AuditError(
            f"{results}: the report does not record how it was computed; pass the report of `answer_queries` or "
            "`stream_queries`"
        )
    provenance = report.provenance
    audit = Audit(
        audit_version=AUDIT_VERSION,
        results=ResultsEntry(file=results.name, digest=file_digest(results), query_set=query_set),
        queries=queries_entry([result.query for result in report.results]),
        generation=None
        if prompts is None
        else GenerationEntry.of(generation or GenerationSettings(), without_completions(prompts)),
        question=dataclasses.replace(provenance.question, prompt_field=prompt_field, join=join),
        answer=AnswerEntry(
            mixing=float(report.mixing.value),
            damping=float(report.damping),
            candidates=report.candidates,
            codec=report.codec,
            reranked=report.reranked,
        ),
        made_with=provenance.made_with,
        index=provenance.index,
        stream=provenance.stream,
        versions=VersionsEntry.installed(),
        device=provenance.device,
        threads=torch.get_num_threads(),
    )
    files.check_audit_replaceable(force=force)
    replace_text(files.audit, audit.to_json())
    return files.audit
