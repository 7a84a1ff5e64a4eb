"""Hostile texts are shown as text: no script runs, no markup appears, no character reverses the page."""

import re

from playwright.sync_api import BrowserContext, Page, expect

from release_file import HOSTILE, LONG

ELEMENTS = (
    "script:not([src^='/assets/']), iframe, img, object, embed, form[action], meta[http-equiv], a[href^='javascript']"
)


def test_a_hostile_result_file_is_shown_as_text(page: Page, hostile_address: str):
    elsewhere: list[str] = []
    page.on("request", lambda r: None if r.url.startswith((hostile_address, "data:")) else elsewhere.append(r.url))
    page.goto(f"{hostile_address}/#tab=results")
    query = page.get_by_role("region", name="Chosen query")
    expect(query).to_contain_text(HOSTILE[0])
    expect(query).to_contain_text("<img src=x onerror=")
    expect(query).to_contain_text("U+202E")
    expect(query).to_contain_text("U+001B")
    expect(query).to_contain_text("U+0000")
    assert page.locator(ELEMENTS).count() == 0
    shown = page.evaluate("document.body.innerText")
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x1b\x00]", shown)
    page.wait_for_timeout(500)
    assert page.evaluate("window.pwned") == 0
    assert "pwned" not in page.title()
    assert elsewhere == []


def test_a_line_of_a_million_characters_is_shown_in_parts(page: Page, hostile_address: str):
    page.goto(f"{hostile_address}/#tab=results")
    long = page.get_by_role("article").filter(has=page.get_by_text(re.compile("^x{50}"))).first
    expect(long).to_be_visible()
    width = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert width <= 0, "the page scrolls sideways"
    long.get_by_role("button", name=re.compile(f"Show all {len(LONG):,} characters")).click()
    long.get_by_role("button", name=re.compile("Show more")).click()
    expect(long.get_by_role("button", name=re.compile(r"880,000 characters left"))).to_be_visible()


def test_the_raw_record_and_highlights_hold_no_markup(page: Page, hostile_address: str):
    page.goto(f"{hostile_address}/#tab=results&hl=%3Cscript%3E&hl=.*")
    page.get_by_role("button", name="Raw record").click()
    expect(page.get_by_role("dialog")).to_contain_text("window.pwned = 1")
    assert page.locator(ELEMENTS).count() == 0


def test_a_hostile_index_is_shown_as_text(page: Page, hostile_address: str):
    page.goto(f"{hostile_address}/#tab=ask")
    page.get_by_label("Prompt").fill("<img src=x onerror=window.pwned=1>")
    page.get_by_label("Completion").fill("<script>window.pwned=1</script>")
    page.get_by_role("button", name="Attribute").click()
    answer = page.get_by_role("region", name="Answer", exact=True)
    expect(answer).to_contain_text("<img src=x onerror=window.pwned=1>")
    ours = answer.get_by_role("region", name="TrackStar", exact=True)
    for button in ours.get_by_role("button", name="Tokens").all()[:4]:
        button.click()
    expect(answer.get_by_role("listbox").nth(3)).to_be_visible()
    answer.get_by_text("Insight", exact=True).click()
    expect(page.get_by_role("heading", name="Distribution of influence")).to_be_visible()
    assert page.locator(ELEMENTS).count() == 0
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x1b]", page.evaluate("document.body.innerText"))


def test_a_page_of_another_origin_gets_nothing(context: BrowserContext, live_address: str):
    page = context.new_page()
    page.route("http://evil.example/", lambda route: route.fulfill(body="<h1>another</h1>", content_type="text/html"))
    page.goto("http://evil.example/")
    for method in ("GET", "POST"):
        outcome = page.evaluate(
            """async ([address, method]) => {
                const options = {method, headers: method === 'POST' ? {'X-Trackstar': '1'} : {}};
                return fetch(address + '/api/session', options).then(answer => answer.status, () => 'refused');
            }""",
            [live_address, method],
        )
        assert outcome == "refused"
