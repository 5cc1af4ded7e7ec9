"""A table of docs/choose.md: how often the choice of a search holds."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from folders import STUDIES

from duet_vlm.evaluation.report.markdown import table


def held() -> str:
    head = [
        "task",
        "at least kept",
        "searches",
        "choose",
        "choices that hold",
        "kept on fresh questions",
        "chosen",
        "commit",
    ]
    return table(head, [_line(json.loads(file.read_text())) for file in sorted(STUDIES.glob("tune-*.json"))])


def _line(found: dict[str, Any]) -> list[str]:
    rows = [row for row in found["repetitions"] if row["chosen"]]
    kept = [row["fresh"]["kept"] for row in rows]
    often = {name: sum(row["chosen"] == name for row in rows) for name in sorted({row["chosen"] for row in rows})}
    named = ", ".join(f"{count} x `{name}`" for name, count in sorted(often.items(), key=lambda item: -item[1]))
    cells = [
        f"`{found['task']}`",
        f"{found['keep']:.0%}",
        str(len(found["repetitions"])),
        str(len(rows)),
        f"{found['hold']} of {len(rows)}",
    ]
    return [*cells, f"{min(kept):.1%} to {max(kept):.1%}" if kept else "-", named, found["environment"]["commit"]]


BLOCKS: dict[str, Callable[[], str]] = {"tune": held}
