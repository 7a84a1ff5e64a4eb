"""Live questions in the browser: ask, generate, cancel, split over tokens, measure, and the overview."""

import re
import time
from collections.abc import Callable

import pytest
from playwright.sync_api import BrowserContext, Page, expect

from trackstar.errors import GradientError
from trackstar.explorer.live import LiveIndex
from trackstar.progress import Progress


def opened(page: Page, address: str, state: str = "") -> Page:
    page.goto(f"{address}/{state}")
    expect(page.get_by_role("main", name="Ask")).to_be_visible()
    return page


def ask(page: Page, prompt: str = "The capital of France is", completion: str = "Paris") -> None:
    page.get_by_label("Prompt").fill(prompt)
    page.get_by_label("Completion").fill(completion)
    page.get_by_role("button", name="Attribute").click()
    expect(answer(page)).to_contain_text(f"P({completion}) =")


def answer(page: Page):
    return page.get_by_role("region", name="Answer", exact=True)


def first(page: Page, method: str = "TrackStar"):
    return answer(page).get_by_role("region", name=method, exact=True).get_by_role("article").first


def test_a_question_is_answered_by_every_method_side_by_side(page: Page, live_address: str):
    opened(page, live_address)
    ask(page)
    expect(answer(page)).to_contain_text("λ = 0")
    expect(first(page, "BM25")).to_contain_text("The capital of France is Paris.")
    expect(first(page)).to_be_visible()
    answer(page).get_by_role("button", name="Opponents").click()
    expect(answer(page).get_by_text("This method has no opponents.")).to_be_visible()
    expect(first(page)).to_contain_text("−0.")


def test_the_latest_input_is_attributed(page: Page, live_address: str):
    opened(page, live_address)
    page.get_by_label("Prompt").fill("The capital of Italy is")
    page.get_by_label("Completion").press_sequentially("Rome")
    page.get_by_label("Completion").press("Control+Enter")
    expect(answer(page)).to_contain_text("P(Rome) =")
    page.get_by_label("Completion").press_sequentially(" or Lima")
    page.get_by_label("Completion").press("Control+Enter")
    expect(answer(page)).to_contain_text("P(Rome or Lima) =")
    page.get_by_label("Prompt").fill("Trains to")
    expect(answer(page)).to_contain_text("This answers an earlier question")


def test_a_completion_of_white_space_cannot_be_attributed(page: Page, live_address: str):
    opened(page, live_address)
    page.get_by_label("Prompt").fill("x")
    page.get_by_label("Completion").fill("   ")
    expect(page).to_have_url(re.compile("completion="))
    expect(page.get_by_role("button", name="Attribute")).to_be_disabled()


def test_methods_can_be_deselected(page: Page, live_address: str):
    opened(page, live_address)
    page.get_by_role("group", name="Methods").get_by_label("BM25").uncheck()
    ask(page)
    expect(answer(page).get_by_role("region", name="BM25", exact=True)).to_have_count(0)


def test_the_clicked_part_of_the_models_answer_is_attributed(page: Page, live_address: str):
    opened(page, live_address)
    page.get_by_label("Prompt").fill("The capital of Peru is")
    page.get_by_role("button", name="Let the model answer").click()
    tokens = page.get_by_role("group", name="Tokens of the answer").get_by_role("button")
    expect(tokens.first).to_be_visible()
    texts = [(token.get_attribute("aria-label") or "").rsplit(", probability", 1)[0] for token in tokens.all()[:2]]
    tokens.nth(1).click()
    expect(page.get_by_label("Completion")).not_to_have_value("")
    prompt, completion = (page.get_by_label(name).input_value() for name in ("Prompt", "Completion"))
    assert prompt.startswith("The capital of Peru is")
    assert f"{prompt}{completion}".split() == f"The capital of Peru is{''.join(texts)}".split()
    page.get_by_role("button", name="Attribute").click()
    expect(answer(page)).to_contain_text("P(")


def test_an_influence_is_split_over_the_tokens_of_candidate_and_query(page: Page, live_address: str):
    opened(page, live_address)
    ask(page)
    score = float(first(page).locator(".score").get_attribute("title").removeprefix("Score "))  # pyright: ignore[reportOptionalMemberAccess]
    first(page).get_by_role("button", name="Tokens").click()
    heat = first(page).get_by_role("listbox")
    expect(heat).to_be_visible()
    labels = [option.get_attribute("aria-label") or "" for option in heat.get_by_role("option").all()]
    parts = [float(re.sub(r" \(\d+ tokens\)$", "", label).split()[-1].replace("−", "-")) for label in labels]
    assert sum(parts) == pytest.approx(score, abs=0.002 + 0.00006 * len(parts))
    assert "".join(re.findall("“(.*)”", "\n".join(labels)))
    first(page).get_by_role("button", name="Over the query").click()
    expect(first(page)).to_contain_text("query's tokens sum to")
    expect(first(page).get_by_role("listbox")).to_contain_text("Paris")
    heat = first(page).get_by_role("listbox")
    heat.focus()
    page.keyboard.press("ArrowRight")
    expect(heat.locator(".t.at")).to_have_count(1)


def test_an_effect_is_measured(page: Page, live_address: str):
    opened(page, live_address)
    ask(page)
    first(page).get_by_role("button", name="Measure").click()
    expect(first(page)).to_contain_text(re.compile(r"P\(Paris\): .*% → .*% \(.*\)"))


def test_the_overview_shows_all_candidates(page: Page, live_address: str):
    opened(page, live_address)
    ask(page)
    answer(page).get_by_text("Insight", exact=True).click()
    expect(page.get_by_role("heading", name="Distribution of influence")).to_be_visible()
    expect(page.get_by_role("heading", name="Influence and lexical overlap")).to_be_visible()
    page.get_by_label("Group by").select_option("year")
    groups = page.get_by_role("region", name="Groups")
    for year in ("1990", "1991", "1992", "1993"):
        expect(groups).to_contain_text(year)
    page.get_by_label("Group method").select_option("BM25")
    expect(page).to_have_url(re.compile("by=BM25"))
    expect(page.get_by_text("Show as table").first).to_be_visible()


def test_a_link_shows_an_answer_in_memory_and_starts_no_job(page: Page, context: BrowserContext, live_address: str):
    opened(page, live_address)
    ask(page, "The capital of Cuba is", "Havana")
    first(page).get_by_role("button", name="Tokens", exact=True).click()
    first(page).get_by_role("button", name="Over the query").click()
    expect(first(page)).to_contain_text("query's tokens sum to")
    first(page).get_by_role("button", name="Measure").click()
    expect(first(page)).to_contain_text("→")
    other = context.new_page()
    other.goto(page.url)
    expect(answer(other)).to_contain_text("P(Havana) =")
    expect(first(other)).to_contain_text("query's tokens sum to")
    expect(first(other)).to_contain_text("→")
    started: list[str] = []
    third = context.new_page()
    third.on("request", lambda request: started.append(request.url) if request.method == "POST" else None)
    third.goto(f"{live_address}/#tab=ask&prompt=Trains%20to&completion=Lima&key={'0' * 32}")
    expect(third.get_by_label("Prompt")).to_have_value("Trains to")
    expect(third.get_by_label("Completion")).to_have_value("Lima")
    third.wait_for_timeout(500)
    assert started == []
    expect(answer(third)).to_have_count(0)


def test_long_work_shows_progress_and_is_cancelled(page: Page, live_address: str, monkeypatch: pytest.MonkeyPatch):
    def slow(_self: LiveIndex, _request: object) -> None:
        with Progress("Scan", unit="examples", total=10_000, shown=False) as bar:
            for _ in range(10_000):
                time.sleep(0.01)
                bar.advance(1)

    monkeypatch.setattr(LiveIndex, "answer", slow)
    opened(page, live_address)
    page.get_by_label("Prompt").fill("x")
    page.get_by_label("Completion").fill("y")
    page.get_by_role("button", name="Attribute").click()
    expect(page.get_by_role("progressbar", name="Progress")).to_be_visible()
    expect(page.get_by_text(re.compile(r"\d+ / 10,000 examples"))).to_be_visible()
    expect(page.get_by_text(re.compile("left$"))).to_be_visible()
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_role("progressbar", name="Progress")).to_be_hidden()
    expect(page.get_by_role("button", name="Attribute")).to_be_enabled()


def test_an_error_is_shown_with_its_message(page: Page, live_address: str, monkeypatch: pytest.MonkeyPatch):
    def broken(_self: LiveIndex, _request: object) -> None:
        raise GradientError("query query: its projected gradient is zero, expected one that is not")

    monkeypatch.setattr(LiveIndex, "answer", broken)
    opened(page, live_address)
    page.get_by_label("Prompt").fill("x")
    page.get_by_label("Completion").fill("y")
    page.get_by_role("button", name="Attribute").click()
    expect(page.get_by_role("alert")).to_contain_text("its projected gradient is zero")


def test_an_answer_is_exported(page: Page, live_address: str):
    opened(page, live_address)
    ask(page)
    answer(page).get_by_role("button", name=re.compile("^Export")).click()
    with page.expect_download() as download:
        page.get_by_role("link", name="JSONL", exact=True).click()
    assert '"inputs_plaintext": "The capital of France is"' in download.value.path().read_text("utf-8")


def test_terms_are_defined_with_their_formula_in_a_popover(page: Page, live_address: str):
    opened(page, live_address)
    ask(page)
    for label, formula in (("influence, from", "cosine of the corrected gradients"), ("Task weight", "R = λ R_eval")):
        term = answer(page).get_by_role("button", name=label)
        term.click()
        expect(answer(page).get_by_role("note")).to_contain_text(formula)
        page.keyboard.press("Escape")
        expect(answer(page).get_by_role("note")).to_have_count(0)
        expect(term).to_be_focused()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessible(page: Page, live_address: str, axe: Callable[[Page], list[str]], scheme):
    page.emulate_media(color_scheme=scheme)
    opened(page, live_address)
    ask(page)
    first(page).get_by_role("button", name="Tokens").click()
    expect(first(page).get_by_role("listbox")).to_be_visible()
    first(page).get_by_role("button", name="Measure").click()
    expect(first(page)).to_contain_text("→")
    answer(page).get_by_text("Insight", exact=True).click()
    expect(page.get_by_role("heading", name="Distribution of influence")).to_be_visible()
    assert axe(page) == []
