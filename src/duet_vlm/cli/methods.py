"""``duet-vlm methods``: what can be attached."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from duet_vlm.api.catalogue import chosen
from duet_vlm.cli.errors import friendly
from duet_vlm.cli.options import AsJson, Debug


def methods(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Only these, with their settings.")
    ] = None,
    json_: AsJson = False,
    debug: Debug = False,
) -> None:
    """List the methods: paper, what they do, where they reduce, whether they look at the text. Of methods by name also
    idea, cost, needs, settings, and the families that cannot run them."""
    with friendly(debug, json_):
        rows = chosen("methods", "name", names, whole=bool(names) or json_)
        if json_:
            print(json.dumps(rows))
            return
        table = Table("name", "reduces", "text", "what it does, and paper", box=SIMPLE, pad_edge=False)
        table.columns[0].no_wrap = True
        for row in rows:
            stage, asks = row["stage"].replace(" the decoder", ""), "yes" if row["needs_text"] else "no"
            told = f"{row['summary']}\n[dim]{row['paper']}[/dim]" + ("\n" + "\n".join(_more(row)) if names else "")
            table.add_row(row["name"], stage, asks, told)
        Console().print(table)
        print("reduces: inside the tower, before or inside the decoder; text: whether the question decides what stays")


def _more(row: dict[str, Any]) -> list[str]:
    """Details of a method that was named."""
    told = [escape(row["idea"]), escape(row["cost"]), f"needs: {', '.join(row['needs']) or 'nothing of the model'}"]
    told += [f"settings: {', '.join(name for name in row['settings'] if name != 'options') or 'none'}"]
    told += [f"options: {', '.join(row['options'])}"]
    for case in row["families_without"]:
        way = f"{case['preset']} " if case["preset"] else ""
        told.append(escape(f"{way}not on {', '.join(case['families'])}: {case['why']}"))
    return list(filter(None, told))
