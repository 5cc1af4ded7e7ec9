"""``duet-vlm models``: which model families are supported."""

from __future__ import annotations

import json
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from duet_vlm.cli.errors import friendly
from duet_vlm.cli.options import AsJson, Debug
from duet_vlm.models.adapter import families


def models(json_: AsJson = False, debug: Debug = False) -> None:
    """List the supported model families."""
    with friendly(debug, json_):
        rows: list[dict[str, Any]] = [
            {"family": name, "model_types": list(cls.model_types), "notes": cls.notes, "example": cls.example}
            for name, cls in families().items()
        ]
        if json_:
            print(json.dumps(rows))
            return
        table = Table("family", "model types", "notes", "example", box=SIMPLE, pad_edge=False)
        for column in table.columns:
            column.overflow = "fold"
        for row in rows:
            table.add_row(row["family"], ", ".join(row["model_types"]), row["notes"], row["example"])
        Console().print(table)
        print("'tiny', the default of --model, is a small llava that ships with the package")
