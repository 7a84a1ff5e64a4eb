"""Text as the API sends it: valid Unicode, and messages without the backticks around parameters."""

import re

_SURROGATES = re.compile("[\ud800-\udfff]")
# A name, an assignment as in `codec="float16"`, or a call.
_CODE = re.compile(r"`([A-Za-z_][\w.]*(?:\s*=\s*[^`]+|\([^`]*\))?)`")


def sendable(text: str) -> str:
    """Replace each unpaired surrogate, which UTF-8 cannot encode, by U+FFFD."""
    return _SURROGATES.sub("\ufffd", text)


def without_backticks(message: str) -> str:
    """Remove the backticks around parameters and functions: `mixing` becomes mixing, as the browser
    shows it.
    """
    return _CODE.sub(r"\1", message)
