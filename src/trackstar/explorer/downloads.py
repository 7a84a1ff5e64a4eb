"""HTTP responses that stream a file to the browser."""

from collections.abc import Iterable, Iterator

from fastapi.responses import StreamingResponse

from trackstar.explorer.exports import MEDIA_TYPES, ExportedQuery, ExportFormat, to_csv, to_html, to_jsonl

_PIECE_CHARACTERS = 1 << 16


def export(queries: Iterable[ExportedQuery], file: ExportFormat, name: str) -> StreamingResponse:
    """Queries with their rankings as a CSV, JSON lines or HTML file."""
    if file == "html":
        return download(to_html(queries, f"trackstar: {name}"), file, name)
    return download(to_csv(queries) if file == "csv" else to_jsonl(queries), file, name)


def download(parts: Iterator[str], file: ExportFormat, name: str) -> StreamingResponse:
    """Text as a file, named after `name` without characters that a file name may not hold."""
    stem = "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "-" for c in name.split(".")[0])[:80]
    return StreamingResponse(
        _pieces(parts),
        media_type=MEDIA_TYPES[file],
        headers={"content-disposition": f'attachment; filename="{stem or "trackstar"}.{file}"'},
    )


def _pieces(parts: Iterator[str]) -> Iterator[bytes]:
    """The parts joined to pieces of about 64 KiB, because each piece costs a change of threads."""
    piece, size = [], 0
    for part in parts:
        piece.append(part)
        size += len(part)
        if size >= _PIECE_CHARACTERS:
            yield "".join(piece).encode("utf-8", "replace")
            piece, size = [], 0
    if piece:
        yield "".join(piece).encode("utf-8", "replace")
