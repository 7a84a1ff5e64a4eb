"""BLAKE2b digests: names for content, in lower-case hexadecimal unless stated otherwise.

A digest of 128 bits tells apart what differs by accident: corpora, models, cached results. Files of
an index, manifests and audits have digests of 256 bits, for which nobody can make a second content
on purpose.
"""

import hashlib
import json
from collections.abc import Iterable
from typing import Protocol, runtime_checkable

_BLOCK_BYTES = 2**20


@runtime_checkable
class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


def running_digest(bits: int = 128) -> hashlib.blake2b:
    """A digest to update part by part."""
    return hashlib.blake2b(digest_size=bits // 8)


def digest_of_bytes(content: bytes | memoryview, *, bits: int = 128) -> str:
    """Digest of the bytes."""
    return hashlib.blake2b(content, digest_size=bits // 8).hexdigest()


def digest_of_parts(parts: Iterable[bytes | memoryview], *, bits: int = 128) -> str:
    """Digest of the parts, one after the other with nothing between them."""
    running = running_digest(bits)
    for part in parts:
        running.update(part)
    return running.hexdigest()


def digest_of_fields(*fields: bytes) -> str:
    """Digest of the fields, separated by zero bytes."""
    return digest_of_bytes(b"\0".join(fields))


def digest_of_json(value: object, *, sort_keys: bool = False, compact: bool = False, bits: int = 128) -> str:
    """Digest of the value as JSON in ASCII.

    Args:
        value: Any value that `json.dumps` accepts.
        sort_keys: Whether to sort keys; otherwise they keep their order.
        compact: Whether to leave out the white space between the parts of the text.
        bits: Length of the digest.
    """
    text = json.dumps(value, sort_keys=sort_keys, separators=(",", ":") if compact else None)
    return digest_of_bytes(text.encode("ascii"), bits=bits)


def digest_of_stream(stream: _Readable, *, bits: int = 128) -> str:
    """Digest of the rest of a stream, read in blocks of 1 MiB."""
    return digest_of_parts(iter(lambda: stream.read(_BLOCK_BYTES), b""), bits=bits)


def draw_bytes(content: bytes, *, key: str = "", bits: int = 128) -> bytes:
    """Pseudo-random bytes, a function of the content and the key alone: the digest's own bytes."""
    return hashlib.blake2b(content, digest_size=bits // 8, key=key.encode()).digest()
