"""Results in a notebook: whole, and whatever the texts hold, shown as text."""

import html.parser

import hypothesis
import torch
from hypothesis import strategies as st

from release_file import HOSTILE
from trackstar.attribution.attributor import TokenInfluence
from trackstar.attribution.results import QueryReport, QueryResult, Ranked
from trackstar.corpus import Query
from trackstar.corpus.token_spans import TextSpan
from trackstar.curvature.mixing import Mixing

ALLOWED = {"p", "b", "table", "thead", "tr", "th", "td", "code", "div", "span", "details", "summary", "br"}


class Reader(html.parser.HTMLParser):
    """Tags, attributes and text of what a browser would be given."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


def result(text: str) -> QueryResult:
    ranked = Ranked(row=0, example_id=text, parent_id=text, influence=0.25, text=text)
    return QueryResult(
        query=Query(query_id=text, prompt=text, completion=text), loss=1.0, proponents=(ranked,), opponents=(ranked,)
    )


@hypothesis.given(text=st.sampled_from(HOSTILE) | st.text(max_size=60))
def test_no_text_becomes_markup(text: str):
    one = result(text)
    report = QueryReport(
        results=(one,) * 11, mixing=Mixing(value=0.0, rule=text), damping=0.1, damping_rule=text, candidates=1,
        codec="float16", reranked=0, recomputed=0, index=text, model=text, coverage=text, second_moment=text,
    )  # fmt: skip
    spans = tuple(TextSpan(start=place, stop=place + 1) for place in range(len(text)))
    split = TokenInfluence(text=text, spans=spans, parts=torch.ones(len(text)), influence=1.0)
    for shown in (one, report, split):
        read = Reader(shown._repr_html_())
        assert read.tags <= ALLOWED
        assert read.attributes <= {"style", "dir", "title"}
        assert not any(sign in read.text for sign in "\x1b\u202e\u200b\0")


def test_a_result_shows_prompt_probability_influence_and_text():
    read = Reader(result("The <b>capital</b>")._repr_html_())
    for part in ("The <b>capital</b>", "P = 36.79%", "+0.2500", "proponent", "opponent"):
        assert part in read.text


def test_pieces_are_the_text_and_their_parts_the_influence():
    text = "né à Paris!"
    spans = [(0, 0), (0, 1), (1, 2), (1, 2), (2, 4), (4, 10)]
    parts = torch.tensor([0.5, 1.0, 2.0, -4.0, 0.0, 1.0])
    split = TokenInfluence(
        text=text, spans=tuple(TextSpan(start=a, stop=b) for a, b in spans), parts=parts, influence=0.5
    )
    assert split.pieces == [("", 0.5), ("n", 1.0), ("é", -2.0), (" à", 0.0), (" Paris", 1.0), ("!", 0.0)]
    assert sum(part for _, part in split.pieces) == float(parts.sum())
    assert Reader(split._repr_html_()).text.endswith(text)
