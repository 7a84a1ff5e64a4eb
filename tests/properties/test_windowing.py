"""Windows of long examples, and the targets of training examples and queries."""

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiny_models import SENTENCES, SpecialTokens, tiny_tokenizer
from trackstar.corpus import (
    Example,
    Query,
    TokenizedExample,
    prompt_tokens,
    query_text,
    tokenize_example,
    tokenize_examples,
    tokenize_query,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS: tuple[SpecialTokens, ...] = ("plain", "bos", "bos_eos")
BOS, EOS = 0, 1

texts = st.one_of(
    st.lists(st.sampled_from(SENTENCES), max_size=6).map(" ".join),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=80),
)


def _example(text: str) -> Example:
    return Example(example_id="e", text=text, record=3)


def _whole(tokenizer: "PreTrainedTokenizerFast", text: str) -> list[int]:
    """Token ids of a training text by the tokenizer's default call."""
    return tokenizer(text, verbose=False)["input_ids"]  # pyright: ignore[reportReturnType]


def _unwindowed(windows: list[TokenizedExample], prefix: int, overlap: int) -> list[int]:
    """The text's token ids, joined from its windows without the repeated tokens."""
    parts = [window.token_ids[prefix + overlap if window.window else 0 :] for window in windows]
    return np.concatenate(parts).tolist()


@given(text=texts, special=st.sampled_from(SPECIAL_TOKENS), window_tokens=st.integers(8, 40), overlap=st.integers(1, 4))
def test_every_token_with_a_predecessor_is_a_target_exactly_once(
    text: str, special: SpecialTokens, window_tokens: int, overlap: int
) -> None:
    tokenizer = tiny_tokenizer(special)
    whole = _whole(tokenizer, text)
    windows = tokenize_example(_example(text), tokenizer, window_tokens=window_tokens, overlap=overlap)
    targets = [token for window in windows for token in window.token_ids[window.target_mask].tolist()]
    assert targets == (whole[1:] if text else [])
    if windows:
        assert _unwindowed(windows, prefix=special != "plain", overlap=overlap) == whole


@given(text=texts, special=st.sampled_from(SPECIAL_TOKENS), window_tokens=st.integers(8, 40), overlap=st.integers(1, 4))
def test_windows_keep_to_their_length_and_to_the_tokenizers_special_tokens(
    text: str, special: SpecialTokens, window_tokens: int, overlap: int
) -> None:
    tokenizer = tiny_tokenizer(special)
    windows = tokenize_example(_example(text), tokenizer, window_tokens=window_tokens, overlap=overlap)
    for place, window in enumerate(windows):
        last = place == len(windows) - 1
        assert window.window == place
        assert window.example_id == (f"e#{place}" if place else "e")
        assert (window.parent_id, window.record) == ("e", 3)
        assert len(window.token_ids) == window_tokens or (last and len(window.token_ids) < window_tokens)
        assert window.token_ids.dtype == np.int32
        assert not window.target_mask[0]
        assert window.target_mask.any()
        assert window.token_ids.tolist().count(BOS) == (special != "plain")
        assert window.token_ids.tolist().count(EOS) == (special == "bos_eos" and last)
        assert (window.token_ids[0] == BOS) == (special != "plain")


@given(text=texts, special=st.sampled_from(SPECIAL_TOKENS))
def test_text_that_fits_one_window_is_tokenized_as_by_default(text: str, special: SpecialTokens) -> None:
    tokenizer = tiny_tokenizer(special)
    whole = _whole(tokenizer, text)
    tokens = max(len(whole), 8)
    windows = tokenize_example(_example(text), tokenizer, window_tokens=tokens)
    if not text or len(whole) < 2:
        assert windows == []
        return
    (window,) = windows
    assert window.token_ids.tolist() == whole
    assert window.text == text
    assert window.target_mask.tolist() == [False] + [True] * (len(whole) - 1)
    if len(whole) > 8:
        assert len(tokenize_example(_example(text), tokenizer, window_tokens=tokens - 1)) == 2


@given(
    text=st.lists(st.sampled_from(SENTENCES), min_size=2, max_size=6).map(" ".join), window_tokens=st.integers(8, 40)
)
def test_texts_of_windows_cover_the_whole_text_and_contain_their_tokens(text: str, window_tokens: int) -> None:
    tokenizer = tiny_tokenizer("bos_eos")
    windows = tokenize_example(_example(text), tokenizer, window_tokens=window_tokens, overlap=2)
    assert text.startswith(windows[0].text)
    assert text.endswith(windows[-1].text)
    reached = 0
    for window in windows:
        at = text.rfind(window.text, 0, reached + len(window.text))
        assert 0 <= at <= reached, "a part of the text is in no window's text"
        reached = max(reached, at + len(window.text))
        text_tokens = window.token_ids[1 : -1 if window.window == len(windows) - 1 else None]
        assert str(tokenizer.decode(text_tokens)).strip("� ") in window.text
    assert reached == len(text)


@given(documents=st.lists(texts, max_size=12), window_tokens=st.integers(8, 40))
def test_tokens_do_not_depend_on_how_examples_are_tokenized_together(documents: list[str], window_tokens: int) -> None:
    tokenizer = tiny_tokenizer("bos")
    examples = [Example(example_id=f"e{n}", text=text, record=n) for n, text in enumerate(documents)]
    together = list(tokenize_examples(examples, tokenizer, window_tokens=window_tokens))
    singly = [tokenize_example(example, tokenizer, window_tokens=window_tokens) for example in examples]
    assert _plain(together) == _plain(singly)


def test_examples_beyond_one_batch_keep_their_order() -> None:
    examples = [Example(example_id=f"e{n}", text=f"number {n}", record=n) for n in range(600)]
    windows = list(tokenize_examples(examples, tiny_tokenizer("bos"), window_tokens=32))
    assert [window.example_id for (window,) in windows] == [example.example_id for example in examples]


@pytest.mark.parametrize(("special", "text"), [("plain", "a"), ("plain", ""), ("bos", ""), ("bos_eos", "")])
def test_example_without_a_token_to_predict_has_no_window(special: SpecialTokens, text: str) -> None:
    assert tokenize_example(_example(text), tiny_tokenizer(special), window_tokens=8) == []


def test_tokenizer_set_to_truncate_and_pad_neither_truncates_nor_pads() -> None:
    tokenizer = tiny_tokenizer.__wrapped__("bos")
    text = " ".join(SENTENCES)
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.backend_tokenizer.enable_padding(length=900)
    (window,) = tokenize_example(_example(text), tokenizer, window_tokens=800)
    assert window.token_ids.tolist() == _whole(tiny_tokenizer("bos"), text)


def test_special_tokens_spelled_out_in_a_text_are_tokenized_as_the_tokenizer_is_set() -> None:
    tokenizer = tiny_tokenizer.__wrapped__("bos")
    for split in (False, True):
        tokenizer.split_special_tokens = split
        (window,) = tokenize_example(_example("one</s>two"), tokenizer, window_tokens=64)
        assert window.token_ids.tolist() == _whole(tokenizer, "one</s>two")
        assert (EOS in window.token_ids) == (not split)


words = st.text("abcdefgh ßé漢🙂\n", max_size=12)


@given(prompt=words, completion=words.filter(str.strip), special=st.sampled_from(["bos", "bos_eos"]))
def test_targets_of_a_query_are_the_tokens_with_a_character_of_the_completion(
    prompt: str, completion: str, special: SpecialTokens
) -> None:
    tokenizer = tiny_tokenizer(special)
    query = Query(query_id="q", prompt=prompt, completion=completion)
    tokenized = tokenize_query(query, tokenizer, window_tokens=128)
    text = query_text(query)
    whole = _whole(tokenizer, text)
    assert tokenized.token_ids.tolist() == (whole[:-1] if special == "bos_eos" else whole)
    assert tokenized.text == text
    # This tokenizer trims no white space from its offsets, so they cover all characters of a token.
    spans = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    expected = [stop > len(prompt) for _, stop in spans[: len(tokenized.token_ids)]]  # pyright: ignore[reportGeneralTypeIssues]
    assert tokenized.target_mask.tolist() == expected


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_query_targets_do_not_depend_on_how_the_tokenizer_trims_white_space(trim_offsets: bool) -> None:
    from tokenizers import processors

    tokenizer = tiny_tokenizer.__wrapped__("bos")
    template = tokenizer.backend_tokenizer.post_processor
    byte_level = processors.ByteLevel(trim_offsets=trim_offsets)
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([byte_level, template])
    for prompt, completion, target in [
        ("The capital is", "Paris", " Paris"),
        ("The capital is ", "Paris", " Paris"),
        ("The capital is", " Paris", " Paris"),
        ("The capital is\n", "Paris", "Paris"),
        ("The capital is", "12", " 12"),
        ("The capital is", "  Paris", "  Paris"),
    ]:
        query = Query(query_id="q", prompt=prompt, completion=completion)
        tokenized = tokenize_query(query, tokenizer, window_tokens=64)
        assert tokenizer.decode(tokenized.token_ids[tokenized.target_mask]) == target


@pytest.mark.parametrize("prompt", ["", "The capital is"])
@pytest.mark.parametrize("special", SPECIAL_TOKENS)
def test_prompt_tokens_are_the_beginning_of_the_same_training_text(prompt: str, special: SpecialTokens) -> None:
    tokenizer = tiny_tokenizer(special)
    longer = _whole(tokenizer, f"{prompt}\n")
    prefix = prompt_tokens(prompt, tokenizer)
    assert prefix == longer[: len(prefix)]
    assert tokenizer.decode(prefix, skip_special_tokens=True) == prompt
    assert prefix.count(BOS) == (special != "plain")
    assert EOS not in prefix


def test_prompt_and_completion_are_joined_by_one_space_if_there_is_none() -> None:
    def joined(prompt: str, completion: str) -> str:
        return query_text(Query(query_id="q", prompt=prompt, completion=completion))

    assert joined("The capital is", "Paris") == "The capital is Paris"
    assert joined("The capital is ", "Paris") == "The capital is Paris"
    assert joined("The capital is", " Paris") == "The capital is Paris"
    assert joined("The capital is:\n", "Paris") == "The capital is:\nParis"
    assert joined("", "Paris") == "Paris"


@given(repeats=st.integers(1, 8), window_tokens=st.integers(12, 40), special=st.sampled_from(SPECIAL_TOKENS))
def test_query_too_long_for_its_window_loses_the_beginning_of_its_prompt_only(
    repeats: int, window_tokens: int, special: SpecialTokens
) -> None:
    tokenizer = tiny_tokenizer(special)
    query = Query(query_id="q", prompt=" ".join([SENTENCES[1]] * repeats), completion="Berlin")
    full = tokenize_query(query, tokenizer, window_tokens=10_000)
    cut = tokenize_query(query, tokenizer, window_tokens=window_tokens)
    prefix = int(special != "plain")
    assert len(cut.token_ids) == min(len(full.token_ids), window_tokens)
    assert cut.token_ids[:prefix].tolist() == full.token_ids[:prefix].tolist()
    length = len(cut.token_ids) - prefix
    assert cut.token_ids[prefix:].tolist() == full.token_ids[-length:].tolist()
    assert cut.target_mask[prefix:].tolist() == full.target_mask[-length:].tolist()
    assert cut.target_mask.sum() == full.target_mask.sum()
    assert full.text.endswith(cut.text)
    assert tokenizer.decode(cut.token_ids[prefix:]) == cut.text


def _plain(windows: list[list[TokenizedExample]]) -> list[Any]:
    """Windows as values that compare by content."""
    return [
        [(w.example_id, w.record, w.window, w.text, w.token_ids.tolist(), w.target_mask.tolist()) for w in each]
        for each in windows
    ]
