"""Bytes of tensor files and of indexes of older format versions, made as FORMAT.md says, without the package's code."""

import hashlib
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import xxhash

DIGEST = slice(35, 99)


def sealed(content: bytes) -> bytes:
    """A tensor file with the checksums and the digest that its bytes have."""
    content = content[: DIGEST.start] + b"0" * 64 + content[DIGEST.stop :]
    content = _with_checksums(content)
    digest = hashlib.blake2b(content, digest_size=32).hexdigest().encode("ascii")
    return content[: DIGEST.start] + digest + content[DIGEST.stop :]


def _with_checksums(content: bytes) -> bytes:
    """The file with new numbers in its tensor `checksums`, if it has one that its header describes as the last."""
    length = int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8 : 8 + length])
        entries = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
        (start, stop), (_, codes) = header["checksums"]["data_offsets"], entries[0]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return content
    data = 8 + length
    places = [*range(0, codes, 65536), *range(codes, start, 4096), start]
    numbers = [xxhash.xxh3_64_intdigest(content[:data])]
    numbers += [
        xxhash.xxh3_64_intdigest(content[data + first : data + end]) for first, end in itertools.pairwise(places)
    ]
    packed = b"".join(number.to_bytes(8, "little") for number in numbers)
    packed += xxhash.xxh3_64_intdigest(packed).to_bytes(8, "little")
    if (data + start + len(packed), stop - start) != (len(content), len(packed)):
        return content
    return content[: data + start] + packed


def sealed_manifest(fields: dict[str, Any]) -> str:
    """The text of a manifest with these fields and the digest that it has."""
    fields = {name: value for name, value in fields.items() if name != "digest"}
    text = json.dumps(fields, indent=1) + "\n"
    digest = hashlib.blake2b(text.encode("ascii"), digest_size=32).hexdigest()
    return json.dumps(fields | {"digest": digest}, indent=1) + "\n"


def without_places(manifest: bytes) -> bytes:
    """A manifest without its digest and the paths of model and corpora, relative to the index or absolute."""
    try:
        fields = json.loads(manifest)
    except ValueError:
        return manifest
    for entry in (fields["model"], *fields["corpora"]):
        del entry["source"], entry["location"]
    del fields["digest"]
    return json.dumps(fields).encode("ascii")


def in_format_3(index: Path, out: Path) -> Path:
    """A copy of an index as format version 3: no checksums, and nothing of the model's configuration."""
    return _in_format(3, index, out)


def in_format_4(index: Path, out: Path) -> Path:
    """A copy of an index as format version 4: no metadata, and texts as the only form of records."""
    return _in_format(4, index, out)


def in_format_5(index: Path, out: Path) -> Path:
    """A copy of an index as format version 5: square matrices only."""
    return _in_format(5, index, out)


def _in_format(version: int, index: Path, out: Path) -> Path:
    shutil.copytree(index, out)
    shutil.rmtree(out / "derived", ignore_errors=True)
    manifest = json.loads((index / "manifest.json").read_text())
    manifest["format_version"] = version
    if version < 5:
        for name in ("truncate", "pack"):
            del manifest["windows"][name]
        for corpus in manifest["corpora"]:
            for name in ("format", "train_on", "join", "chat_template", "chat_template_text", "metadata"):
                del corpus[name]
        for name in ("parameters", "adapter"):
            del manifest["model"][name]
    if manifest["whitening"] is not None:
        assert manifest["whitening"]["rank"] is None, "older versions have square matrices only"
        del manifest["whitening"]["rank"]
    elif manifest["completion"]["autocorrelation_digest"] is None:  # which older versions store of few examples, too
        r_train = (out / "autocorrelation.safetensors").read_bytes()
        manifest["completion"]["autocorrelation_digest"] = r_train[DIGEST].decode("ascii")
    if version == 3:
        for name in ("location", "configuration", "libraries"):
            del manifest["model"][name]
        for corpus in manifest["corpora"]:
            del corpus["location"]
    identity = _identity_digest(manifest)
    for entry in manifest["completion"]["shards"]:
        file = out / "shards" / entry["file"]
        file.write_bytes(_older_shard(file.read_bytes(), identity, version))
        entry["digest"] = file.read_bytes()[DIGEST].decode("ascii")
    (out / "manifest.json").write_text(sealed_manifest(manifest))
    return out


def _older_shard(content: bytes, identity: str, version: int) -> bytes:
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    metadata = header.pop("__metadata__")
    metadata |= {"format": f"trackstar-shard-{min(version - 1, 4)}", "manifest_digest": identity}
    tensors, data = {}, b""
    for name, entry in header.items():
        if name == "checksums" or (version < 5 and name in ("metadata", "metadata_offsets")):
            continue
        first, stop = entry["data_offsets"]
        part = content[8 + length + first : 8 + length + stop]
        tensors[name] = entry | {"data_offsets": [len(data), len(data) + len(part)]}
        data += part
    if version > 3:
        codes = tensors["codes"]["data_offsets"][1]
        blocks = len(range(0, codes, 65536)) + len(range(codes, len(data), 4096))
        size = 8 * (blocks + 2)
        tensors["checksums"] = {"dtype": "I64", "shape": [blocks + 2], "data_offsets": [len(data), len(data) + size]}
        data += bytes(size)
    text = json.dumps({"__metadata__": metadata, **tensors}, separators=(",", ":")).encode("ascii")
    text += b" " * (-(8 + len(text)) % 4096)
    return sealed(len(text).to_bytes(8, "little") + text + data)


_DESCRIPTIVE = {
    "model.source", "model.revision", "model.gguf_file", "corpora.source", "second_moment.source", "whitening.source",
    "model.location", "model.libraries", "corpora.location", "corpora.chat_template_text",
}  # fmt: skip


def _identity_digest(manifest: dict[str, Any]) -> str:
    leaves: dict[str, Any] = {}

    def add(name: str, plain: str, value: Any) -> None:
        if plain in (*_DESCRIPTIVE, "completion", "digest"):
            return
        if isinstance(value, dict):
            for key, part in value.items():
                add(f"{name}.{key}".lstrip("."), f"{plain}.{key}".lstrip("."), part)
        elif isinstance(value, list):
            leaves[f"{name}.length"] = len(value)
            for place, part in enumerate(value):
                add(f"{name}[{place}]", plain, part)
        else:
            leaves[name] = value

    add("", "", manifest)
    text = json.dumps(leaves, separators=(",", ":"))
    return hashlib.blake2b(text.encode("ascii"), digest_size=32).hexdigest()
