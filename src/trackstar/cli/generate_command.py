"""The command `trackstar generate`: the model's own answers to facts, and how sure it is."""

from pathlib import Path
from typing import Any

import click

from trackstar.choices import DeviceMap
from trackstar.cli.framework import Command, prepare
from trackstar.cli.options import chat_template_option, chosen_device, device_options, generation_options, note, rare
from trackstar.model.generation_settings import GenerationSettings


@click.command(
    cls=Command,
    resumes=True,
    example="trackstar generate --model demo-out/model/checkpoint-000450 --queries demo-out/queries.jsonl \\\n"
    "    --samples 4 --out demo-out/answers-of-the-model.jsonl",
)
@click.option("--model", required=True, metavar="MODEL", help="Model or adapter folder, .gguf file or hub name.")
@click.option("--queries", required=True, metavar="FILE", help="Prompts, and answers to compare with (JSON lines).")
@click.option("--out", required=True, metavar="FILE", help="The lines of --queries with the answers (.jsonl).")
@click.option("--samples", type=int, default=8, metavar="N", help="Number of answers to each prompt.")
@generation_options("", temperature=1.0)
@device_options
@rare("--prompt-field", metavar="NAME", show_default="found", help="Field of --queries that holds the prompt.")
@chat_template_option("Template of conversations.")
@rare("--force", is_flag=True, help="Replace an existing file.")
def generate(
    *,
    model: str,
    queries: str,
    out: str,
    samples: int,
    device: str,
    device_map: DeviceMap | None,
    threads: int | None,
    prompt_field: str | None,
    chat_template: str | None,
    force: bool,
    **generation: Any,
) -> None:
    """Sample a model's answers to prompts.

    Writes each line of --queries with `8b_generations`, the answers, and `8b_confidence`, the share
    of them that match the line's own. If a run is interrupted, run the same command again to resume.
    """
    settings = GenerationSettings(**generation)
    prepare(threads)
    from trackstar.corpus import read_queries
    from trackstar.evaluation.sampled_answers import check_written, sample_answers
    from trackstar.model.language_model import load_model
    from trackstar.store.files.outputs import inputs

    read = inputs(model=model, queries=queries)
    check_written(Path(out), read=read, force=force)
    asked = read_queries(queries, prompt_field=prompt_field, needs_completion=False, chat_template=chat_template)
    loaded = load_model(model, device=chosen_device(device, device_map), device_map=device_map)
    made = sample_answers(loaded, asked, out, settings, samples=samples, read=read, force=force)
    note(f"answers: {made}")
