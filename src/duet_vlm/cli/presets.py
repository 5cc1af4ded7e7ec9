"""``duet-vlm presets``: settings of papers and of their released code, by name."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from duet_vlm.api.catalogue import chosen
from duet_vlm.cli.errors import friendly
from duet_vlm.cli.options import AsJson, Debug
from duet_vlm.utils.field_types import flattened


def presets(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Only these, with their settings.")
    ] = None,
    json_: AsJson = False,
    debug: Debug = False,
) -> None:
    """List the presets for --preset: method, the model that the settings are for, tokens, and who published them."""
    with friendly(debug, json_):
        rows = chosen("presets", "name", names, whole=bool(names) or json_)
        if json_:
            print(json.dumps(rows))
            return
        table = Table("name", "method", "for", "tokens", "where the settings are from", box=SIMPLE, pad_edge=False)
        table.columns[0].no_wrap = True
        for row in rows:
            told = row["source"]
            if names:
                told += (
                    f"\nsettings: {', '.join(f'{key}={value}' for key, value in flattened(row['settings']).items())}"
                )
            table.add_row(row["name"], row["method"], row["model"], f"{row['mean']:g} of {row['tokens']}", told)
        Console(highlight=False).print(table)
        print(
            "tokens: mean visual tokens per decoder layer, of an image (a frame) there; 'duet-vlm run --preset NAME' uses one"
        )
