"""Queries z_q as the model reads them: their texts, and their tokens with the completion's as targets.

`query_files.py` reads them from files.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from trackstar.corpus.chat import ChatTemplate, Conversation, RenderedChat, conversation
from trackstar.corpus.joining import joined
from trackstar.corpus.records import Example, Query, TokenizedExample
from trackstar.corpus.tokenization import Tokenizer, check_window, encode, fast_backend, token_sequences
from trackstar.errors import CorpusError
from trackstar.text import abridged, one_line


def separator(query: Query) -> str:
    """What stands between the prompt and the completion in `query_text`: a space or nothing."""
    return query_text(query)[len(query.prompt) : -len(query.completion) or None] if query.completion else ""


def query_text(query: Query) -> str:
    """The text that the model reads: prompt and completion, joined as the query says."""
    return joined(query.prompt, query.completion, "none" if query.token_ids is not None else query.join)


def tokenize_query(query: Query, tokenizer: Tokenizer, *, window_tokens: int) -> TokenizedExample:
    """The tokens of a query, with the completion's tokens as targets.

    Prompt and completion are tokenized together. Special tokens precede the text as in training,
    and none follow it. A token is a target if any of its characters belongs to the completion,
    which includes a space that joins the two. The tokens of a query of tokens are taken as they
    are. A query of messages is rendered as a conversation of a corpus is; its targets are those of
    the last answer, without what the template writes behind the answer's text, such as the token
    that ends a turn. A query longer than the window loses the beginning of its prompt;
    the returned text is then shorter than `query_text`.

    Args:
        query: Query to tokenize.
        tokenizer: The model's tokenizer.
        window_tokens: Most tokens, special tokens included.

    Raises:
        CorpusError: The completion is empty, too long, or has no context, or the tokens and the
            target mask do not fit; the message names the query.
        ModelError: The tokenizer is not a fast one, or fails.
        OptionError: `window_tokens` leaves no room for a target.
    """
    description = f"query {one_line(query.query_id)}"
    backend = fast_backend(tokenizer)
    check_window(backend, window_tokens=window_tokens, overlap=1)
    if query.messages is not None:
        query = query_with_texts(query, tokenizer)
    if query.token_ids is not None:
        return _given_tokens(query, tokenizer, window_tokens, description)
    if not query.completion.strip():
        raise CorpusError(
            f"{description}: the completion is empty; expected the text whose probability is to be explained"
        )
    text = query_text(query)
    encoded = encode(backend, text, description)
    before = encoded.before
    offsets = encoded.offsets[before : len(encoded.token_ids) - encoded.after]
    token_ids = np.array(encoded.token_ids[: before + len(offsets)], dtype=np.int32)
    first = next((position for position, (_, stop) in enumerate(offsets) if stop > len(query.prompt)), len(offsets))
    targets = len(offsets) - first
    cut = max(0, len(token_ids) - window_tokens)
    _check_targets(description, targets, context=before + first, room=window_tokens - max(before, 1))
    target_mask = np.zeros(len(token_ids) - cut, dtype=bool)
    target_mask[-targets:] = True
    return _tokenized(
        query,
        text[offsets[cut][0] if cut else 0 :],
        np.concatenate([token_ids[:before], token_ids[before + cut :]]),
        target_mask,
    )


def query_with_texts(query: Query, tokenizer: Tokenizer) -> Query:
    """A query of tokens with the texts of its tokens, if it has none; a query of messages as one of
    tokens; any other query as it is.

    The completion begins at the first target.

    Raises:
        CorpusError: The tokens and the target mask do not fit, or the messages are no conversation
            with an answer.
        ModelError: The tokenizer is not a fast one, or has no chat template.
    """
    if query.messages is not None:
        return _of_conversation(query, tokenizer)
    if query.token_ids is None or query.prompt or query.completion:
        return query
    _, mask = checked_tokens(query, f"query {one_line(query.query_id)}")
    prompt, completion = token_texts(query.token_ids, int(mask.argmax()), tokenizer)
    return dataclasses.replace(query, prompt=prompt, completion=completion)


def prompt_of(query: Query, tokenizer: Tokenizer) -> str:
    """The text that a completion is generated from: the prompt, or the conversation before its last
    answer, up to where the assistant's turn begins.

    Raises:
        CorpusError: The chat template cannot render the conversation.
        ModelError: The tokenizer has no chat template.
    """
    if query.messages is None:
        return query.prompt
    chat = _conversation(query)
    if chat.messages[-1]["role"] == "assistant":
        chat = dataclasses.replace(chat, messages=chat.messages[:-1])
    return ChatTemplate.of(tokenizer, query.chat_template).prompt(chat, f"query {one_line(query.query_id)}")


def _of_conversation(query: Query, tokenizer: Tokenizer) -> Query:
    """A query of messages as one of tokens, whose targets are those of the last answer."""
    description = f"query {one_line(query.query_id)}"
    chat = _conversation(query)
    if not chat.answers:
        raise CorpusError(
            f"{description}: the conversation has no message of the assistant; expected one, whose probability is to "
            "be explained; add it"
        )
    chat = dataclasses.replace(chat, messages=chat.messages[: chat.answers[-1] + 1])
    rendered = ChatTemplate.of(tokenizer, query.chat_template).rendered(chat, "completion", description, is_query=True)
    targets = _within_answer(rendered, str(chat.messages[-1].get("content", "")))
    example = Example(example_id=query.query_id, text=rendered.text, record=0, targets=targets, special_tokens=False)
    ((_, tokens),) = token_sequences([example], tokenizer)
    if not tokens.target_mask.any():
        raise CorpusError(f"{description}: the last answer has no token; expected at least one")
    # What follows the last target is no context of it.
    stop = int(np.flatnonzero(tokens.target_mask)[-1]) + 1
    asked = dataclasses.replace(
        query, prompt="", completion="", messages=None, tools=None, chat_template=None,
        token_ids=tuple(tokens.token_ids[:stop].tolist()), target_mask=tuple(tokens.target_mask[:stop].tolist()),
    )  # fmt: skip
    return query_with_texts(asked, tokenizer)


def _within_answer(rendered: RenderedChat, answer: str) -> tuple[tuple[int, int], ...]:
    """The targets up to the end of the answer's text; all of them if the template changes the text.

    The token that ends a turn would ask why the model says no more. An example that states the same and
    then continues would be an opponent.
    """
    targets = rendered.targets or ()
    for text in (answer, answer.strip()):  # a template may trim it
        begin = rendered.text.rfind(text, targets[0][0], targets[-1][1]) if text.strip() and targets else -1
        if begin >= 0:
            end = begin + len(text)
            return tuple((start, min(stop, end)) for start, stop in targets if start < end)
    return targets


def _conversation(query: Query) -> Conversation:
    return conversation(query.messages, query.tools, "messages", f"query {one_line(query.query_id)}")


def token_texts(token_ids: Sequence[int], start: int, tokenizer: Tokenizer) -> tuple[str, str]:
    """The text of the tokens before position `start`, and that of the others.

    Both together are the text of all tokens, so that the second begins with the white space that
    its first token has. A character whose bytes are divided between the two is in the second.
    Special tokens are spelled out, but for those that the tokenizer puts before every text.

    Raises:
        ModelError: The tokenizer is not a fast one.
    """
    backend = fast_backend(tokenizer)
    leading = prompt_tokens("", tokenizer)
    first = len(leading) if list(token_ids[: len(leading)]) == leading else 0
    whole = backend.decode(list(token_ids[first:]), skip_special_tokens=False)
    prompt = backend.decode(list(token_ids[first:start]), skip_special_tokens=False)
    pairs = enumerate(zip(prompt, whole, strict=False))
    common = next((position for position, (one, other) in pairs if one != other), min(len(prompt), len(whole)))
    return whole[:common], whole[common:]


def prompt_tokens(prompt: str, tokenizer: Tokenizer, *, special_tokens: bool = True) -> list[int]:
    """The tokens of a prompt to generate from: special tokens precede it as in training, none
    follow. Without `special_tokens`, none precede it, as a rendered conversation has its own.

    Raises:
        CorpusError: The prompt holds half a surrogate pair.
        ModelError: The tokenizer is not a fast one, or fails.
    """
    # An empty text would not separate the special tokens before it from those after it.
    encoded = encode(fast_backend(tokenizer), prompt or "a", "prompt", special_tokens=special_tokens)
    return encoded.token_ids[: len(encoded.token_ids) - encoded.after if prompt else encoded.before]


def _given_tokens(query: Query, tokenizer: Tokenizer, window_tokens: int, description: str) -> TokenizedExample:
    """A query of tokens, without the first tokens after the leading special one if it is too long."""
    token_ids, mask = checked_tokens(query, description)
    first = int(mask.argmax())
    cut = max(0, len(token_ids) - window_tokens)
    kept = int(cut > 0 and token_ids[:1].tolist() == prompt_tokens("", tokenizer)[:1])
    if first < kept + cut + (not kept):
        room = window_tokens - 1
        raise CorpusError(
            f"{description}: the tokens from the first target on are {len(token_ids) - first}, and {room} fit the "
            "window; shorten it"
        )
    texts = query_with_texts(query, tokenizer)
    text = query_text(texts)
    if cut:
        text = "".join(token_texts(token_ids[kept + cut :].tolist(), first - kept - cut, tokenizer))
    return _tokenized(
        texts,
        text,
        np.concatenate([token_ids[:kept], token_ids[kept + cut :]]),
        np.concatenate([mask[:kept], mask[kept + cut :]]),
    )


def checked_tokens(query: Query, description: str) -> tuple[np.ndarray, np.ndarray]:
    """The token ids and the target mask of a query of tokens.

    Raises:
        CorpusError: They do not fit, a number is no token id, or no token, or the first, is a target.
    """
    token_ids, mask = query.token_ids or (), query.target_mask
    if mask is None or len(mask) != len(token_ids):
        found = "none" if mask is None else f"one of {len(mask)}"
        raise CorpusError(
            f"{description}: has {len(token_ids)} tokens; expected a target mask of as many flags, found {found}"
        )
    wrong = [token for token in token_ids if isinstance(token, bool) or not 0 <= token < 2**31]
    if wrong:
        raise CorpusError(f"{description}: token {abridged(wrong[0])}; expected ids from 0 to 2^31 - 1")
    if not any(mask):
        raise CorpusError(f"{description}: the completion has no token; expected at least one target")
    if mask[0]:
        raise CorpusError(
            f"{description}: its first token is a target, which has no context; put a token before it, or make it "
            "no target"
        )
    return np.array(token_ids, dtype=np.int32), np.array(mask, dtype=bool)


def _tokenized(query: Query, text: str, token_ids: np.ndarray, target_mask: np.ndarray) -> TokenizedExample:
    return TokenizedExample(
        example_id=query.query_id,
        parent_id=query.query_id,
        record=0,
        window=0,
        text=text,
        token_ids=token_ids,
        target_mask=target_mask,
    )


def _check_targets(description: str, targets: int, *, context: int, room: int) -> None:
    if not targets:
        raise CorpusError(f"{description}: the completion has no token; expected at least one")
    if targets > room:
        raise CorpusError(f"{description}: the completion has {targets} tokens, and {room} fit the window; shorten it")
    if not context:
        raise CorpusError(
            f"{description}: the prompt is empty and the tokenizer puts nothing before it, so the completion's first "
            "token has no context; give a prompt"
        )
