"""``duet-vlm models``: which model families are supported."""

from __future__ import annotations

import json
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from duet_vlm.cli.errors import friendly
from duet_vlm.cli.options import AsJson, Debug
from duet_vlm.models.find import support


def cell(value: Any) -> str:
    """A value of the support matrix as a table shows it."""
    if isinstance(value, bool):
        return "yes" if value else "-"
    return ", ".join(value) if isinstance(value, list) else str(value)


def models(json_: AsJson = False, debug: Debug = False) -> None:
    """List the supported model families: what they take, and what to know about each."""
    with friendly(debug, json_):
        rows = support()
        if json_:
            print(json.dumps(rows))
            return
        same = {key for key in rows[0] if key != "family" and all(row[key] is True for row in rows)}  # said once, below
        columns = [key for key in rows[0] if key not in {*same, "notes", "example"}]
        table = Table(*(key.replace("_", " ") for key in columns), box=SIMPLE, pad_edge=False)
        for row in rows:
            table.add_row(*(cell(row[key]) for key in columns))
        console = Console(highlight=False)
        console.print(table)
        for row in rows:
            console.print(f"[bold]{row['family']}[/bold] (such as {row['example']}): {row['notes']}", soft_wrap=True)
        print(f"\nevery family: {', '.join(key for key in rows[0] if key in same)}")
        print("'tiny', the default of --model, is a small llava that ships with the package, 'tiny-video' a small video_llava")
