"""Run the microscope, and write its numbers, figures, page and notebook."""

import dataclasses
import io
from pathlib import Path

from trackstar.errors import OptionError
from trackstar.microscope.figures import FIGURES
from trackstar.microscope.images import digits, read_images
from trackstar.microscope.page import notebook, page
from trackstar.microscope.study import Settings, Study, run_study, steps
from trackstar.progress import Progress
from trackstar.store.files.durable import make_folder
from trackstar.store.files.outputs import inputs, refuse_input_folder, replace_bytes

FILES = ("microscope.md", "microscope.ipynb", "microscope.json", *(f"{name}.png" for name in FIGURES))
"""The files that a run writes."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MicroscopeRun:
    """A study and where its files are."""

    study: Study
    files: dict[str, Path]


def run_microscope(
    out: str | Path,
    data: str | Path | None = None,
    *,
    settings: Settings | None = None,
    force: bool = False,
    progress: bool = True,
) -> MicroscopeRun:
    """Take Eq. 2 apart on small networks, and write page, notebook, numbers and figures.

    Args:
        out: Folder of the files.
        data: An .npz file of images, as `read_images` reads it; None is scikit-learn's digits.
        settings: How the networks are made; None is the default.
        force: Whether files of an earlier run may be replaced.
        progress: Whether progress is shown.

    Raises:
        CorpusError: The images cannot be read.
        OptionError: There are too few images, or `out` has the files of an earlier run.
    """
    settings = settings or Settings()
    folder = Path(out)
    refuse_input_folder(folder, inputs(data=data))
    existing = next((folder / name for name in FILES if (folder / name).exists()), None)
    if existing is not None and not force:
        raise OptionError(f"`out`: {existing} exists; pass `force=True` to replace it, or choose another folder")
    images = digits() if data is None else read_images(Path(data))
    source = "scikit-learn's digits" if data is None else Path(data).name
    with Progress("Microscope", unit="networks", total=steps(settings), shown=progress) as bar:
        study = run_study(images, source, settings, advance=bar.advance)
    drawn = {name: _png(draw(study)) for name, draw in FIGURES.items()}
    contents = {
        "microscope.md": page(study).encode(),
        "microscope.ipynb": notebook(study, None if data is None else str(data), drawn).encode(),
        "microscope.json": study.to_json().encode(),
        **{f"{name}.png": png for name, png in drawn.items()},
    }
    make_folder(folder)
    for name, content in contents.items():
        replace_bytes(folder / name, content)
    return MicroscopeRun(study=study, files={name: folder / name for name in contents})


def _png(figure: object) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)  # pyright: ignore[reportAttributeAccessIssue]
    return content.getvalue()
