"""Take the pictures of the explorer that the documentation shows, from what `make demo` leaves.

python docs/screenshots.py demo-out [--embedding-model FOLDER]
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

IMAGES = Path(__file__).resolve().parent / "images"


def main() -> None:
    """Start the explorer over the demo's index and results, and take every picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("demo")
    parser.add_argument("--embedding-model")
    options = parser.parse_args()
    demo = Path(options.demo)
    command = [sys.executable, "-c", "from trackstar.cli import main; main()", "explore", "--no-browser"]
    command += [str(demo / "index"), str(demo / "results.jsonl"), "--task", str(demo / "queries.jsonl")]
    command += ["--embedding-model", options.embedding_model] if options.embedding_model else []
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        address = next(line for line in server.stderr if line.startswith("explorer:")).split()[1]
        IMAGES.mkdir(exist_ok=True)
        with sync_playwright() as playwright:
            chromium = playwright.chromium.launch(
                executable_path=shutil.which("chromium"),
                args=["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"],
            )
            for scheme in ("light", "dark"):
                page = chromium.new_page(viewport={"width": 1440, "height": 900}, color_scheme=scheme)
                page.goto(f"{address}#tab=results")
                expect(page.get_by_role("article").first).to_be_visible()
                page.screenshot(path=IMAGES / f"results-{scheme}.png")
                ask(page, address)
                page.screenshot(path=IMAGES / f"ask-{scheme}.png")
                page.get_by_text("Insight", exact=True).click()
                expect(page.get_by_role("region", name="Groups")).to_be_visible()
                page.get_by_role("heading", name="Distribution of influence").scroll_into_view_if_needed()
                page.locator(".answer > details").last.screenshot(path=IMAGES / f"insight-{scheme}.png")
    finally:
        server.terminate()
        server.wait()


def ask(page: Page, address: str) -> None:
    """Ask for a language, split two candidates over their tokens and measure them."""
    page.goto(f"{address}#tab=ask")
    page.get_by_label("Prompt").fill("The official language of Japan is")
    page.get_by_label("Completion").fill("Japanese")
    page.get_by_label("Number of candidates").fill("5")
    page.get_by_role("button", name="Attribute").click()
    answer = page.get_by_role("region", name="Answer", exact=True)
    expect(answer).to_be_visible(timeout=60_000)
    candidates = answer.get_by_role("region", name="TrackStar", exact=True).get_by_role("article")
    for place in (0, 1):
        candidates.nth(place).get_by_role("button", name="Tokens", exact=True).click()
        expect(candidates.nth(place).get_by_role("listbox")).to_be_visible()
        candidates.nth(place).get_by_role("button", name="Measure").click()
        expect(candidates.nth(place)).to_contain_text("→")
    page.mouse.move(0, 0)
    page.evaluate("document.querySelector('.answer').scrollIntoView()")


if __name__ == "__main__":
    main()
