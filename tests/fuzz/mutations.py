"""Changes to a reader's input that keep what would otherwise be refused first: digests, offsets, compression, CRCs."""

import contextlib
import gzip
import hashlib
import io
import json
import random
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

from shard_bytes import sealed
from trackstar import store
from trackstar.audit.record import DESCRIPTIVE
from trackstar.errors import TrackstarError

Mutation = Callable[[bytes, random.Random], bytes]

_HEADER_START = b'{"__metadata__":{"digest":"'
_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1}
_NUMBERS = (
    0, 1, -1, 2, 3, 7, 8, 15, 16, 64, 127, 255, 256, 4096, 2**31 - 1, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63,
    2**64, -(2**31), -(2**63), 10**30, 10**400, 10**4299,
)  # fmt: skip
_FLOATS = (0.0, -0.0, 0.5, 1.0, 1e-300, 1e300, 5e-324, -1.5, 3.4e38, 1e39, float("nan"), float("inf"), -float("inf"))
_STRINGS = (
    "", " ", "a", "\n", "a\nb", "\r\n", "\x1b[31m", "\0", "\x7f", "\u2028", "\u202e", "\ud800", "\udfff\ud800", "é",
    "0", "-1", "1e9", "../../etc/passwd", "~nobody/x", "x" * 300, "x" * 5000, "000000.safetensors", "0" * 64, "null",
    "%s{}", "１２", "²", "Infinity", "none", "factored", "elementwise", "1-bit", "4-bit", "int8", "float16", "whitened",
    "projected", "one-sided", "text", "id", "\U0001f600", "a#1", "#",
)  # fmt: skip


def havoc(content: bytes, generator: random.Random) -> bytes:
    """A few bytes changed, inserted, repeated or cut out."""
    data = bytearray(content)
    for _ in range(generator.choice((1, 1, 1, 2, 4, 8))):
        place = generator.randrange(len(data) + 1)
        kind = generator.randrange(7)
        if kind == 0 and place < len(data):
            data[place] ^= 1 << generator.randrange(8)
        elif kind == 1 and place < len(data):
            data[place] = generator.choice((0, 1, 9, 10, 13, 34, 44, 91, 92, 123, 125, 127, 128, 192, 255))
        elif kind == 2:
            data[place:place] = generator.randbytes(generator.choice((1, 2, 4, 8)))
        elif kind == 3:
            del data[place : place + generator.choice((1, 2, 4, 8, 64, 1024))]
        elif kind == 4:
            part = data[place : place + generator.choice((1, 4, 16, 256))]
            data[place:place] = part * generator.choice((1, 1, 3, 30))
        elif kind == 5:
            width = generator.choice((1, 2, 4, 8))
            data[place : place + width] = (generator.choice(_NUMBERS[:24]) % 2 ** (8 * width)).to_bytes(width, "little")
        else:
            other = generator.randrange(len(data) + 1)
            width = generator.choice((1, 4, 16, 256))
            data[place : place + width] = data[other : other + width]
    return bytes(data)


# ---- JSON -----------------------------------------------------------------------------------------------------


def any_value(generator: random.Random, depth: int = 0) -> Any:
    """A JSON value of any kind, odd ones above all."""
    kind = generator.randrange(8)
    if kind == 0:
        return generator.choice((None, True, False))
    if kind <= 2:
        return generator.choice(_NUMBERS)
    if kind == 3:
        return generator.choice(_FLOATS)
    if kind <= 5 or depth > 2:
        return generator.choice(_STRINGS)
    if generator.randrange(60) == 0:
        return _nested(generator.choice((30, 200, 900, 985, 2000)), generator)
    items = [any_value(generator, depth + 1) for _ in range(generator.randrange(4))]
    return items if kind == 6 else {generator.choice(_STRINGS): item for item in items}


def _nested(depth: int, generator: random.Random) -> "Deep":
    return Deep(depth, generator.choice("[{"))


class Deep:
    """A value that is nested more deeply than an encoder goes; written by `encoded`."""

    def __init__(self, depth: int, kind: str) -> None:
        self.text = "[" * depth + "]" * depth if kind == "[" else '{"a":' * depth + "0" + "}" * depth


def encoded(value: Any, *, indent: int | None = None) -> str:
    """The value as JSON; `Deep` ones as they are written."""
    deep: list[str] = []

    def write(found: object) -> str:
        assert isinstance(found, Deep)
        deep.append(found.text)
        return f"@deep {len(deep) - 1}@"

    separators = (",", ":") if indent is None else None
    text = json.dumps(value, default=write, separators=separators, indent=indent)
    for number, written in enumerate(deep):
        text = text.replace(f'"@deep {number}@"', written)
    return text


def mutated_value(root: Any, generator: random.Random) -> Any:
    """The value with one of its parts replaced, removed, renamed, repeated or put in the place of another."""
    parents = list(_containers(root))
    if not parents or generator.randrange(40) == 0:
        return any_value(generator)
    parent = generator.choice(parents)
    keys: list[Any] = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
    kind = generator.randrange(8)
    if not keys or kind == 0:
        value = any_value(generator)
        if isinstance(parent, dict):
            parent[generator.choice(_STRINGS)] = value
        else:
            parent.insert(generator.randrange(len(parent) + 1), value)
        return root
    key = generator.choice(keys)
    if kind == 1:
        del parent[key]
    elif kind == 2 and isinstance(parent, dict):
        parent[generator.choice(_STRINGS)] = parent.pop(key)
    elif kind == 3:
        other = generator.choice(parents)
        values = list(other.values()) if isinstance(other, dict) else other
        if values:
            parent[key] = json.loads(json.dumps(generator.choice(values), default=lambda _: None))
    elif kind == 4 and isinstance(parent, list):
        parent.extend(parent[key : key + 1] * generator.choice((1, 2, 20)))
    elif kind == 5 and isinstance(parent[key], int):
        parent[key] += generator.choice((-1, 1, 8))
    elif kind == 6 and isinstance(parent[key], str):
        parent[key] += generator.choice(_STRINGS)
    else:
        parent[key] = any_value(generator)
    return root


def _containers(value: Any) -> Any:
    if isinstance(value, (dict, list)):
        yield value
        for part in value.values() if isinstance(value, dict) else value:
            yield from _containers(part)


def _loaded(text: str | bytes) -> Any:
    return json.loads(text)


# ---- What an index is made of ---------------------------------------------------------------------------------


def resealed(content: bytes) -> bytes:
    """A tensor file with the checksums and the digest that its bytes have."""
    return sealed(content)


def tensor_file(header: Any, data: bytes) -> bytes:
    """A tensor file with this header, padded, and these data; its digest is what the header says."""
    text = encoded(header).encode("ascii")
    text += b" " * (-(8 + len(text)) % 4096)
    return len(text).to_bytes(8, "little") + text + data


def mutated_tensor_file(content: bytes, generator: random.Random, change_bytes: Mutation = havoc) -> bytes:
    """Header or data of a file of tensors changed, mostly with offsets that fit again, mostly with its digest."""
    try:
        length = int.from_bytes(content[:8], "little")
        header, data = _loaded(content[8 : 8 + length]), content[8 + length :]
        assert isinstance(header, dict)
    except (ValueError, AssertionError, RecursionError):
        return change_bytes(content, generator)
    kind = generator.randrange(10)
    if kind == 0:
        changed = change_bytes(content, generator)
    elif kind <= 3:
        changed = content[: 8 + length] + _changed_numbers(header, data, generator, change_bytes)
    elif kind == 4:
        changed = tensor_file(mutated_value(header, generator), data)
    elif kind == 5 and isinstance(header.get("__metadata__"), dict):
        names = [name for name in header["__metadata__"] if name != "digest"]
        header["__metadata__"][generator.choice([*names, "x"])] = generator.choice(
            [*_STRINGS, *(str(number) for number in _NUMBERS)]
        )
        changed = tensor_file(header, data)
    else:
        changed = tensor_file(*_rearranged(header, data, generator))
    return resealed(changed) if generator.randrange(10) else changed


def _changed_numbers(header: dict[str, Any], data: bytes, generator: random.Random, change_bytes: Mutation) -> bytes:
    """The same number of bytes with some of one tensor's numbers changed, as a whole element where that is known."""
    entries = [entry for name, entry in header.items() if name != "__metadata__" and isinstance(entry, dict)]
    try:
        entry = generator.choice(entries)
        start, stop = entry["data_offsets"]
        width = _SIZES[entry["dtype"]]
        assert 0 <= start < stop <= len(data)
    except (IndexError, KeyError, TypeError, ValueError, AssertionError):
        return change_bytes(data, generator)
    changed = bytearray(data)
    for _ in range(generator.choice((1, 1, 2, 5))):
        place = start + generator.randrange((stop - start) // width or 1) * width
        choices = [generator.randbytes(width), bytes(width), b"\xff" * width, b"\xff" * (width - 1) + b"\x7f"]
        choices.append((generator.choice(_NUMBERS[:24]) % 2 ** (8 * width)).to_bytes(width, "little"))
        if width == 4:
            choices += [b"\0\0\x80\x7f", b"\0\0\x80\xff", b"\0\0\xc0\x7f", b"\1\0\0\0", b"\0\0\x80\x3f", b"\0\0\0\x80"]
        changed[place : place + width] = generator.choice(choices)
    return bytes(changed[: len(data)])


def _rearranged(header: dict[str, Any], data: bytes, generator: random.Random) -> tuple[dict[str, Any], bytes]:
    """Tensors of other shapes, types, names or order, one after the other, and as many bytes."""
    parts: list[tuple[str, str, list[Any], bytes]] = []
    metadata = header.get("__metadata__", {})
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            start, stop = entry["data_offsets"]
            parts.append((name, entry["dtype"], list(entry["shape"]), data[start:stop]))
        except (KeyError, TypeError, ValueError):
            continue
    if not parts:
        return mutated_value(header, generator), data
    place = generator.randrange(len(parts))
    name, dtype, shape, content = parts[place]
    kind = generator.randrange(7)
    if kind == 0:
        dtype = generator.choice([*_SIZES, "F8_E4M3", "C64", "", "f32"])
    elif kind == 1 and shape:
        shape[generator.randrange(len(shape))] = generator.choice((0, 1, 2, 3, 4, 9, 63, 65, 2**40, 2**62, 2**63))
    elif kind == 2:
        shape.insert(generator.randrange(len(shape) + 1), generator.choice((0, 1, 1, 2, 2**62)))
    elif kind == 3 and shape:
        shape.pop(generator.randrange(len(shape)))
    elif kind == 4:
        name = generator.choice([*_STRINGS, *(part[0] for part in parts), f"{name}x"])
    elif kind == 5:
        generator.shuffle(parts)
        place = parts.index((name, dtype, shape, content))
    else:
        parts.pop(place)
        place = -1
    if place >= 0:
        parts[place] = (name, dtype, shape, content)
    return laid_out(parts, metadata)


def laid_out(parts: list[tuple[str, str, list[Any], bytes]], metadata: Any) -> tuple[dict[str, Any], bytes]:
    """The header and data of tensors (name, dtype, shape, bytes) whose data are cut or filled to their shapes."""
    header: dict[str, Any] = {"__metadata__": metadata}
    data = b""
    for name, dtype, shape, content in parts:
        size = _SIZES.get(str(dtype), 1)
        for length in shape:
            size *= length if isinstance(length, int) else 1
        if 0 <= size <= 20_000:
            content = (content + content[-8:] * 2500 + bytes(size))[:size]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + size]}
        data += content
    return header, data


def mutated_manifest(content: bytes, generator: random.Random, change_bytes: Mutation = havoc) -> bytes:
    """A field of a manifest changed, mostly laid out and with a digest as ours are."""
    try:
        fields = _loaded(content)
        assert isinstance(fields, dict)
    except (ValueError, AssertionError, RecursionError):
        return change_bytes(content, generator)
    if generator.randrange(8) == 0:
        return change_bytes(content, generator)
    for _ in range(generator.choice((1, 1, 1, 2))):
        fields = mutated_value(fields, generator)
    return sealed_manifest(fields)


def sealed_manifest(fields: Any) -> bytes:
    """The text of a manifest with the digest of its fields."""
    if not isinstance(fields, dict):
        return encoded(fields, indent=1).encode("ascii")
    fields.pop("digest", None)
    digest = hashlib.blake2b(f"{encoded(fields, indent=1)}\n".encode("ascii"), digest_size=32).hexdigest()
    return f"{encoded(fields | {'digest': digest}, indent=1)}\n".encode("ascii")


def mutated_audit(content: bytes, generator: random.Random, change_bytes: Mutation = havoc) -> bytes:
    """A field of an audit changed, mostly with a digest as ours are, and with that of another manifest's identity."""
    try:
        fields = _loaded(content)
        assert isinstance(fields, dict)
    except (ValueError, AssertionError, RecursionError):
        return change_bytes(content, generator)
    if generator.randrange(8) == 0:
        return change_bytes(content, generator)
    changed = mutated_value(generator.choice((fields, fields, *_objects(fields))), generator)
    if generator.randrange(8):
        with contextlib.suppress(AttributeError, TypeError, ValueError, RecursionError):
            fields = sealed_audit(fields)
    return encoded(fields if isinstance(changed, dict | list) else changed, indent=1).encode("ascii")


def _objects(fields: dict[str, Any]) -> list[Any]:
    return [value for value in fields.values() if isinstance(value, dict)]


def sealed_audit(fields: dict[str, Any]) -> dict[str, Any]:
    """An audit's fields with the digests that they have."""
    with contextlib.suppress(TrackstarError, LookupError, TypeError, ValueError, RecursionError):
        made_with = store.Manifest.from_json(sealed_manifest(dict(fields["made_with"])).decode("ascii"))
        fields["index"]["identity"] = made_with.identity_digest()
    kept = _identity({name: value for name, value in fields.items() if name not in ("descriptive", "digest")}, "")
    text = json.dumps(kept, separators=(",", ":"), sort_keys=True)
    return fields | {"digest": hashlib.blake2b(text.encode("ascii"), digest_size=32).hexdigest()}


def _identity(value: Any, name: str) -> Any:
    """Without the fields that are only descriptive."""
    if isinstance(value, dict):
        named = {key: f"{name}.{key}".removeprefix(".") for key in value}
        return {key: _identity(part, named[key]) for key, part in value.items() if named[key] not in DESCRIPTIVE}
    return [_identity(part, name) for part in value] if isinstance(value, list) else value


# ---- Lines ----------------------------------------------------------------------------------------------------


def plain_and_packer(content: bytes) -> tuple[bytes, Callable[[bytes], bytes]]:
    """Compressed lines, decompressed as far as they go (1 MiB at most), and what compresses them again."""
    import zstandard

    try:
        if content.startswith(b"\x1f\x8b"):
            return gzip.GzipFile(fileobj=io.BytesIO(content)).read(2**20), lambda plain: gzip.compress(
                plain, 1, mtime=0
            )
        if content.startswith(b"\x28\xb5\x2f\xfd"):
            plain = zstandard.ZstdDecompressor().stream_reader(content).read(2**20)
            return plain, lambda plain: zstandard.ZstdCompressor(level=1).compress(plain)
    except (OSError, EOFError, ValueError, zlib.error, zstandard.ZstdError):
        pass
    return content, lambda plain: plain


def mutated_lines(content: bytes, generator: random.Random, change_bytes: Mutation = havoc) -> bytes:
    """A line of JSON changed as JSON or as bytes, under its compression or in it."""
    if generator.randrange(6) == 0:
        return change_bytes(content, generator)
    plain, packed = plain_and_packer(content)
    kind = generator.randrange(10)
    if kind == 0:
        import zstandard

        packed = generator.choice(
            (bytes, lambda text: gzip.compress(text, 1, mtime=0), zstandard.ZstdCompressor(level=1).compress)
        )
    if kind <= 2:
        return packed(change_bytes(plain, generator))
    lines = plain.split(b"\n")
    place = generator.randrange(len(lines))
    if kind == 3:
        lines.insert(place, generator.choice(lines))
        return packed(b"\n".join(lines))
    try:
        value = mutated_value(_loaded(lines[place]), generator)
        text = encoded(value)
        if generator.randrange(3) == 0:
            text = text.encode("ascii").decode("unicode_escape").encode("utf-8", "replace").decode()
        lines[place] = text.encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):
        lines[place] = change_bytes(lines[place], generator)
    return packed(b"\n".join(lines))


def mutated_json(content: bytes, generator: random.Random, change_bytes: Mutation = havoc) -> bytes:
    """A file of JSON changed as JSON, or as bytes."""
    if generator.randrange(5) == 0:
        return change_bytes(content, generator)
    try:
        return encoded(mutated_value(_loaded(content), generator)).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):
        return change_bytes(content, generator)


def mutated_text(content: bytes, generator: random.Random, change_bytes: Mutation = havoc) -> bytes:
    """Text with its lines swapped, repeated, or odd words put into it."""
    if generator.randrange(3) == 0:
        return change_bytes(content, generator)
    lines = content.split(b"\n")
    place = generator.randrange(len(lines))
    word = encoded(any_value(generator)).encode("ascii")
    name, equals, _ = lines[place].partition(b"=")
    kind = generator.randrange(4)
    if kind == 0:
        lines.insert(place, generator.choice(lines))
    elif kind == 1 and equals:
        lines[place] = name + b"= " + word
    elif kind == 2:
        lines[place] = word + b" = " + lines[place].partition(b"=")[2]
    else:
        lines.insert(place, generator.choice((b"x = ", b"[tail_patch]\nqueries = ", b"seed = ", b"damping = ")) + word)
    return b"\n".join(lines)


# ---- Files of others ------------------------------------------------------------------------------------------


def mutated_parquet(content: bytes, generator: random.Random, change_bytes: Mutation = havoc) -> bytes:
    """The footer, the pages or all of a Parquet file changed; the footer's length is right again."""
    kind = generator.randrange(4)
    length = int.from_bytes(content[-8:-4], "little")
    if kind == 0 or content[-4:] != b"PAR1" or length > len(content) - 12:
        return change_bytes(content, generator)
    body, footer = content[: -8 - length], content[-8 - length : -8]
    if kind <= 2:
        footer = change_bytes(footer, generator)
    else:
        body = body[:4] + change_bytes(body[4:], generator)[: len(body) - 4].ljust(len(body) - 4, b"\0")
    return body + footer + len(footer).to_bytes(4, "little") + b"PAR1"


def mutated_safetensors(content: bytes, generator: random.Random, change_bytes: Mutation = havoc) -> bytes:
    """A safetensors file of others: header and data changed, without a digest of ours."""
    try:
        length = int.from_bytes(content[:8], "little")
        header, data = _loaded(content[8 : 8 + length]), content[8 + length :]
        assert isinstance(header, dict)
    except (ValueError, AssertionError, RecursionError):
        return change_bytes(content, generator)
    kind = generator.randrange(8)
    if kind == 0:
        return change_bytes(content, generator)
    if kind <= 2:
        return content[: 8 + length] + _changed_numbers(header, data, generator, change_bytes)
    if kind == 3:
        header = mutated_value(header, generator)
    elif kind == 4:
        header["__metadata__"] = {"betas": encoded(any_value(generator)), "format": "pt"}
    elif kind == 5:
        header["__metadata__"] = {"betas": encoded([0.9, any_value(generator)])}
    else:
        header, data = _rearranged(header, data, generator)
        if not header.get("__metadata__"):
            header.pop("__metadata__", None)
    text = encoded(header).encode("ascii")
    return len(text).to_bytes(8, "little") + text + data


def mutated_zip(content: bytes, generator: random.Random, change_bytes: Mutation = havoc) -> bytes:
    """One file of a zip archive changed, and the archive made again, so that every CRC is right."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            files = {name: archive.read(name) for name in archive.namelist()}
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, RuntimeError, MemoryError):
        return change_bytes(content, generator)
    if not files or generator.randrange(8) == 0:
        return change_bytes(content, generator)
    pickles = [name for name in files if name.endswith(".pkl")]
    name = generator.choice(pickles if pickles and generator.randrange(4) else list(files))
    files[name] = change_bytes(files[name], generator)
    result = io.BytesIO()
    with zipfile.ZipFile(result, "w") as archive:
        for each, data in files.items():
            archive.writestr(zipfile.ZipInfo(each, (1980, 1, 1, 0, 0, 0)), data)
    return result.getvalue()
