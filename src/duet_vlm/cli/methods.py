"""``duet-vlm methods``: what can be attached."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

import duet_vlm
from duet_vlm.cli.errors import friendly
from duet_vlm.cli.options import AsJson, Debug
from duet_vlm.reducer import DecoderReducer, EncoderReducer, Reducer


def describe(name: str, cls: type[Reducer]) -> dict[str, Any]:
    """A method as plain values."""
    places = (("before the decoder", EncoderReducer), ("inside the decoder", DecoderReducer))
    stages = [word for word, base in places if issubclass(cls, base)]
    return {
        "name": name,
        "summary": cls.summary,
        "stage": " + ".join(stages) or "-",
        "needs_text": issubclass(cls, DecoderReducer) and cls.uses_text,
        "paper": cls.paper,
        "settings": [field.name for field in fields(cls)],
    }


def methods(json_: AsJson = False, debug: Debug = False) -> None:
    """List the methods: paper, what they do, where they reduce, whether they look at the text."""
    with friendly(debug, json_):
        rows = [describe(name, cls) for name, cls in duet_vlm.methods().items()]
        if json_:
            print(json.dumps(rows))
            return
        table = Table("name", "reduces", "text", "what it does, and paper", box=SIMPLE, pad_edge=False)
        table.columns[0].no_wrap = True
        for row in rows:
            stage, asks = row["stage"].replace(" the decoder", ""), "yes" if row["needs_text"] else "no"
            table.add_row(row["name"], stage, asks, f"{row['summary']}\n[dim]{row['paper']}[/dim]")
        Console().print(table)
        print("reduces: before or inside the decoder; text: whether the question decides what stays")
