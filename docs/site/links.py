"""Links of the repository's pages, as the site has them: pages lead to pages, other files are carried along."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BROUGHT = {  # pages that lie outside of docs/ -> where the site has them
    "README.md": "overview.md",
    "PAPERS.md": "papers.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "benchmarks/README.md": "benchmarks.md",
    "lab/NOTEBOOK.md": "notebook.md",
    "benchmarks/gpu/README.md": "benchmarks-gpu.md",
    "lab/comparison/tiny-chain/README.md": "comparison-tiny-chain.md",
    "lab/comparison/checkpoints/README.md": "comparison-checkpoints.md",
    "lab/comparison/training/README.md": "comparison-training.md",
    "tests/golden/README.md": "recordings.md",
    "plugins/vllm/README.md": "vllm.md",
}
FILES = "files"  # folder of the site with the files that pages link to
LINK = re.compile(r"(\]\()([^)\s]+)(\))")
FENCE = re.compile(r"^\s*(```|~~~)")


def source_of(uri: str) -> str:
    """Where in the repository a page of the site comes from."""
    return next((path for path, page in BROUGHT.items() if page == uri), f"docs/{uri}")


def target(path: str) -> str:
    """Where on the site a file of the repository is: a page, a picture beside the pages, or a file that is carried
    along."""
    if path in BROUGHT:
        return BROUGHT[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else f"{FILES}/{path}"


def rewrite(text: str, uri: str) -> tuple[str, set[str]]:
    """The page with its links as the site has them, and the files of the repository that it needs beside it.

    A link to a folder becomes its words: a site has no listing of folders. Links within the site's own generated pages,
    and links that lead nowhere, stay as they are (mkdocs then names the latter).
    """
    source, carried = source_of(uri), set[str]()

    def one(found: re.Match[str]) -> str:
        link, _, anchor = found[2].partition("#")
        if not link or re.match(r"[a-z]+:", link):
            return found[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
        if not (ROOT / path).is_file():
            return found[0]
        place = target(path)
        if place.startswith(f"{FILES}/"):
            carried.add(path)
        relative = posixpath.relpath(place, posixpath.dirname(uri) or ".")
        return f"{found[1]}{relative}{'#' + anchor if anchor else ''}{found[3]}"

    return outside_code(text, lambda line: LINK.sub(one, line)), carried


def outside_code(text: str, change: Callable[[str], str]) -> str:
    """The text with every line changed that is not in a fenced block."""
    out, inside = [], False
    for line in text.splitlines():
        fence = FENCE.match(line)
        inside ^= bool(fence)
        out.append(line if inside or fence else change(line))
    return "\n".join(out) + "\n"
