"""Conversations as text: a tokenizer's chat template renders them, and its answers are the targets.

The targets are what the template itself marks with `{% generation %}`. A template without marks is
rendered again up to each answer, with and without it: what the answer adds is its target.
"""

import dataclasses
import datetime
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, final

from trackstar.choices import TrainOn
from trackstar.corpus.digests import digest_of_json
from trackstar.corpus.fields import encodable, json_kind, listed
from trackstar.errors import CorpusError, ModelError, OptionError
from trackstar.text import abridged, first_line

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
"""Roles of messages, as chat templates name them."""

SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "observation": "tool",
}
"""Further names of roles in ShareGPT's conversations."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_CLOCK = re.compile(r"strftime_now\(\s*(?:'([^']*)'|\"([^\"]*)\")")
# Some templates write the day on which they are rendered. An index must not depend on the day.
_DAY = datetime.datetime(2024, 7, 26)
_ADVICE = "correct the record, or pass a file with another template as `chat_template`"

Spans = tuple[tuple[int, int], ...]
"""Half-open ranges of characters, ascending."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Conversation:
    """A checked conversation.

    Attributes:
        messages: The messages as templates read them: `role`, `content` and any further fields.
        tools: Descriptions of the tools, as the template reads them; None for none.
    """

    messages: tuple[Mapping[str, Any], ...]
    tools: Sequence[Any] | None

    @property
    def key(self) -> str:
        """The conversation as canonical text; different conversations have different ones."""
        return json.dumps([self.messages, self.tools], sort_keys=True, default=str)

    @property
    def answers(self) -> list[int]:
        """Positions of the assistant's messages."""
        return [number for number, message in enumerate(self.messages) if message["role"] == "assistant"]


def conversation(messages: object, tools: object, field: str, location: str, *, system: object = None) -> Conversation:
    """Check a record's messages and bring them into the form that templates read.

    Args:
        messages: The messages: `role` and `content`, or ShareGPT's `from` and `value`; or JSON of
            them, as tables of text hold it.
        tools: Descriptions of tools: a list, JSON of one, or None.
        field: Name of the field with the messages, for error messages.
        location: Location of the record, for error messages.
        system: Text of a system's message that precedes the others; anything else is ignored.

    Raises:
        CorpusError: A message is none, has an unknown role, or its content is no text.
    """
    if isinstance(messages, str):
        messages = _parsed(messages, f'{location}: field "{field}"', "an array of messages, or JSON of one")
    if not isinstance(messages, (list, tuple)):
        raise CorpusError(f'{location}: field "{field}" is {json_kind(messages)}; expected an array of messages')
    if not messages:
        raise CorpusError(f'{location}: field "{field}" is empty; expected messages of which one is the assistant\'s')
    checked = tuple(_message(message, f'{location}: field "{field}[{n}]"') for n, message in enumerate(messages))
    if isinstance(system, str) and system:
        checked = ({"role": "system", "content": system}, *checked)
    return Conversation(messages=checked, tools=_tools(tools, location))


def _parsed(text: str, where: str, expected: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise CorpusError(f"{where} is text that is no JSON; expected {expected}") from None


def _message(message: object, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise CorpusError(f"{where} is {json_kind(message)}; expected an object with role and content")
    sharegpt = "from" in message and "role" not in message
    role_field, content_field = ("from", "value") if sharegpt else ("role", "content")
    fields: dict[str, Any] = {str(name): value for name, value in message.items() if value is not None}
    role = fields.pop(role_field, None)
    if sharegpt and isinstance(role, str):
        role = SHAREGPT_ROLES.get(role, role)
    if role not in ROLES:
        if role_field not in message:
            raise CorpusError(
                f"{where} has no role; found {listed(list(map(str, message)))}; expected role and content"
            )
        known = ", ".join([*ROLES, *SHAREGPT_ROLES] if sharegpt else ROLES)
        raise CorpusError(f"{where} has the unknown role {abridged(role)}; expected one of {known}; rename it")
    content = fields.pop(content_field, None)
    if content is None:
        if not (role == "assistant" and fields.get("tool_calls")):
            raise CorpusError(f"{where} has no {content_field}; expected a string; correct it or leave the message out")
        return {"role": role, **fields}
    return {"role": role, "content": _content(content, where, content_field), **fields}


def _content(content: object, where: str, field: str) -> str:
    """The text of a message; texts of several parts are joined with nothing between them."""
    if isinstance(content, (list, tuple)):
        texts = []
        for number, part in enumerate(content):
            kind = part.get("type", "text") if isinstance(part, Mapping) else None
            text = part if isinstance(part, str) else part.get("text") if isinstance(part, Mapping) else None
            if not isinstance(text, str) or kind not in ("text", None):
                found = abridged(kind) if isinstance(kind, str) else json_kind(part)
                raise CorpusError(
                    f"{where}: part {number} of the {field} is {found}; expected text, as a causal language model "
                    "reads no other; leave the record out"
                )
            texts.append(text)
        content = "".join(texts)
    if not isinstance(content, str):
        raise CorpusError(f"{where}: the {field} is {json_kind(content)}; expected a string")
    return encodable(content, f"{where}: the {field}")


def _tools(tools: object, location: str) -> Sequence[Any] | None:
    if isinstance(tools, str) and tools.strip():
        tools = _parsed(tools, f'{location}: field "tools"', "an array of tools")
    if tools is None or tools == "" or tools == []:
        return None
    if not isinstance(tools, (list, tuple)) or not all(isinstance(tool, Mapping) for tool in tools):
        raise CorpusError(f'{location}: field "tools" is {json_kind(tools)}; expected an array of objects')
    return tools


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RenderedChat:
    """A conversation as text, and the ranges of characters that are targets; None for all of it."""

    text: str
    targets: Spans | None


@final
class ChatTemplate:
    """A chat template with the special tokens of a tokenizer.

    Args:
        template: The template's text, in Jinja.
        with_tools: The template for conversations with tools.
        variables: The tokenizer's special tokens by name.
    """

    def __init__(self, template: str, with_tools: str, variables: Mapping[str, Any]) -> None:
        self._templates = tuple(_of_one_day(text) for text in (template, with_tools))
        self._variables = dict(variables)
        self.text = template if template == with_tools else None
        """The template's text; None if conversations with tools have one of their own."""
        self.digest = digest_of_json([template, with_tools, self._variables], sort_keys=True)
        """Digest of the template and of the special tokens."""

    @classmethod
    def of(cls, tokenizer: Any, template: str | None) -> "ChatTemplate":
        """A tokenizer's own template, or another one with its special tokens.

        Args:
            tokenizer: The tokenizer.
            template: The text of a template; None is the tokenizer's own.

        Raises:
            ModelError: The tokenizer has no template.
        """
        variables = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
        if template is not None:
            return cls(template, template, variables)
        try:
            own, with_tools = tokenizer.get_chat_template(), tokenizer.get_chat_template(tools=[{}])
        except (ValueError, AttributeError) as error:
            raise ModelError(
                f"the tokenizer has no chat template, which conversations need ({first_line(error, 80)}); pass a file "
                "with the template of the training run as `chat_template`"
            ) from None
        return cls(own, with_tools, variables)

    def rendered(self, chat: Conversation, train_on: TrainOn, location: str, *, is_query: bool = False) -> RenderedChat:
        """A conversation as the model read it in training.

        Args:
            chat: The conversation.
            train_on: `assistant` for every answer, `completion` for the last one, `all` for every
                token.
            location: Location of the record, for error messages.
            is_query: Whether it is a query, whose targets are always an answer's; for error messages.

        Raises:
            CorpusError: The template refuses the conversation, or does not render a part of it as
                it renders the whole.
        """
        marked = _GENERATION.search(self._template(chat)) is not None and train_on != "all"
        text, spans = self._render(chat, chat.messages, location, marked=marked)
        if train_on == "all":
            return RenderedChat(text=text, targets=None)
        if not marked:
            answers = chat.answers[-1:] if train_on == "completion" else chat.answers
            return RenderedChat(text=text, targets=tuple(self._answers(chat, answers, text, location, is_query)))
        if train_on == "completion" and chat.answers[-1]:
            # An answer may have several marks, or be empty between them.
            _, earlier = self._render(chat, chat.messages[: chat.answers[-1]], location, marked=True)
            spans = spans[len(earlier) :]
        return RenderedChat(text=text, targets=tuple(span for span in spans if span[0] < span[1]))

    def prompt(self, chat: Conversation, location: str) -> str:
        """The text of a conversation up to where the assistant's next answer begins.

        Raises:
            CorpusError: The template refuses the conversation.
        """
        text, _ = self._render(chat, chat.messages, location, prompt=True)
        return text

    def _answers(
        self, chat: Conversation, answers: list[int], text: str, location: str, is_query: bool
    ) -> Iterator[tuple[int, int]]:
        """The range of each answer: what the template adds between the prompt for it and its end."""
        for number in answers:
            start = self._prefix(chat, number, text, location, prompt=True, is_query=is_query)
            last = number + 1 == len(chat.messages)
            stop = (
                len(text) if last else self._prefix(chat, number + 1, text, location, prompt=False, is_query=is_query)
            )
            yield start, stop

    def _prefix(
        self, chat: Conversation, messages: int, text: str, location: str, *, prompt: bool, is_query: bool
    ) -> int:
        """Length of the rendering of the first messages, which must begin the rendering of all."""
        part, _ = self._render(chat, chat.messages[:messages], location, prompt=prompt)
        if not text.startswith(part):
            other = ', or `train_on="all"`'
            at = next((n for n, (a, b) in enumerate(zip(part, text, strict=False)) if a != b), len(text))
            raise CorpusError(
                f"{location}: the chat template renders the first {messages} messages by themselves differently than "
                f"in the whole conversation (from character {at} on), so the answers cannot be found; pass a template "
                f"that marks them with {{% generation %}} as `chat_template`{'' if is_query else other}"
            )
        return len(part)

    def _template(self, chat: Conversation) -> str:
        return self._templates[chat.tools is not None]

    def _render(
        self,
        chat: Conversation,
        messages: Sequence[Mapping[str, Any]],
        location: str,
        *,
        marked: bool = False,
        prompt: bool = False,
    ) -> tuple[str, Spans]:
        from transformers.utils.chat_template_utils import render_jinja_template

        render: Any = render_jinja_template  # its annotations are narrower than what it takes and returns
        try:
            texts, spans = render(
                [list(messages)],
                tools=chat.tools,
                chat_template=self._template(chat),
                return_assistant_tokens_mask=marked,
                add_generation_prompt=prompt,
                **self._variables,
            )
        except Exception as error:  # templates raise whatever Jinja and their own checks raise
            what = "the conversation" if len(messages) == len(chat.messages) else f"its first {len(messages)} messages"
            raise CorpusError(
                f"{location}: the chat template cannot render {what} ({first_line(error, 160)}); {_ADVICE}"
            ) from None
        return texts[0], tuple((start, stop) for start, stop in (spans[0] if marked else ()))


def _of_one_day(template: str) -> str:
    """The template with a fixed day for `strftime_now`."""
    formats = sorted({one or other for one, other in _CLOCK.findall(template)})
    if "strftime_now" not in template:
        return template
    days = json.dumps({each: _DAY.strftime(each) for each in formats})
    macro = f'{{% macro strftime_now(format) %}}{{{{ {days}.get(format, "{_DAY:%d %b %Y}") }}}}{{% endmacro %}}'
    return f"{macro}{{{{ '' }}}}{template}"


def read_template(path: object) -> str:
    """The text of a file with a chat template.

    Raises:
        OptionError: It cannot be read, is not UTF-8, or is empty.
    """
    try:
        with open(str(path), encoding="utf-8") as file:
            text = file.read()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise OptionError(
            f"`chat_template`: {path} cannot be read ({reason}); expected a text file with a Jinja template"
        ) from None
    if not text.strip():
        raise OptionError(f"`chat_template`: {path} is empty; expected a text file with a Jinja template")
    return text
