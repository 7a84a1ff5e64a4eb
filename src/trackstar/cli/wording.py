"""Translate library messages: Python parameters become flags, public functions become commands.

The library names parameters and functions in backticks: `k`, `codec="float16"`, `build_index`. On
the command line they are `--top`, `--codec float16` and `trackstar index`.
"""

import dataclasses
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence

import click

COMMAND_OF = {
    "build_index": "index",
    "finish_index": "finish",
    "add_examples": "add",
    "merge_indexes": "merge",
    "remove_examples": "remove",
    "convert_index": "convert",
    "answer_queries": "query",
    "stream_queries": "query",
    "check_audit": "audit",
    "run_evaluation": "evaluate",
    "run_demo": "demo",
    "run_microscope": "microscope",
    "sample_answers": "generate",
    "made_questions": "questions",
    "verify": "verify",
    "explore": "explore",
    "evaluate": "evaluate",
    "pretrain": "pretrain",
    "demo": "demo",
    "microscope": "microscope",
}
"""The command that calls a public function."""

ALIASES = {
    "k": "top",
    "address": "ray",
    "workers": "ray_workers",
    "cpus": "ray_cpus",
    "gpus": "ray_gpus",
}
"""The command line's name of a parameter, if a command has it under another name than the function."""

CONFIGURED = frozenset({"evaluate"})
"""Commands whose settings are keys of a file: a parameter that is none of their flags keeps its name."""

_NAME = r"(?:trackstar\.)?([A-Za-z_]\w*)"
_VALUE = r"""("[^"]*"|'[^']*'|[^\s,()"'=]+(?:\([^()]*\))?)"""
_ASSIGNMENT = rf"[A-Za-z_]\w*\s*=\s*{_VALUE}"
_BACKTICKED = re.compile(r"(?:\b([Cc])all )?`([^`\n]{1,500})`")
_BARE = re.compile(_NAME)
_ASSIGNMENTS = re.compile(rf"{_ASSIGNMENT}(?:,\s*{_ASSIGNMENT})*")
_ONE_ASSIGNMENT = re.compile(rf"([A-Za-z_]\w*)\s*=\s*{_VALUE}")
_KEY = re.compile(r"[a-z_][a-z0-9_]*(?:\.[a-z_][a-z0-9_]*)*")
_CALL = re.compile(rf"{_NAME}\((.*)\)")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Wording:
    """Translate messages that appear while a command runs.

    A parameter becomes a flag of the running command, if it has one, else of the commands whose
    functions the message names, else of any other command.

    Attributes:
        command: The running command's name; None if there is none.
        commands: Every command by name, in the order of their help.
    """

    command: str | None
    commands: Mapping[str, click.Command]

    def __call__(self, message: str) -> str:
        """Return the message with flags and commands; any other text in backticks stays as it is."""
        if "`" not in message:
            return message
        order = self._search_order(message)

        def translated(match: re.Match[str]) -> str:
            call, text = match[1], match[2]
            command = self._command_line(text, order)
            if command is not None:
                run = "" if call is None else ("Run " if call == "C" else "run ")
                return run + command
            flags = self._flags(text, order)
            return match[0] if flags is None else match[0].replace(f"`{text}`", flags)

        return _BACKTICKED.sub(translated, message)

    def _search_order(self, message: str) -> list[str]:
        """Names of commands whose flags a parameter may mean, the likeliest first."""
        named = [
            COMMAND_OF[match[1]]
            for _, text in _BACKTICKED.findall(message)
            if (match := _CALL.fullmatch(text) or _BARE.fullmatch(text)) and match[1] in COMMAND_OF
        ]
        running = [] if self.command is None else [self.command]
        others = [] if self.command in CONFIGURED else [*named, *self.commands]
        return [name for name in dict.fromkeys([*running, *others]) if name in self.commands]

    def _command_line(self, text: str, order: Sequence[str]) -> str | None:
        """`trackstar COMMAND` and flags for a function or a call of one; None if the text is neither."""
        bare, call = _BARE.fullmatch(text), _CALL.fullmatch(text)
        match = call or bare
        if match is None or COMMAND_OF.get(match[1]) not in self.commands:
            return None
        command = COMMAND_OF[match[1]]
        line = f"trackstar {command}"
        if call is None or call[2] in ("", "..."):
            return line
        flags = self._flags(call[2], [command, *order])
        return None if flags is None else f"{line} {flags}"

    def _flags(self, text: str, order: Sequence[str]) -> str | None:
        """Flags for a parameter, or for parameters with values; None if one of them is unknown."""
        if bare := _BARE.fullmatch(text):
            return self._flag(bare[1], order)
        if self.command in CONFIGURED and _KEY.fullmatch(text):
            return text
        if not _ASSIGNMENTS.fullmatch(text):
            return None
        flags = [self._flag(name, order, value) for name, value in _ONE_ASSIGNMENT.findall(text)]
        return None if None in flags else " ".join(filter(None, flags))

    def _flag(self, name: str, order: Sequence[str], value: str | None = None) -> str | None:
        for command in order:
            for parameter in _parameters(self.commands[command]):
                if ALIASES.get(name, name) in _names_of(parameter):
                    return _shown(parameter, value)
        if self.command in CONFIGURED and _KEY.fullmatch(name):
            return name if value is None else f"{name} = {value.lower() if value in ('True', 'False') else value}"
        return None


def _parameters(command: click.Command) -> Iterator[click.Parameter]:
    """A command's arguments, then its options, without `--help` and the like."""
    parameters = [parameter for parameter in command.params if parameter.expose_value]
    yield from sorted(parameters, key=lambda parameter: isinstance(parameter, click.Option))


def _names_of(parameter: click.Parameter) -> set[str]:
    """The parameter's possible names in Python: click's name for it, and its flags as names."""
    return {str(parameter.name), *(opt.lstrip("-").replace("-", "_") for opt in parameter.opts)}


def _shown(parameter: click.Parameter, value: str | None) -> str:
    """The parameter as a user types it: `--top`, `--codec float16`; an argument's metavar or value."""
    text = None if value is None else _word(value)
    if not isinstance(parameter, click.Option):
        return (parameter.metavar or str(parameter.name).upper()).split()[-1].strip("[]") if text is None else text
    flag = next(opt for opt in parameter.opts if opt.startswith("--"))
    if text is None or (parameter.is_flag and value == "True"):
        return flag
    if parameter.is_flag and value == "False" and parameter.secondary_opts:
        return parameter.secondary_opts[0]
    return f"no {flag}" if value in ("False", "None") else f"{flag} {text}"


def _word(value: str) -> str:
    """A Python value as a word of a shell: quotes go unless the shell needs them."""
    return shlex.quote(value[1:-1] if value[0] in "\"'" else value) if value[0] in "\"'" else value
