"""``duet-vlm models``: which model families are supported."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from duet_vlm.api.catalogue import chosen, rows
from duet_vlm.cli.errors import friendly
from duet_vlm.cli.options import AsJson, Debug


def cell(value: Any) -> str:
    """A value of the support matrix as a table shows it."""
    if isinstance(value, bool):
        return "yes" if value else "-"
    return ", ".join(value) if isinstance(value, list) else str(value)


def models(
    names: Annotated[list[str] | None, typer.Argument(metavar="[FAMILY]...", help="Only these families.")] = None,
    json_: AsJson = False,
    debug: Debug = False,
) -> None:
    """List the supported model families: what they take, and what to know about each."""
    with friendly(debug, json_):
        named, everyone = chosen("models", "family", names), rows("models")
        if json_:
            print(json.dumps(named))
            return
        same = [key for key in everyone[0] if all(row[key] is True for row in everyone)]  # said once, below
        columns = [key for key in everyone[0] if key not in {*same, "notes", "example"}]
        table = Table(*(key.replace("_", " ") for key in columns), box=SIMPLE, pad_edge=False)
        for row in named:
            table.add_row(*(cell(row[key]) for key in columns))
        console = Console(highlight=False)
        console.print(table)
        for row in named:
            console.print(f"[bold]{row['family']}[/bold] (such as {row['example']}): {row['notes']}", soft_wrap=True)
        print(f"\nevery family: {', '.join(same)}")
        print(
            "'tiny', the default of --model, is a small llava that ships with the package; duet-vlm-lab has a small llava_next"
        )
        print("('tiny-page') and small video_llavas ('tiny-video', 'tiny-long')")
