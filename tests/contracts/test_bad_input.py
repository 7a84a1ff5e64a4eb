"""Every mistake that a user can make at the command line: one clear line that names it, an exit status, no traceback.

Bad records of corpora and queries have a table of their own, in test_corpus_errors.py.
"""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import filelock
import pytest
import torch
from safetensors.torch import load_file, save_file

from tiny_models import save_tiny_model, tiny_tokenizer
from trackstar.cli import framework
from trackstar.cli import trackstar as command_group
from trackstar.store import FORMAT_VERSION

TEXTS = [
    "The capital of France is Paris.",
    "Berlin is in Germany.",
    "Gold is Au.",
    "People in Brazil speak Portuguese.",
]


@dataclasses.dataclass(frozen=True)
class World:
    """What a case may use and spoil: copies in a folder of its own."""

    folder: Path
    model: Path
    corpus: Path
    index: Path

    def write(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path


class Case(NamedTuple):
    """A command made from the world ({...} are its paths), what is spoiled first, the line, and the exit status."""

    name: str
    command: str
    line: str
    spoil: Callable[[World], object] = lambda world: None
    status: int = 1


INDEX = "index --model {model} --data {corpus} --out {folder}/new --side 4 --codec float16"
AUDIT = "audit {folder}/r.audit.json"
ASK = "query --index {index} --prompt Paris --completion France"


def _spoil_weight(value: float) -> Callable[[World], None]:
    def spoil(world: World) -> None:
        weights = load_file(world.model / "model.safetensors")
        weights["model.layers.1.mlp.up_proj.weight"][0, 0] = value
        save_file(weights, world.model / "model.safetensors", metadata={"format": "pt"})

    return spoil


def _drop_weight(world: World) -> None:
    weights = load_file(world.model / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, world.model / "model.safetensors", metadata={"format": "pt"})


def _truncate(name: str, kept: int) -> Callable[[World], None]:
    def spoil(world: World) -> None:
        path = world.folder / name
        path.write_bytes(path.read_bytes()[:kept])

    return spoil


def _remove(name: str) -> Callable[[World], None]:
    return lambda world: (world.folder / name).unlink()


def _edit_config(world: World) -> None:
    path = world.model / "config.json"
    config = json.loads(path.read_text())
    config["architectures"], config["model_type"] = ["MambaForCausalLM"], "mamba"
    path.write_text(json.dumps(config))


def _mixture_of_experts(world: World) -> None:
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    shutil.rmtree(world.model)
    config = Llama4TextConfig(
        hidden_size=16, intermediate_size=16, intermediate_size_mlp=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, vocab_size=300, num_local_experts=2,
    )  # fmt: skip
    Llama4ForCausalLM(config).save_pretrained(world.model)
    tiny_tokenizer("bos").save_pretrained(world.model)


def _state(content: dict[str, torch.Tensor]) -> Callable[[World], None]:
    return lambda world: save_file(content, world.folder / "state.safetensors")


def _unfinished(world: World) -> None:
    """As a killed indexer leaves it."""
    from trackstar.store import load_manifest

    manifest = load_manifest(world.index)
    assert manifest is not None
    (world.index / "manifest.json").write_text(dataclasses.replace(manifest, completion=None).to_json())


def _other_manifest_format(world: World) -> None:
    path = world.index / "manifest.json"
    path.write_text(path.read_text().replace(f'"format_version": {FORMAT_VERSION}', '"format_version": 99'))


def _other_model(world: World) -> None:
    shutil.rmtree(world.model)
    save_tiny_model(world.model, "llama", seed=9)


def _other_model_and_text(world: World) -> None:
    (world.folder / "more.txt").write_text("The capital of Chad is N'Djamena.")
    _other_model(world)


def _bytes_of_shard_changed(world: World) -> None:
    path = world.index / "second_moment.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 255
    path.write_bytes(content)


def _audited(world: World) -> Path:
    """An answer with its audit."""
    command = ["query", "--index", str(world.index), "--prompt", "Paris", "--completion", "France"]
    assert framework.run(command_group, [*command, "--out", str(world.folder / "r.jsonl")]) == 0
    return world.folder / "r.audit.json"


def _edited_audit(old: str, new: str) -> Callable[[World], None]:
    def spoil(world: World) -> None:
        path = _audited(world)
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    return spoil


CASES = [
    # Options
    Case("no command", "fly", "trackstar: No such command 'fly'.", status=2),
    Case("unknown option", "index --modle x", "trackstar index: No such option", status=2),
    Case("missing option", "index --model m", "trackstar index: Missing options '--data', '--out'.", status=2),
    Case("number expected", INDEX + " --limit many", "trackstar index: Invalid value for '--limit'", status=2),
    Case("missing argument", "verify", "trackstar verify: Missing argument 'INDEX'", status=2),
    Case("explorer, nothing there", "explore {folder}/none.jsonl", "trackstar: {folder}/none.jsonl: no such file or folder"),
    Case("explorer, no results", "explore {corpus}", "trackstar: {corpus}:1: no text in inputs_plaintext or prompt0 or prompt"),
    Case("explorer, two indexes", "explore {index} {index}", "trackstar: found 2 indexes and 0 result files; expected at most one"),
    Case("explorer, port", "explore {index} --port 70000", "trackstar: --port: expected 0 (any free port) to 65535, found 70000"),
    Case("explorer, mixing", "explore {index} --mixing 7", "trackstar: --mixing: expected 0 (only R_train) to 1 (only R_eval), found 7.0"),
    Case("explorer, mixing of nothing", "explore {index} --mixing 0.5", "trackstar: --mixing: found 0.5 without a task to compute R_eval from; pass --task"),
    Case("explorer, damping", "explore {index} --damping -1", "trackstar: --damping: expected 0 or more, as a fraction of R_train's mean eigenvalue"),
    Case("explorer, batch", "explore {index} --batch-tokens 0", "trackstar: --batch-tokens: expected 1 or more, found 0"),
    Case("explorer, no index", "explore {corpus} --task {corpus}", "trackstar: --task, --embedding-model, --model, --data, "),
    Case("explorer, no corpus", "explore {index} --data {folder}/none.jsonl", "trackstar: {folder}/none.jsonl: no such file"),
    Case("limit", INDEX + " --limit 0", "trackstar: --limit: expected 1 or more, found 0"),
    Case("dtype", INDEX + " --dtype int8", "trackstar: --dtype: expected one of float32, bfloat16, found int8"),
    Case("codec", INDEX + " --codec jpeg", "trackstar: --codec: expected one of float32, bfloat16, float16"),
    Case("device", INDEX + " --device abacus", "trackstar: --device: expected auto, cpu or an available cuda or mps device, found 'abacus' ("),
    Case("side", INDEX + " --side 0", "trackstar: --side: expected 1 or more, found 0"),
    Case("threads", INDEX + " --threads 0", "trackstar: --threads: expected 1 or more, found 0"),
    Case("batch", INDEX + " --batch-tokens 0", "trackstar: --batch-tokens: expected 1 or more, found 0"),
    Case("shard", INDEX + " --shard-examples -1", "trackstar: --shard-examples: expected 1 or more, found -1"),
    Case("blocks", INDEX + " --layer-blocks 0", "trackstar: --layer-blocks: expected 1 or more, found 0"),
    Case("window too long", INDEX + " --window-tokens 999", "trackstar: --window-tokens: expected at most the 64 tokens that the model reads, found 999"),
    Case("window too short", INDEX + " --window-tokens 2", "trackstar: --window-tokens: expected 3 or more ("),
    Case("overlap", INDEX + " --overlap 0", "trackstar: --overlap: expected 1 or more, found 0"),
    Case("V's kind", INDEX + " --second-moment-kind big", "trackstar: --second-moment-kind: expected one of factored, elementwise, found big"),
    Case("V's sample", INDEX + " --second-moment-examples 0", "trackstar: --second-moment-examples: expected 1 or more, found 0"),
    Case("pattern", INDEX + " --attention-pattern [", "trackstar: --attention-pattern: expected a regular expression, found '[' ("),
    Case("pattern's group", INDEX + " --mlp-pattern x", "trackstar: --mlp-pattern: expected a first group"),
    # Models
    Case("no model", "index --model ./none --data {corpus} --out {folder}/new", "trackstar: ./none: no such folder"),
    Case("model is a file", "index --model {corpus} --data {corpus} --out {folder}/new", "trackstar: {corpus}: is a file;"),
    Case("empty model folder", INDEX, "trackstar: {model}: found no config.json and 0 .gguf files", lambda w: [
        path.unlink() for path in w.model.iterdir()
    ]),
    Case("folder of a training run", INDEX, "trackstar: {model}: is a training run's folder; expected one of its models, such as {model}/checkpoint-000002", lambda w: [
        shutil.copytree(w.model, w.folder / "copy"), shutil.rmtree(w.model), w.model.mkdir(),
        shutil.copytree(w.folder / "copy", w.model / "checkpoint-000002"),
    ]),
    Case("model moved away", ASK, "trackstar: {model}: no such model; this is where {index} says that its model is; pass the model as --model", lambda w: w.model.rename(w.folder / "elsewhere")),
    Case("broken config", INDEX, "trackstar: {model}: cannot be loaded as a causal language model (", _truncate("model/config.json", 20)),
    Case("cut weights", INDEX, "trackstar: {model}: cannot be loaded as a causal language model (", _truncate("model/model.safetensors", 900)),
    Case("no weights", INDEX, "trackstar: {model}: cannot be loaded as a causal language model (", _remove("model/model.safetensors")),
    Case("lacking weight", INDEX, "trackstar: {model}: its weights lack 1 parameters of LlamaForCausalLM, first model.layers.1.mlp.up_proj.weight", _drop_weight),
    Case("NaN weight", INDEX, "trackstar: {model}: model.layers.1.mlp.up_proj.weight holds NaN or infinite weights", _spoil_weight(float("nan"))),
    Case("infinite weight", INDEX, "trackstar: {model}: model.layers.1.mlp.up_proj.weight holds NaN or infinite", _spoil_weight(float("inf"))),
    Case("no tokenizer", INDEX, "trackstar: {model}: its tokenizer cannot be loaded (", lambda w: [
        path.unlink() for path in w.model.glob("tokenizer*")
    ]),
    Case("model without attention", INDEX, "trackstar: {model}: ", _edit_config),
    Case("experts", INDEX, "trackstar: Llama4ForCausalLM: 2 weight matrices match no known pattern", _mixture_of_experts),
    Case("bad GGUF", "index --model {folder}/x.gguf --data {corpus} --out {folder}/new", "trackstar: {folder}: cannot be loaded", lambda w: w.write("x.gguf", b"GGUFxxxx")),
    # Optimizer state
    Case("no state", INDEX + " --second-moment {folder}/none.pt", "trackstar: {folder}/none.pt: no such file; expected an optimizer's state"),
    Case("state of nothing", INDEX + " --second-moment {corpus}", "trackstar: {corpus}: unknown kind of file"),
    Case("state without matrix", INDEX + " --second-moment {folder}/state.safetensors", "trackstar: {folder}/state.safetensors: ", _state({"exp_avg_sq/model.norm.weight": torch.ones(24)})),
    Case("no pickle", INDEX + " --second-moment {folder}/bad.pt", "trackstar: {folder}/bad.pt: cut off, or holds more than tensors and plain values", lambda w: w.write("bad.pt", b"not torch")),
    # Corpora
    Case("no corpus", "index --model {model} --data {folder}/none.jsonl --out {folder}/new", "trackstar: {folder}/none.jsonl: "),
    Case("empty corpus", INDEX, "trackstar: {corpus}: holds no record", lambda w: w.write("corpus.jsonl", "")),
    Case("binary corpus", INDEX, "trackstar: {corpus}:1: byte 0 is NUL", lambda w: w.write("corpus.jsonl", bytes(64))),
    Case("broken record", INDEX, 'trackstar: {corpus}:2: broken JSON', lambda w: w.write("corpus.jsonl", '{"text": "fine"}\n{"text')),
    Case("missing field", INDEX + " --text-field body", 'trackstar: {corpus}:1: no field "body"; found id, text'),
    Case("nothing to score", INDEX, "trackstar: {corpus}: none of 256 records drawn from it has a token to score", lambda w: w.write("corpus.jsonl", '{"text": ""}')),
    Case("unknown format", "index --model {model} --data {folder}/a.docx --out {folder}/new", "trackstar: {folder}/a.docx: ", lambda w: w.write("a.docx", "x")),
    # The index's folder
    Case("out is a file", "index --model {model} --data {corpus} --out {corpus} --side 4 --codec float16", "trackstar: {corpus}"),
    Case("out is full of others", INDEX,  "trackstar: {folder}/new: contains 'letter.txt' but no manifest.json", lambda w: [
        (w.folder / "new").mkdir(), (w.folder / "new" / "letter.txt").write_text("Dear")
    ]),
    Case("other settings", "index --model {model} --data {corpus} --out {index} --side 2 --codec float16", "trackstar: {index}: the existing index has --side 4, but 2 was requested"),
    Case("other corpus", "index --model {model} --data {folder}/other.txt --out {index} --side 4 --codec float16", "trackstar: {index}: the existing index has corpora[0].digest", lambda w: w.write("other.txt", "Rome is in Italy.\n")),
    Case("other model", "index --model {model} --data {corpus} --out {index} --side 4 --codec float16", "trackstar: {index}: the existing index has model.digest", _other_model),
    # Asking
    Case("no index", "query --index {folder}/none --prompt a --completion b", "trackstar: {folder}/none: not an index (no manifest.json)"),
    Case("nothing asked", "query --index {index}", "trackstar: found neither of --prompt and --queries"),
    Case("asked twice", ASK + " --queries {corpus}", "trackstar: found both of --prompt and --queries"),
    Case("no completion", "query --index {index} --prompt Paris", "trackstar: --prompt: found no completion to explain; give --completion TEXT, or --generate"),
    Case("both answers", ASK + " --generate", "trackstar: found both --completion and --generate"),
    Case("completion of many", "query --index {index} --queries {corpus} --completion x", "trackstar: --completion: only with --prompt"),
    Case("empty completion", "query --index {index} --prompt Paris --completion=", "trackstar: query prompt: the completion is empty"),
    Case("top", ASK + " --top 0", "trackstar: --top: expected 1 or more, found 0"),
    Case("mixing", ASK + " --mixing 1.5", "trackstar: --mixing: expected 0 (only R_train) to 1 (only R_eval), found 1.5"),
    Case("damping", ASK + " --damping -1", "trackstar: --damping: expected 0 or more, as a fraction of R_train's mean eigenvalue, found -1.0"),
    Case("too little damping", ASK + " --damping 0", "trackstar: attention.0-0: R is singular with damping 0"),
    Case("tokens", "query --index {index} --prompt Paris --generate --max-new-tokens 0", "trackstar: --max-new-tokens: expected 1 or more, found 0"),
    Case("no room to answer", "query --index {index} --prompt Paris --generate --max-new-tokens 90", "trackstar: query prompt: expected at least 1 token and room for 90 more "),
    Case("queries are no queries", "query --index {index} --queries {corpus}", 'trackstar: {corpus}:1: no prompt; expected a field prompt or'),
    Case("no queries", "query --index {index} --queries {folder}/q.jsonl", "trackstar: {folder}/q.jsonl: "),
    Case("queries as text", "query --index {index} --queries {folder}/q.txt", "trackstar: {folder}/q.txt: plain text; queries are records with a prompt", lambda w: w.write("q.txt", "Paris\n")),
    Case("results in no folder", ASK + " --out {corpus}/results.jsonl", "trackstar: {corpus}/results.jsonl: results cannot be written"),
    Case("unfinished index", ASK, "trackstar: {index}: the index is not finished (1 shards with 4 examples so far); make it again with the same settings", _unfinished),
    Case("cut shard", ASK, "trackstar: {index}/shards/000000.safetensors: ", _truncate("index/shards/000000.safetensors", 300)),
    Case("lost shard", ASK, "trackstar: {index}/shards/000000.safetensors: ", _remove("index/shards/000000.safetensors")),
    Case("changed V", ASK, "trackstar: {index}/second_moment.safetensors: ", _bytes_of_shard_changed),
    Case("cut manifest", ASK, "trackstar: {index}/manifest.json: ", _truncate("index/manifest.json", 200)),
    Case("manifest of the future", ASK, "trackstar: {index}/manifest.json: ", _other_manifest_format),
    Case("changed model", ASK, "trackstar: {index}: made with model.digest ", _other_model),
    Case("lost model", ASK, "trackstar: {model}: no such model", lambda w: shutil.rmtree(w.model)),
    Case("damaged, verified", "verify {index}", "{index}/shards/000000.safetensors: ", _truncate("index/shards/000000.safetensors", 300)),
    Case("nothing to verify", "verify {folder}", "trackstar: {folder}: not an index"),
    # Stores of few bits, growing, no index
    Case("codes of projected rows", "index --model {model} --data {corpus} --out {folder}/new --side 8 --codec 1-bit --coordinates projected", "trackstar: --coordinates: expected whitened for --codec 1-bit, whose codes are too coarse to compute R_train from, found projected; leave --coordinates out, or choose --codec float32, bfloat16 or float16"),
    Case("infinite damping", ASK + " --damping inf", "trackstar: --damping: expected a finite number, found inf"),
    Case("a side for codes", "index --model {model} --data {corpus} --out {folder}/new --side 4 --codec 1-bit", "trackstar: --side: expected a multiple of 8 for --codec 1-bit, found 4"),
    Case("coordinates", INDEX + " --coordinates polar", "trackstar: --coordinates: expected one of projected, whitened, found polar"),
    Case("no sample", INDEX + " --whitening-examples 0", "trackstar: --whitening-examples: expected 1 or more, found 0"),
    Case("too few again", ASK + " --top 5 --rerank 3", "trackstar: --rerank: expected at least --top 5, or 0 for no re-ranking, found 3"),
    Case("less than none again", ASK + " --rerank -1", "trackstar: --rerank: expected at least --top 10, or 0 for no re-ranking, found -1"),
    Case("neither index nor corpus", "query --prompt Paris --completion France", "trackstar: expected INDEX, or --data and --model"),
    Case("index and corpus", ASK + " --data {corpus} --model {model}", "trackstar: found both INDEX and --data"),
    Case("how gradients are made, of an index", ASK + " --side 8 --seed 1", "trackstar: --side, --seed: only with --data"),
    Case("exact and re-ranked", ASK + " --exact --rerank 20", "trackstar: found both --exact and --rerank; --exact re-ranks every candidate"),
    Case("no gradient, without an index", "query --data {corpus} --model {model} --prompt Paris --completion France --side 0", "trackstar: --side: expected 1 or more, found 0"),
    Case("a corpus without a model", "query --data {corpus} --prompt Paris --completion France", "trackstar: expected INDEX, or --data and --model"),
    Case("exact without an index", "query --data {corpus} --model {model} --prompt Paris --completion France --exact", "trackstar: --exact, --rerank: only with INDEX"),
    Case("converted to no codec", "convert --index {index} --codec 3-bit --out {folder}/new", "trackstar: --codec: expected one of float32"),
    Case("converted to more", "convert --index {index} --codec float32 --out {folder}/new", "trackstar: --codec: expected no more bits than float16, the codec of {index}, found float32"),
    Case("converted in place", "convert --index {index} --codec bfloat16 --out {index}", "trackstar: --out: {index} is the index itself or lies in it"),
    Case("converted side", "convert --index {index} --codec 1-bit --out {folder}/new", "trackstar: --side: expected a multiple of 8 for --codec 1-bit, found 4"),
    Case("nothing to convert", "convert --index {folder} --codec float16 --out {folder}/new", "trackstar: {folder}: not an index"),
    Case("merged alone", "merge {index} --out {folder}/new", "trackstar: INDEX...: expected two or more, found 1"),
    Case("merged into itself", "merge {index} {index} --out {index}", "trackstar: --out: {index} is the index itself or lies in it"),
    Case("merged with nothing", "merge {index} {folder} --out {folder}/new", "trackstar: {folder}: not an index"),
    Case("no names", "remove --index {index} --names {folder}/n.txt --out {folder}/new", "trackstar: {folder}/n.txt: holds no name", lambda w: w.write("n.txt", "\n \n")),
    Case("names that are not there", "remove --index {index} --names {folder}/n.txt --out {folder}/new", "trackstar: --names: expected ids of examples or documents of {index}, found 1 other names, such as 'nobody'", lambda w: w.write("n.txt", "nobody\n")),
    Case("names in binary", "remove --index {index} --names {folder}/n.txt --out {folder}/new", "trackstar: {folder}/n.txt: byte 1 is not UTF-8", lambda w: w.write("n.txt", b"a\xff\n")),
    Case("names nowhere", "remove --index {index} --names {folder}/n.txt --out {folder}/new", "trackstar: {folder}/n.txt: cannot be read (No such file"),
    Case("converted into itself", "convert --index {index} --codec bfloat16 --out {index}/new", "trackstar: --out: {index}/new is the index itself or lies in it"),
    Case("added into itself", "add --index {index} --data {corpus} --out {index}/new", "trackstar: --out: {index}/new is the index itself or lies in it"),
    Case("added to itself", "add --index {index} --data {corpus} --out {index}", "trackstar: --out: {index} is the index itself"),
    Case("added nothing", "add --index {index} --data {folder}/none.jsonl --out {folder}/new", "trackstar: {folder}/none.jsonl: "),
    Case("added a second time", "add --index {index} --data {corpus} --out {folder}/new", "trackstar: --data: {index} already contains {corpus}"),
    Case("merged with itself", "merge {index} {index} --out {folder}/new", "trackstar: INDEX...: {index} and {index} share 4 examples"),
    Case("added by another model", "add --index {index} --data {folder}/more.txt --out {folder}/new", "trackstar: {index}: made with model.digest", _other_model_and_text),
    # Audits
    Case("no audit", "audit {folder}/none.audit.json", "trackstar: {folder}/none.audit.json: cannot be read (No such file"),
    Case("audit of a folder", "audit {folder}", "trackstar: {folder}: cannot be read (Is a directory"),
    Case("audit of results", "audit {corpus}", "trackstar: {corpus}: the text is not JSON (Extra data"),
    Case("audit in binary", "audit {folder}/r.audit.json", "trackstar: {folder}/r.audit.json: expected JSON, found a byte that is not UTF-8 at 0", lambda w: w.write("r.audit.json", b"\xff\xfe")),
    Case("audit of the future", AUDIT, "trackstar: {folder}/r.audit.json: audit_version is 4, expected at most 3: a newer trackstar wrote the file", _edited_audit('"audit_version": 3', '"audit_version": 4')),
    Case("audit of another type", AUDIT, "trackstar: {folder}/r.audit.json: question.top is '10', expected a whole number", _edited_audit('"top": 10', '"top": "10"')),
    Case("audit of huge numbers", AUDIT, "trackstar: {folder}/r.audit.json: question.top is 1000000000000000000, expected 1 to 1000000000", _edited_audit('"top": 10', '"top": 1000000000000000000')),
    Case("audit of infinity", AUDIT, "trackstar: {folder}/r.audit.json: answer.mixing is inf, expected a finite number", _edited_audit('"mixing": 0.0', '"mixing": 1e999')),
    Case("audit with another field", AUDIT, "trackstar: {folder}/r.audit.json: threads_more is unknown, expected no field of this name", _edited_audit('"threads":', '"threads_more": 1, "threads":')),
    Case("audit that repeats a field", AUDIT, "trackstar: {folder}/r.audit.json: 'threads' is repeated", _edited_audit('"threads":', '"threads": 1, "threads":')),
    Case("audit that names a place", AUDIT, "trackstar: {folder}/r.audit.json: results.file is '../r.jsonl', expected a file name without folders", _edited_audit('"r.jsonl"', '"../r.jsonl"')),
    Case("audit changed by hand", AUDIT, "trackstar: {folder}/r.audit.json: digest is '", _edited_audit('"top": 10', '"top": 9')),
    Case("cut audit", AUDIT, "trackstar: {folder}/r.audit.json: the text is not JSON", lambda w: [_audited(w), _truncate("r.audit.json", 700)(w)]),
    Case("audit without results", AUDIT + " --results {folder}/none.jsonl", "trackstar: {folder}/none.jsonl: cannot be read (No such file", _audited),
    Case("audit with no index", AUDIT + " --index {folder}", "trackstar: {folder}: not an index (no manifest.json)", _audited),
    Case("audit with no model", AUDIT + " --model {folder}/none", "trackstar: {folder}/none: no such folder", _audited),
    Case("audit with no corpus", AUDIT + " --data {folder}/none.jsonl", "trackstar: {folder}/none.jsonl: no such file", _audited),
    Case("audit with no queries", AUDIT + " --queries {corpus}", "trackstar: {corpus}:1: no prompt", _audited),
    Case("audit with a task", AUDIT + " --task {corpus}", "trackstar: --task: the audit's R_eval comes from the queries themselves", _audited),
    Case("audit with too many corpora", AUDIT + " --data {corpus} --data {corpus}", "trackstar: --data: expected at most 1 corpora, as many as the audit names, found 2", _audited),
    Case("audit again without a model", AUDIT + " --again", "trackstar: --again: needs --model, --index; pass --model and --index", _audited),
    Case("audit's device", AUDIT + " --model {model} --device abacus", "trackstar: --device: expected auto, cpu or an available cuda or mps device, found 'abacus' (", _audited),
    # Pretraining
    Case("pretraining width", "pretrain --data {corpus} --out {folder}/run --width 7", "trackstar: --width: expected an even number of dimensions for each of 4 heads, found 7"),
    Case("pretraining optimizer", "pretrain --data {corpus} --out {folder}/run --optimizer sgd", "trackstar: --optimizer: expected one of adafactor, adamw, found sgd"),
    Case("pretraining in the wrong folder", "pretrain --data {corpus} --out {index} --steps 1", "trackstar: {index}: holds manifest.json, expected an empty folder"),
    Case("pretraining tokenizer", "pretrain --data {corpus} --out {folder}/run --steps 1 --tokenizer {folder}/empty", "trackstar: {folder}/empty: its tokenizer cannot be loaded", lambda w: (w.folder / "empty").mkdir()),
]  # fmt: skip


@pytest.fixture(scope="module")
def whole_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    world = World(folder=folder, model=folder / "model", corpus=folder / "corpus.jsonl", index=folder / "index")
    save_tiny_model(world.model, "llama")
    world.write("corpus.jsonl", "\n".join(json.dumps({"id": f"e{n}", "text": t}) for n, t in enumerate(TEXTS)))
    command = ["index", "--model", str(world.model), "--data", str(world.corpus), "--out", str(world.index)]
    assert framework.run(command_group, [*command, "--side", "4", "--codec", "float16"]) == 0
    return world


@pytest.fixture
def world(whole_world: World, tmp_path: Path) -> World:
    """A copy under a path that is always the same, as the index remembers where its model was."""
    folder = tmp_path / "world"
    shutil.copytree(whole_world.folder, folder)
    world = World(folder=folder, model=folder / "model", corpus=folder / "corpus.jsonl", index=folder / "index")
    # The copied index was made with the model of the original: it is made again in place.
    shutil.rmtree(world.index)
    command = ["index", "--model", str(world.model), "--data", str(world.corpus), "--out", str(world.index)]
    assert framework.run(command_group, [*command, "--side", "4", "--codec", "float16"]) == 0
    return world


def test_table_has_no_name_twice_and_is_long_enough():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names) >= 40


@pytest.mark.parametrize("case", CASES, ids=[case.name.replace(" ", "-") for case in CASES])
def test_mistake_is_one_line_that_names_it(
    case: Case, world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(world.folder)
    case.spoil(world)
    capsys.readouterr()
    paths = dataclasses.asdict(world)
    status = framework.run(command_group, [word.format(**paths) for word in case.command.split()])
    shown = capsys.readouterr()
    # Lines that merely tell what is done come first; the last one is the error.
    errors = [line for line in shown.err.splitlines() if line.strip()]
    expected = case.line.format(**paths)
    found = [line for line in errors if line.startswith(expected)]
    assert len(found) == 1, (expected, errors)
    assert status == case.status
    assert "Traceback" not in shown.err
    assert shown.out == ""
    assert re.search(r"[;:(.]", found[0])


def test_second_writer_is_refused(world: World, capsys: pytest.CaptureFixture[str]):
    with filelock.FileLock(world.index / ".lock"):
        command = f"index --model {world.model} --data {world.corpus} --out {world.index} --side 4 --codec float16"
        assert framework.run(command_group, command.split()) == 1
    assert f"trackstar: {world.index}: another process is writing this index" in capsys.readouterr().err


def test_gradient_that_is_not_finite_names_the_example(world: World, capsys: pytest.CaptureFixture[str]):
    shutil.rmtree(world.model)
    save_tiny_model(world.model, "gpt_neox")
    weights = load_file(world.model / "model.safetensors")
    token_id = tiny_tokenizer("plain")("Gold")["input_ids"][0]
    # Finite, but its square is not: only the one example with this word overflows in its layer norm.
    weights["gpt_neox.embed_in.weight"][token_id] = 3e38
    save_file(weights, world.model / "model.safetensors", metadata={"format": "pt"})
    command = f"index --model {world.model} --data {world.corpus} --out {world.folder}/new --side 4 --codec float16"
    assert framework.run(command_group, command.split()) == 1
    assert re.search(r"^trackstar: e2: its loss is nan, expected finite", capsys.readouterr().err, re.MULTILINE)
