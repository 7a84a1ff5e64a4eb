"""Result files in the browser: search, filter, compare, highlight, link and export, at the release's size."""

import csv
import json
import re
from collections.abc import Callable

import pytest
from playwright.sync_api import BrowserContext, Page, expect

QUERIES = 5415


def opened(page: Page, address: str, state: str = "") -> Page:
    page.goto(f"{address}/{state}")
    expect(page.get_by_role("navigation", name="Queries").get_by_text("trex-").or_(chosen(page))).to_be_visible()
    return page


def chosen(page: Page):
    return page.get_by_role("region", name="Chosen query")


def found(page: Page):
    return page.get_by_role("navigation", name="Queries").get_by_role("status").first


def test_the_first_view_has_all_queries_metrics_and_the_first_querys_candidates(page: Page, release_address: str):
    opened(page, release_address)
    expect(found(page)).to_contain_text("5,415")
    expect(chosen(page).get_by_role("heading", level=1)).to_be_visible()
    for name in ("MRR", "recall@10", "precision@10", "entailing@10", "model accuracy"):
        expect(page.get_by_text(name, exact=True).first).to_be_visible()
    expect(page.get_by_role("article", name=re.compile("^Rank 1: ")).first).to_be_visible()
    expect(page.get_by_role("region", name="Run ours.jsonl")).to_be_visible()
    expect(page.get_by_role("region", name="Run baseline.jsonl")).to_be_visible()


def test_search_filters_and_sorting_narrow_the_list_and_the_metrics(page: Page, release_address: str):
    opened(page, release_address)
    page.get_by_role("searchbox", name="Search queries").or_(page.get_by_label("Search queries")).fill("capital of")
    expect(found(page)).to_contain_text(re.compile(r"^\d{3} of 5,415"))
    expect(page.get_by_text(re.compile(r"over \d{3} (of|matching|queries)"))).to_be_visible()
    page.get_by_label("Model", exact=True).select_option("yes")
    expect(page).to_have_url(re.compile("model=yes"))
    first = found(page).inner_text()
    page.get_by_label("Proponents", exact=True).select_option("no")
    expect(found(page)).not_to_have_text(first)
    page.get_by_label("Sort by").select_option("score")
    page.get_by_role("button", name="Descending").click()
    expect(page).to_have_url(re.compile("sort=score.*desc=1|desc=1.*sort=score"))
    expect(chosen(page)).to_contain_text("✓ correct")


def test_relations_are_chosen_from_a_list_with_counts(page: Page, release_address: str):
    opened(page, release_address)
    page.get_by_role("button", name=re.compile("^Relation")).click()
    page.get_by_role("group", name="Relation values").get_by_label(re.compile("instrument")).check()
    expect(page).to_have_url(re.compile("relation=instrument"))
    expect(found(page)).to_contain_text(re.compile(r"\d{3} of 5,415"))
    expect(chosen(page)).to_contain_text("plays the")


def test_search_covers_candidates_on_request(page: Page, release_address: str):
    opened(page, release_address, "#at=0.0")
    word = chosen(page).get_by_role("article").first.locator(".candidate-text").inner_text().split(".")[0][:40]
    page.get_by_label("Search queries").fill(word)
    expect(found(page)).to_contain_text(re.compile("^0 of|No quer"))
    page.get_by_label("In candidates' texts too").check()
    expect(found(page)).to_contain_text(re.compile(r"^1 of"))


def test_pages_and_keys_move_through_the_list(page: Page, release_address: str):
    opened(page, release_address)
    heading = chosen(page).get_by_role("heading", level=1)
    first = heading.inner_text()
    page.keyboard.press("j")
    expect(heading).not_to_have_text(first)
    page.keyboard.press("k")
    expect(heading).to_have_text(first)
    page.get_by_role("button", name="Next page").click()
    expect(page.get_by_label("Page number")).to_have_value("2")
    page.keyboard.press("[")
    expect(page.get_by_label("Page number")).to_have_value("1")
    page.keyboard.press("/")
    expect(page.get_by_label("Search queries")).to_be_focused()
    page.keyboard.type("j")  # typing is not a key
    expect(page.get_by_label("Search queries")).to_have_value("j")
    page.keyboard.press("Escape")
    page.locator("h1").first.click()
    page.keyboard.press("?")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()


def test_two_runs_are_side_by_side_with_the_number_of_shared_candidates(page: Page, release_address: str):
    opened(page, release_address)
    expect(chosen(page).get_by_text(re.compile(r"\d+ of \d+ shared"))).to_be_visible()
    page.get_by_role("button", name=re.compile("^Only ")).click()
    expect(page.get_by_role("region", name="Run baseline.jsonl")).to_be_hidden()
    page.keyboard.press("c")
    expect(page.get_by_role("region", name="Run baseline.jsonl")).to_be_visible()


def test_a_query_that_a_run_lacks_is_reported(page: Page, release_address: str):
    opened(page, release_address, f"#at={QUERIES - 1}.-")
    expect(page.get_by_text("Not in this run")).to_be_visible()


def test_entities_and_highlights_are_marked(page: Page, release_address: str):
    opened(page, release_address)
    expect(chosen(page).locator("mark.subject, .subject").first).to_be_visible()
    page.get_by_label("Highlight", exact=True).fill("the")
    page.get_by_label("Highlight", exact=True).press("Enter")
    expect(page.get_by_role("button", name="Remove highlight the")).to_be_visible()
    expect(chosen(page).locator(".candidate-text .highlighted").first).to_be_visible()
    page.get_by_role("button", name="Remove highlight the").click()
    expect(chosen(page).locator(".candidate-text .highlighted")).to_have_count(0)


def test_selected_words_can_be_highlighted(page: Page, release_address: str):
    opened(page, release_address)
    chosen(page).locator(".candidate-text .subject").first.dblclick()  # selects a word
    page.get_by_role("button", name="Highlight everywhere").click()
    expect(page.get_by_role("button", name=re.compile("^Remove highlight "))).to_be_visible()


def test_the_raw_record_is_the_line_in_the_file(page: Page, release_address: str):
    opened(page, release_address)
    page.get_by_role("button", name="Raw record").click()
    record = json.loads(page.get_by_role("dialog").locator("pre").inner_text())
    assert record["example_id"] == "trex-00000"
    assert len(record["proponents"]) == 10


def test_a_link_restores_the_whole_view(page: Page, context: BrowserContext, release_address: str):
    opened(page, release_address)
    page.get_by_label("Search queries").fill("capital")
    page.get_by_label("Sort by").select_option("score")
    page.get_by_label("Highlight", exact=True).fill("river")
    page.get_by_label("Highlight", exact=True).press("Enter")
    expect(found(page)).to_contain_text(re.compile(r"^\d{3} of"))
    page.keyboard.press("Escape")
    page.locator("h1").first.click()
    page.keyboard.press("j")
    page.keyboard.press("j")
    heading = chosen(page).get_by_role("heading", level=1)
    expect(page).to_have_url(re.compile("at="))
    page.wait_for_timeout(300)
    text = heading.inner_text()
    other = context.new_page()
    other.goto(page.url)
    expect(chosen(other).get_by_role("heading", level=1)).to_have_text(text)
    expect(other.get_by_label("Search queries")).to_have_value("capital")
    expect(other.get_by_label("Sort by")).to_have_value("score")
    expect(other.get_by_role("button", name="Remove highlight river")).to_be_visible()
    page.go_back()
    expect(heading).not_to_have_text(text)


@pytest.mark.parametrize(
    "state", ["#tab=javascript:1&at=<script>&run=99&sort=x&min=1e999&page=-3&hl=%00", "#%E0%A4%A", "#" + "x" * 9000]
)
def test_invalid_links_show_the_first_query(page: Page, release_address: str, state: str):
    opened(page, release_address, state)
    expect(found(page)).to_contain_text("5,415")
    expect(chosen(page).get_by_role("heading", level=1)).to_be_visible()


def test_a_page_beyond_the_last_becomes_the_last(page: Page, release_address: str):
    opened(page, release_address, "#page=9999")
    expect(page.get_by_label("Page number")).to_have_value("109")
    expect(chosen(page).get_by_role("heading", level=1)).to_be_visible()


def test_matching_queries_are_exported(page: Page, release_address: str):
    opened(page, release_address, "#q=capital&model=yes&right=no")
    matching = int(re.findall(r"^(\d+) of", found(page).inner_text())[0])
    lines = {}
    for name in ("CSV", "JSONL", "HTML"):
        page.get_by_role("navigation", name="Queries").get_by_role("button", name=re.compile("^Export")).click()
        with page.expect_download() as download:
            page.get_by_role("link", name=name, exact=True).click()
        lines[name] = download.value.path().read_text("utf-8")
    assert len(lines["JSONL"].splitlines()) == matching
    assert len({row["query_id"] for row in csv.DictReader(lines["CSV"].splitlines())}) == matching
    assert lines["HTML"].count("<h2") == matching


def test_an_exported_page_opens_by_itself(page: Page, context: BrowserContext, release_address: str, tmp_path):
    opened(page, release_address)
    chosen(page).get_by_role("button", name=re.compile("^Export")).click()
    with page.expect_download() as download:
        page.get_by_role("link", name="HTML", exact=True).click()
    path = tmp_path / "query.html"
    download.value.save_as(path)
    alone = context.new_page()
    alone.goto(path.as_uri())
    expect(alone.get_by_role("heading", level=1)).to_contain_text("trackstar")
    assert alone.evaluate("document.scripts.length") == 0
    assert alone.locator("td.t").first.evaluate("e => getComputedStyle(e).whiteSpace") == "pre-wrap"


def shown_facts(page: Page) -> dict[str, str]:
    """What the chosen query's head says, by its labels."""
    rows = chosen(page).locator(".facts > div")
    expect(rows.first).to_be_visible()
    return {row.locator("dt").inner_text(): row.locator("dd").inner_text() for row in rows.all()}


def open_question(page: Page, address: str, number: int) -> dict[str, str]:
    """Open a line of the file with each kind of question, by itself."""
    page.goto("about:blank")
    page.goto(f"{address}/#at={number}.{number}&alone=1")
    expect(chosen(page).get_by_text(f"kind-{number}", exact=True)).to_be_visible()
    return shown_facts(page)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_head_says_the_kind_the_models_answer_and_the_true_one_where_the_file_has_them(
    page: Page, kinds_address: str, axe: Callable[[Page], list[str]], scheme
):
    page.emulate_media(color_scheme=scheme)
    fact = open_question(page, kinds_address, 0)
    assert fact["kind"] == "Fact"
    assert fact["the model's answer"].split() == ["Monbri", "✓", "correct"]
    assert fact["confidence"] == "75%: 3 of 4 sampled answers are right"
    assert fact["corpus"] == "a sentence states the fact"
    assert not {"the true answer", "rather than"} & set(fact)
    chosen(page).get_by_text("4 sampled answers", exact=True).click()
    expect(chosen(page).get_by_role("list", name="Sampled answers").get_by_role("listitem")).to_have_count(4)
    assert axe(page) == []
    choice = open_question(page, kinds_address, 1)
    assert choice["kind"] == "Choice"
    assert choice["rather than"].split(" or ") == ["freeze its lid.", "paint its lid."]
    assert choice["the model's answer"].split() == ["freeze", "its", "lid.", "✗", "incorrect"]
    assert not {"confidence", "samples", "corpus", "relation"} & set(choice)
    generation = open_question(page, kinds_address, 2)
    assert generation["kind"] == "Generation"
    assert generation["the true answer"] == "42"
    assert generation["confidence"] == "100%"  # not said to be right: the completion is not the true answer
    story = open_question(page, kinds_address, 3)
    assert story["kind"] == "Open: no right answer"
    assert not {"✓", "✗"} & set(story["the model's answer"])
    chosen(page).locator(".facts summary").first.click()
    expect(chosen(page).get_by_role("group", name="Whole text")).to_contain_text("nobody knew why.")
    assert axe(page) == []


def test_kinds_are_a_facet_where_a_file_has_several(page: Page, kinds_address: str, release_address: str):
    opened_kinds = page.goto(f"{kinds_address}/")
    assert opened_kinds is not None
    expect(found(page)).to_have_text("4 queries")
    page.get_by_role("button", name=re.compile("^Kind")).click()
    values = page.get_by_role("group", name="Kind values")
    expect(values.get_by_role("checkbox")).to_have_count(4)
    values.get_by_label(re.compile("^Choice")).check()
    values.get_by_label(re.compile("^Generation")).check()
    expect(found(page)).to_have_text("2 of 4 queries")
    expect(page).to_have_url(re.compile("kind=choice&kind=generation"))
    page.get_by_label("Model", exact=True).select_option("yes")
    expect(found(page)).to_have_text("0 of 4 queries")
    page.get_by_role("button", name="Clear filters").click()
    expect(found(page)).to_have_text("4 queries")
    opened(page, release_address)
    expect(page.get_by_role("button", name=re.compile("^Relation"))).to_be_visible()
    expect(page.get_by_role("button", name=re.compile("^Kind"))).to_have_count(0)


def test_each_column_shows_its_own_completion_where_a_wrong_answer_is_beside_the_truth(
    page: Page, kinds_address: str, axe: Callable[[Page], list[str]]
):
    page.goto(f"{kinds_address}/#at=0.0")
    right, wrong = (page.get_by_role("region", name=f"Run {name}.jsonl") for name in ("right", "wrong"))
    expect(right.locator(".explained")).to_have_text("explains Monbri")
    expect(wrong.locator(".explained")).to_have_text("explains Elgor ✗ not the true answer which is Monbri")
    assert axe(page) == []
    page.goto(f"{kinds_address}/#at=1.1")
    expect(chosen(page).get_by_text("kind-1", exact=True)).to_be_visible()
    expect(chosen(page).locator(".explained")).to_have_count(0)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessible(page: Page, release_address: str, axe: Callable[[Page], list[str]], scheme):
    page.emulate_media(color_scheme=scheme)
    opened(page, release_address)
    page.get_by_label("Highlight", exact=True).fill("river")
    page.get_by_label("Highlight", exact=True).press("Enter")
    assert axe(page) == []
    page.get_by_role("button", name="Keyboard help").click()
    assert axe(page) == []


def test_the_theme_is_remembered(page: Page, release_address: str):
    opened(page, release_address)
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.get_by_label("Theme").select_option("dark")
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert dark != before
    page.reload()
    expect(page.get_by_label("Theme")).to_have_value("dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == dark
