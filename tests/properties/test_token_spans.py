"""Spans of tokens in the text: in order, complete, and in windows the same as in the whole text."""

import functools
from collections.abc import Sequence
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from tiny_models import tiny_tokenizer
from trackstar.corpus import Example, Query, TokenizedExample, tokenize_example, tokenize_query
from trackstar.corpus.token_spans import TextSpan, token_spans


def pieces(example: TokenizedExample, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return [example.text[span.start : span.stop] for span in token_spans(example, tokenizer)]


def whole(text: str, tokenizer: PreTrainedTokenizerFast) -> TokenizedExample:
    (example,) = tokenize_example(Example(example_id="e", text=text, record=0), tokenizer, window_tokens=1000)
    return example


def assert_spans_in_order(spans: Sequence[TextSpan], example: TokenizedExample) -> None:
    assert len(spans) == len(example.token_ids)
    for before, after in zip([TextSpan(start=0, stop=0), *spans], spans, strict=False):
        assert before.start <= after.start <= after.stop <= len(example.text)
        assert before.stop <= after.stop


def test_spans_tile_plain_text_and_special_tokens_have_none():
    tokenizer = tiny_tokenizer("bos_eos")
    text = "The capital of France is Paris."
    found = pieces(whole(text, tokenizer), tokenizer)
    assert "".join(found) == text
    assert [piece == "" for piece in found] == [True, *[False] * (len(found) - 2), True]
    assert token_spans(whole(text, tokenizer), tokenizer)[-1] == TextSpan(start=len(text), stop=len(text))


def test_tokens_that_are_parts_of_a_character_share_its_span():
    tokenizer = tiny_tokenizer("bos")
    found = pieces(whole("a日🦜ü b", tokenizer), tokenizer)
    assert [piece for piece in found if piece == "日"] == ["日"] * 3
    assert [piece for piece in found if piece == "🦜"] == ["🦜"] * 4
    assert found[-2:] == [" ", "b"] or found[-1] == " b"


@pytest.mark.parametrize("special_tokens", ["plain", "bos", "bos_eos"])
def test_spans_of_a_query_cover_prompt_and_completion(special_tokens: Any):
    tokenizer = tiny_tokenizer(special_tokens)
    query = Query(query_id="q", prompt="Zürich lies in", completion="Switzerland")
    example = tokenize_query(query, tokenizer, window_tokens=60)
    found = pieces(example, tokenizer)
    assert found[0] == ("Z" if special_tokens == "plain" else "")
    assert "".join(p for p, target in zip(found, example.target_mask, strict=True) if target) == " Switzerland"
    short = tokenize_query(query, tokenizer, window_tokens=12)  # the prompt loses its beginning
    assert len(short.token_ids) == 12
    assert short.text != example.text
    assert "".join(pieces(short, tokenizer)) == short.text


LETTERS = st.text("abé日本🦜 \n.\ufffdT<s>", max_size=40)


@pytest.mark.parametrize("special_tokens", ["plain", "bos", "bos_eos"])
@hypothesis.given(text=LETTERS, window_tokens=st.integers(5, 20), overlap=st.integers(1, 2))
@hypothesis.settings(max_examples=100)
def test_spans_of_windows_are_those_of_the_whole_text(special_tokens: Any, text: str, window_tokens: int, overlap: int):
    tokenizer = tiny_tokenizer(special_tokens)
    example = Example(example_id="e", text=text, record=0)
    windows = tokenize_example(example, tokenizer, window_tokens=window_tokens, overlap=overlap)
    document = tokenizer.backend_tokenizer.encode(text)
    before = 0 if special_tokens == "plain" else 1
    offsets = document.offsets[before:]
    for number, window in enumerate(windows):
        spans = token_spans(window, tokenizer)
        assert_spans_in_order(spans, window)
        assert all(span == TextSpan(start=0, stop=0) for span in spans[:before])
        first = number * (window_tokens - before - overlap)
        expected = offsets[first : first + len(spans) - before]
        shift = expected[0][0]
        for span, (start, stop) in zip(spans[before:], expected, strict=True):
            if stop > start:
                assert (span.start, span.stop) == (start - shift, stop - shift)
            else:
                assert span.start == span.stop


@hypothesis.given(
    text=LETTERS,
    token_ids=st.lists(st.integers(0, 320), min_size=1, max_size=20),
    special_tokens=st.sampled_from(["plain", "bos", "bos_eos"]),
)
def test_spans_of_any_tokens_beside_any_text_stay_in_order(text: str, token_ids: list[int], special_tokens: Any):
    ids = np.array(token_ids, dtype=np.int32)
    example = TokenizedExample(
        example_id="e", parent_id="e", record=0, window=0, text=text, token_ids=ids, target_mask=np.arange(len(ids)) > 0
    )
    assert_spans_in_order(token_spans(example, tiny_tokenizer(special_tokens)), example)


@functools.cache
def space_letter_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 1's: a letter for the space, also put before the text, and byte tokens for unknown letters."""
    letters = ["<unk>", "<s>", "▁", "a", "b", "c", "▁a", "▁b", "ab", "▁ab"]
    vocabulary = {token: place for place, token in enumerate([*letters, *(f"<0x{byte:02X}>" for byte in range(256))])}
    merges = [("▁", "a"), ("▁", "b"), ("a", "b"), ("▁a", "b")]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


def test_a_tokenizer_with_space_letters_and_byte_fallback_gives_spans_of_texts_and_windows():
    tokenizer = space_letter_tokenizer()
    text = "ab c 日a b ab c日 a"
    assert pieces(whole(text, tokenizer), tokenizer) == [
        "", "ab", " ", "c", " ", "日", "日", "日", "a", " b", " ab", " ", "c", "日", "日", "日", " a",
    ]  # fmt: skip
    example = Example(example_id="e", text=text, record=0)
    windows = tokenize_example(example, tokenizer, window_tokens=6, overlap=1)
    # The second window begins with the second byte of a letter.
    assert [pieces(window, tokenizer) for window in windows[:3]] == [
        ["", "ab", " ", "c", " ", "日"],
        ["", "日", "日", "日", "a", " b"],
        ["", " b", " ab", " ", "c", "日"],
    ]
