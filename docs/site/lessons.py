"""Notebooks (percent format) as pages of the site."""

from __future__ import annotations

import re

from links import ROOT

FOLDER = ROOT / "docs" / "notebooks"


def page(source: str) -> str:
    """A notebook as Markdown: text cells as they are, code cells fenced."""
    out = []
    for kind, body in re.findall(r"^# %%( \[markdown\])?\n(.*?)(?=^# %%|\Z)", source, flags=re.M | re.S):
        body = body.strip("\n")
        out.append(re.sub(r"^# ?", "", body, flags=re.M) if kind else f"```python\n{body}\n```")
    return "\n\n".join(out) + "\n"


def pages() -> dict[str, str]:
    """Address on the site -> text."""
    return {
        f"notebooks/{path.stem.replace('_', '-')}.md": page(path.read_text()) for path in sorted(FOLDER.glob("*.py"))
    }
