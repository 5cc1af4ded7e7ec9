"""Files of a report from result files."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from duet_vlm.evaluation.report import markdown
from duet_vlm.evaluation.report.check import check
from duet_vlm.evaluation.report.page import page
from duet_vlm.evaluation.report.plots import all_plots
from duet_vlm.evaluation.results import load

PAGE = "report.html"


def render(paths: Sequence[Path], say: Callable[[str], None] = lambda text: None) -> dict[str, bytes]:
    """file name -> content of a report of these result files. ``say`` is called with the next plot's name.

    Raises
    ------
    ValueError
        A file is missing, damaged, incomplete or of another version; the message names it.
    ImportError
        Without matplotlib.
    """
    if not paths:
        raise ValueError("name at least one result file, as duet-vlm eval writes them")
    results = []
    for path in paths:
        result = load(path)
        check(result, str(path))
        results.append(result)
    again = shlex.join(["duet-vlm", "report", *map(_shown, paths)])
    out: dict[str, bytes] = {}
    sections = []
    for slug, path, result in zip(_slugs([f"{r['task']}-{r['name']}" for r in results]), paths, results, strict=True):
        plots = all_plots(result, partial(_told, say, slug))
        for name, (_, png, svg) in plots.items():
            out |= {f"{slug}-{name}.png": png, f"{slug}-{name}.svg": svg}
        pictures = [(caption, f"{slug}-{name}.png") for name, (caption, _, _) in plots.items()]
        out[f"{slug}.md"] = markdown.page(result, pictures, again).encode()
        sections.append((slug, _shown(path), result, plots))
    return out | {PAGE: page(sections, again).encode()}


def _told(say: Callable[[str], None], slug: str, caption: str) -> None:
    say(f"{slug}: {caption}")


def write(paths: Sequence[Path], folder: Path, say: Callable[[str], None] = lambda text: None) -> list[Path]:
    """Render everything, and only then write it into ``folder``; the files written, the page last."""
    made = render(paths, say)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in made.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in made]


def _shown(path: Path) -> str:
    """A path as it may be published: relative ones as given, of others the name only."""
    return path.name if path.is_absolute() else path.as_posix()


def _slugs(names: Sequence[str]) -> list[str]:
    """Names as short, unique file names of lower-case letters, digits and hyphens."""
    out: list[str] = []
    for name in names:
        stem = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:60] or "result"
        slug, number = stem, 2
        while slug in out:
            slug, number = f"{stem}-{number}", number + 1
        out.append(slug)
    return out
