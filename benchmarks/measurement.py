"""What every benchmark shares: the machine's and the code's description, and the JSON that figures are kept in."""

import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "safetensors")


def environment() -> dict[str, object]:
    """Commit, hardware and versions, as they go into every result."""
    changed = _git("status", "--porcelain", "--", "src", "benchmarks/*.py")
    return {
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(changed),
        "hardware": {
            "cpu": _cpu_model(),
            "cores": os.cpu_count(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def save(name: str, figures: dict[str, object], *, folder: Path = RESULTS, shown: bool = True) -> Path:
    """Write `NAME.json` into a folder, and print it if it is to be shown."""
    folder.mkdir(exist_ok=True, parents=True)
    path = folder / f"{name}.json"
    text = json.dumps(environment() | figures, indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
    if shown:
        print(text)
    return path


def _git(*arguments: str) -> str:
    result = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    return result.stdout.strip()


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()
