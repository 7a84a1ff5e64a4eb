"""Publish a finished report: tables, figures and numbers, with commit and hardware, but no text of the corpus.

    python benchmarks/fact_tracing/publish.py REPORT NAME

copies report.md, report.json, tables/ and figures/ of the folder that `trackstar evaluate --out REPORT` wrote to
benchmarks/results/NAME/, beside the settings that it was made with.
"""

import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from measurement import RESULTS, environment


def publish(report: Path, name: str) -> Path:
    """Copy what may be published of a report's folder."""
    out = RESULTS / name
    if out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True)
    found = json.loads((report / "report.json").read_text(encoding="utf-8"))
    text = json.dumps(environment() | found, indent=1, ensure_ascii=False)
    (out / "report.json").write_text(text + "\n", encoding="utf-8")
    shutil.copy(report / "report.md", out)
    for folder in ("tables", "figures"):
        shutil.copytree(report / folder, out / folder)
    return out


if __name__ == "__main__":
    print(publish(Path(sys.argv[1]), sys.argv[2]))
