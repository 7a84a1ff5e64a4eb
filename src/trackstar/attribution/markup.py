"""Untrusted text in HTML, for notebooks and exported pages: markup is escaped, invisible characters
are named.
"""

import html
import re
from collections.abc import Sequence

from trackstar.text import shortened

# Characters that move a cursor, reverse the writing direction or are invisible.
_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]")


def plain(text: str) -> str:
    """The text, escaped for HTML and for quoted attributes."""
    named = _INVISIBLE.sub(lambda match: f"⟨U+{ord(match.group()):04X}⟩", text)
    return html.escape(named, quote=True)


def candidates_table(rows: Sequence[tuple[str, float, str, str]], *, most_characters: int = 1000) -> str:
    """A table of candidates for a notebook.

    Args:
        rows: Role, influence, name and text of each candidate.
        most_characters: Length to which longer texts are cut.
    """
    cells = "".join(
        f"<tr><td>{plain(role)}</td><td style='text-align:right;font-variant-numeric:tabular-nums'>{influence:+.4f}"
        f"</td><td style='text-align:left'><code>{plain(name)}</code></td><td style='text-align:left;"
        f"overflow-wrap:anywhere;unicode-bidi:isolate' dir='auto'>{plain(shortened(text, most_characters))}</td></tr>"
        for role, influence, name, text in rows
    )
    return f"<table><thead><tr><th></th><th>influence</th><th>example</th><th>text</th></tr></thead>{cells}</table>"


def heat_map(pieces: Sequence[tuple[str, float]]) -> str:
    """A text for a notebook, its pieces coloured by influence: blue above zero, orange below.

    Args:
        pieces: Pieces of the text with their influences; pieces without text are left out.
    """
    strongest = max((abs(influence) for text, influence in pieces if text), default=0.0) or 1.0
    spans = []
    for text, influence in pieces:
        if text:
            colour = "40,110,220" if influence > 0 else "230,120,20"
            shade = f"rgba({colour},{0.75 * abs(influence) / strongest:.3f})"
            spans.append(f"<span style='background:{shade}' title='{influence:+.5f}'>{plain(text)}</span>")
    style = "white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:isolate"
    return f"<div style='{style}' dir='auto'>{''.join(spans)}</div>"
