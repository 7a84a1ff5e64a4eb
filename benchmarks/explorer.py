"""Speed of the explorer in a real browser over a result file of the release's size: first view, filter, page, query.

python benchmarks/explorer.py [--repeat N]

The first view is from opening the address until queries, metrics and the first query's candidates are shown;
filter, page and query from the key or click until the list or the candidates have changed. The server runs
beside the browser on the same machine. The baseline of each is a request for a static file of the same
server, which is what any page costs.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from measurement import save

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from release_file import write_release_file  # pyright: ignore[reportMissingImports]  # the tests' own, found above

ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=15)
    repeat = parser.parse_args().repeat
    with tempfile.TemporaryDirectory() as folder:
        files = [write_release_file(Path(folder) / f"{name}.jsonl", candidates=n) for name, n in (("a", 10), ("b", 8))]
        began = time.perf_counter()
        server = subprocess.Popen(
            [
                sys.executable,
                "-c",
                "from trackstar.cli import main; main()",
                "explore",
                *map(str, files),
                "--no-browser",
            ],
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert server.stderr is not None
            address = server.stderr.readline().split()[1]
            start = time.perf_counter() - began
            found = measured(address, repeat)
        finally:
            server.terminate()
            server.wait()
    result: dict[str, object] = {
        "queries": 5415,
        "files": 2,
        "repeats": repeat,
        "server_start_seconds": round(start, 2),
    }
    result["milliseconds"] = found
    print(found)
    save("explorer-cpu", result)


def measured(address: str, repeat: int) -> dict[str, dict[str, float]]:
    """Median and worst milliseconds of each step."""
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    times: dict[str, list[float]] = {}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        for _ in range(repeat):
            context = browser.new_context(viewport={"width": 1440, "height": 900})
            page = context.new_page()
            for name, milliseconds in steps(page, address).items():
                times.setdefault(name, []).append(milliseconds)
            context.close()
        browser.close()
    return {n: {"median": statistics.median(t), "worst": max(t)} for n, t in times.items()}


def steps(page: Page, address: str) -> dict[str, float]:
    """Each step's milliseconds in one fresh browser context."""
    found: dict[str, float] = {}

    def timed(name: str, act: str, selector: str) -> None:
        # Act and watch inside the page, frame by frame, so that no message between processes is counted.
        found[name] = page.evaluate(
            """async ([act, selector]) => {
                const text = () => document.querySelector(selector)?.innerText;
                const before = text(), began = performance.now();
                new Function(act)();
                while (text() === before) await new Promise(requestAnimationFrame);
                return performance.now() - began;
            }""",
            [act, selector],
        )
        page.wait_for_timeout(400)

    began = time.perf_counter()
    page.goto(f"{address}assets/none", wait_until="load")
    found["a static request (baseline)"] = 1000 * (time.perf_counter() - began)
    began = time.perf_counter()
    page.goto(address, wait_until="commit")
    page.wait_for_function(
        "() => document.querySelector('article .candidate-text') && document.body.innerText.includes('MRR')",
        polling="raf",
    )
    found["first view"] = 1000 * (time.perf_counter() - began)
    page.wait_for_timeout(300)
    queries, candidates = "nav[aria-label=Queries] ol, nav[aria-label=Queries] ul", "article .candidate-text"
    click = "document.querySelector('[aria-label=\"%s\"]').click()"
    timed("next page, its list", click % "Next page", queries)
    timed("next page, its first passages", click % "Next page", candidates)
    timed("next query", "dispatchEvent(new KeyboardEvent('keydown', {key: 'j', bubbles: true}))", candidates)
    select = "const s = document.querySelector('select[aria-label=\"%s\"]'); s.value = '%s'; "
    select += "s.dispatchEvent(new Event('change', {bubbles: true}))"
    timed("filter, its list and metrics", select % ("Model", "yes"), queries)
    timed("sort, its list", select % ("Sort by", "score"), queries)
    typed = "const s = document.querySelector('#search-queries'); s.value = 'plays'; "
    typed += "s.dispatchEvent(new Event('input', {bubbles: true}))"
    timed("search, 80 ms of waiting for the next letter included", typed, queries)
    return found


if __name__ == "__main__":
    main()
