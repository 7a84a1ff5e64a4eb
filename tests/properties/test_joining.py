"""Join prompt and completion: a space only where writing has one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trackstar.corpus import Query, query_text, separator
from trackstar.corpus.joining import joined, needs_space

# Prompt | completion, by whether a space belongs between them.
SPACE = """
    The capital of France is|Paris
    Question: where is it? Answer:|Paris
    Is it true?|Yes
    He paused...|then
    The end.|Next
    half of 50%|of them
    It costs|$5
    It costs|5
    Room|42
    iPhone|15
    x =|5
    2 + 2 =|4
    x|= 5
    a|&& b
    R &|D
    5 €|per kilo
    1, 2, 3,|4
    issue|#5
    is|**Paris**
    e.g.|apples
    The U.S.|is
    return|a + b
    I feel 😀|happy
    Congrats|🎉
    I ❤️|Paris
    thumbs 👍🏽|up
    프랑스의 수도는|파리
    عاصمة فرنسا هي|باريس
    هل؟|نعم
    בירת צרפת היא|פריז
    फ्रांस की राजधानी|पेरिस
    वह गया।|फिर
    Столица Франции|Париж
    Η πρωτεύουσα είναι|το Παρίσι
    Thủ đô là|Paris
    የፈረንሳይ ዋና ከተማ|ፓሪስ
    საფრანგეთის დედაქალაქია|პარიზი
    Dijo:|¿Qué?
    Paris –|the capital
    ‏עברית‏|מילה
"""
NONE = """
    法国的首都是|巴黎
    法国的首都是|Paris
    The capital is|巴黎
    答案：|Paris
    他说「|好
    第3|章
    太好了|🎉
    日本の首都は|東京
    フランスの首都は|パリ
    ประเทศ|ไทย
    ປະເທດ|ລາວ
    ភាសា|ខ្មែរ
    မြန်|မာ
    མི་|བོད
    The answer is (|A)
    print(|x)
    values|[0]
    f|(x)
    He said "|Hello"
    He said|"Hello"
    “|Paris”
    «|Paris
    Paris|»
    don|'t
    it’|s
    well-|known
    well|-known
    is|-5
    Paris–|Berlin
    obj.|method()
    std::|vector
    ptr->|field
    x=|5
    2+2=|4
    snake_|case
    snake|_case
    path/|name
    https:|//x.org
    user@|x.org
    3.|14
    1,|000
    12:|30
    The end|.
    Hello|, world
    half of 50|%
    It costs $|5
    12|€
    20|°C
    2|**3
    **|bold**
    🎉|🎉
    Great 🎉|🎉
    🇫|🇷
    👨‍|👩
    e|́
    zero​|width
    C|#
"""


def pairs(table: str) -> list[tuple[str, str]]:
    return [
        (prompt, completion)
        for line in table.split("\n")
        if line
        for prompt, _, completion in [line.lstrip(" ").partition("|")]
        if completion
    ]


@pytest.mark.parametrize(("prompt", "completion"), pairs(SPACE))
def test_a_space_is_added_between_words_and_numbers(prompt: str, completion: str) -> None:
    assert joined(prompt, completion) == f"{prompt} {completion}"


@pytest.mark.parametrize(("prompt", "completion"), pairs(NONE))
def test_no_space_is_added_where_writing_has_none(prompt: str, completion: str) -> None:
    assert joined(prompt, completion) == prompt + completion


def test_parts_of_a_word_are_joined_only_on_request() -> None:
    assert joined("The official language of Japan is Jap", "anese", "none").endswith("Japanese")
    assert joined("The official language of Japan is Jap", "anese").endswith("Jap anese")


texts = st.one_of(st.text(max_size=6), st.sampled_from(["the", "法", "(", "-", '"', "5", " x", "y\n", "🎉", ""]))


@given(prompt=texts, completion=texts)
def test_every_rule_adds_one_space_or_nothing(prompt: str, completion: str) -> None:
    nothing, space = prompt + completion, f"{prompt} {completion}"
    assert joined(prompt, completion, "none") == nothing
    assert joined(prompt, completion) in (nothing, joined(prompt, completion, "space"))
    apart = not prompt or not completion or prompt[-1].isspace() or completion[0].isspace()
    assert joined(prompt, completion, "space") == (nothing if apart else space)
    if apart:
        assert not needs_space(prompt, completion)
    for join in ("auto", "space", "none"):
        query = Query(query_id="q", prompt=prompt, completion=completion, join=join)
        assert prompt + separator(query) + completion == query_text(query)


@given(text=st.text(min_size=1, max_size=8))
def test_unicode_is_never_normalized(text: str) -> None:
    decomposed = "e\u0301" + text
    assert joined(decomposed, text).startswith(decomposed)
    assert joined(text, decomposed).endswith(decomposed)
