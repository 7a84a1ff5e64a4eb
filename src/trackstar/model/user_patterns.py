"""Match a user's regular expression in a process of its own: endless backtracking ends in an error."""

import json
import re
import subprocess
import sys
import warnings
from collections.abc import Iterable

from trackstar.errors import OptionError
from trackstar.text import abridged

SECONDS = 10
"""Time that a pattern may take for all names; a reasonable one takes milliseconds."""

_LONGEST = 2000

_MATCH = """
import json, re, sys, warnings
warnings.simplefilter("ignore")
pattern, names = json.load(sys.stdin)
found = [re.fullmatch(pattern, name) for name in names]
json.dump([None if match is None else [match.group(1)] for match in found], sys.stdout)
"""


def compiled(pattern: str, parameter: str) -> re.Pattern[str]:
    """The pattern, compiled.

    Raises:
        OptionError: It is no regular expression, or has no group; the message names the parameter.
    """
    if len(pattern) > _LONGEST:
        raise OptionError(
            f"`{parameter}`: expected a regular expression of at most {_LONGEST} characters, found {len(pattern)}"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about sets that may mean something else in the future
            found = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise OptionError(f"`{parameter}`: expected a regular expression, found {pattern!r} ({error})") from None
    if found.groups < 1:
        raise OptionError(
            f"`{parameter}`: expected a first group that captures the layer's number, such as (\\d+), found {pattern!r}"
        )
    return found


def first_groups(pattern: str, names: Iterable[str], parameter: str) -> dict[str, str | None]:
    """The first group of the pattern for each name that it matches whole; None for a group without a match.

    Raises:
        OptionError: The pattern takes longer than `SECONDS`, or more memory than there is.
    """
    compiled(pattern, parameter)
    names = list(names)
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _MATCH],
            input=json.dumps([pattern, names]), capture_output=True, text=True, timeout=SECONDS, check=True,
        )  # fmt: skip
        groups = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        raise OptionError(
            f"`{parameter}`: expected a pattern that is matched within {SECONDS} s, found {abridged(pattern)}; leave "
            "out repeats within repeats, such as (a+)+"
        ) from None
    except subprocess.CalledProcessError as error:
        raise OptionError(
            f"`{parameter}`: expected a pattern that can be matched, found {abridged(pattern)} (exit status "
            f"{error.returncode}); write a simpler one"
        ) from None
    return {name: found[0] for name, found in zip(names, groups, strict=True) if found is not None}
