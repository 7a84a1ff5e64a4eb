"""Cost of each data layout: time of the whole indexing against plain text with the same tokens, in the same run.

Every layout states the same text as the plain text that it is compared with (Alpaca's prompts add words, so
instructions have a plain text of their own) and is indexed with the same model, from the survey of the corpus to
the last shard, tokenisation included. Rounds go through all layouts one after the other, each beginning with another
one, and a layout's ratio is the median over the rounds of its time over plain text's time in that round. Times are
processor seconds of the process, which other load on the machine changes less than the clock's; both are kept.

    python benchmarks/layouts.py [--examples 200] [--rounds 5] [--threads 1]
"""

import argparse
import csv
import json
import lzma
import operator
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from measurement import save
from trackstar.corpus import open_corpus
from trackstar.corpus.record_reader import INSTRUCTION_ALONE
from trackstar.indexing.build import index_corpus
from trackstar.indexing.settings import IndexSettings
from trackstar.model.language_model import LanguageModel, wrap_model

BAR = 1.10
COMPARED = {"instruction": "text of instructions", "text of instructions": "text of instructions"}
WORDS = "the capital of a country lies on a river where people speak many languages and trade gold and oil".split()
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>"
    "{% endif %}"
)
UNMARKED = TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def conversations(count: int) -> list[list[dict[str, str]]]:
    """Two questions and answers of 30 words each."""

    def words(seed: int) -> str:
        return " ".join(WORDS[(seed * 7 + place * (1 + seed % 5)) % len(WORDS)] for place in range(30))

    roles = ("user", "assistant", "user", "assistant")
    return [[{"role": r, "content": words(4 * n + k)} for k, r in enumerate(roles)] for n in range(count)]


def tokenizer_of(texts: list[str]) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=["</s>"], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def layouts(folder: Path, chats: list[list[dict[str, str]]], tokenizer: Any) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Each layout's file and options."""
    texts = ["".join(f"<|{m['role']}|>{m['content']}" for m in chat) for chat in chats]
    heads = [text[: text.rindex(chat[3]["content"])] for text, chat in zip(texts, chats, strict=True)]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    plain = [{"id": f"r{n}", "text": text} for n, text in enumerate(texts)]
    fields = {"source": "a source", "licence": "CC BY 4.0", "url": "https://example.org/a/page", "year": 2024}
    (folder / "template.jinja").write_text(UNMARKED)
    records: dict[str, list[dict[str, Any]]] = {
        "text": plain,
        "prompt-completion": [
            {"id": f"r{n}", "prompt": head, "completion": text[len(head) :]}
            for n, (head, text) in enumerate(zip(heads, texts, strict=True))
        ],
        "messages, marked": [{"id": f"r{n}", "messages": chat} for n, chat in enumerate(chats)],
        "instruction": [
            {"id": f"r{n}", "instruction": head, "output": text[len(head) :]}
            for n, (head, text) in enumerate(zip(heads, texts, strict=True))
        ],
        "tokens": [{"id": f"r{n}", "input_ids": one, "labels": one} for n, one in enumerate(ids)],
        "text of instructions": [
            {"id": f"r{n}", "text": INSTRUCTION_ALONE.replace("{instruction}", head, 1) + text[len(head) :]}
            for n, (head, text) in enumerate(zip(heads, texts, strict=True))
        ],
        "text with metadata": [record | fields for record in plain],
    }
    files: dict[str, tuple[Path, dict[str, Any]]] = {}
    for name, rows in records.items():
        path = folder / f"{name.replace(', ', '-').replace(' ', '-')}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files[name] = path, {}
    files["messages, prefixes"] = files["messages, marked"][0], {"chat_template": folder / "template.jinja"}
    files["JSON array"] = folder / "array.json", {}
    files["JSON array"][0].write_text(json.dumps(plain))
    files["CSV"] = folder / "table.csv", {}
    with files["CSV"][0].open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["id", "text"])
        writer.writeheader()
        writer.writerows(plain)
    files["xz"] = folder / "c.jsonl.xz", {}
    files["xz"][0].write_bytes(lzma.compress(files["text"][0].read_bytes()))
    table = pa.Table.from_pylist(plain)
    files["Parquet"] = folder / "c.parquet", {}
    pq.write_table(table, files["Parquet"][0])
    files["Arrow"] = folder / "c.arrow", {}
    with ipc.new_stream(str(files["Arrow"][0]), table.schema) as writer:
        writer.write_table(table)
    return files


def small_model(tokenizer: Any) -> LanguageModel:
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4, vocab_size=1024,
        max_position_embeddings=512,
    )  # fmt: skip
    return wrap_model(GPTNeoXForCausalLM(config), tokenizer, layer_blocks=2)


def seconds(run: Callable[[], object]) -> tuple[float, float]:
    """Processor seconds and clock seconds."""
    cpu, clock = time.process_time(), time.perf_counter()
    run()
    return time.process_time() - cpu, time.perf_counter() - clock


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    chats = conversations(arguments.examples)
    tokenizer = tokenizer_of([message["content"] for chat in chats for message in chat])
    tokenizer.chat_template = TEMPLATE
    model = small_model(tokenizer)
    settings = IndexSettings(side=16, codec="float16", second_moment="none")
    times: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as place:
        files = layouts(Path(place), chats, tokenizer)
        for number in range(arguments.rounds + 1):
            order = [*files][number % len(files) :] + [*files][: number % len(files)]
            for name in order:
                path, options = files[name]
                out = Path(place) / f"index-{number}-{name.replace(' ', '-')}"

                def run(path: Path = path, options: dict[str, Any] = options, out: Path = out) -> None:
                    corpus = open_corpus(path, tokenizer=tokenizer, **options)
                    index_corpus(model, corpus, out, settings, progress=False)

                elapsed = seconds(run)
                if number:  # the first round warms up
                    times.setdefault(name, []).append(elapsed)
    processor = {name: [one for one, _ in each] for name, each in times.items()}
    clock = {name: [one for _, one in each] for name, each in times.items()}
    ratios = {
        name: round(statistics.median(map(operator.truediv, each, processor[COMPARED.get(name, "text")])), 4)
        for name, each in processor.items()
    }
    save(
        f"layouts-cpu-{arguments.threads}-threads",
        {
            "examples": arguments.examples, "rounds": arguments.rounds, "bar": BAR,
            "processor_seconds": {name: round(statistics.median(each), 3) for name, each in processor.items()},
            "clock_seconds": {name: round(statistics.median(each), 3) for name, each in clock.items()},
            "ratio_to_text": ratios, "within_bar": all(ratio <= BAR for ratio in ratios.values()),
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
