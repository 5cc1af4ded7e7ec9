"""Options that several verbs share, and how their text becomes values."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Annotated, Any

import typer

Model = Annotated[str, typer.Option("--model", "-m", help="'tiny' (ships with the package), a local folder, or a hub id.")]
Images = Annotated[list[Path], typer.Option("--image", "-i", help="Image file; repeat it for several.")]
Prompt = Annotated[str, typer.Option("--prompt", "-p", help="The question; images go in front of it.")]
Method = Annotated[str, typer.Option("--method", help="Name of a method, see 'duet-vlm methods'.")]
BudgetText = Annotated[
    str | None,
    typer.Option("--budget", "-b", help="Mean visual tokens per decoder layer and image (64), or that as a fraction (0.22 or 22%)."),
]
Positions = Annotated[str | None, typer.Option("--positions", help="'keep' (default) or 'compact'.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A setting of the method, e.g. --set 'schedule=((16, .5), (24, 0.0))'."),
]
Device = Annotated[str | None, typer.Option("--device", help="Where to run; default: cuda if there is one, else cpu.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def budget_of(text: str | None) -> int | float | None:
    """``64`` is a token count, ``0.22`` and ``22%`` are fractions.

    Raises
    ------
    ValueError
        If the text is neither.
    """
    if text is None:
        return None
    cleaned = text.strip()
    try:
        if cleaned.endswith("%"):
            return float(cleaned[:-1]) / 100
        return int(cleaned) if cleaned.lstrip("+-").isdigit() else float(cleaned)
    except ValueError:
        raise ValueError(f"--budget {text}: give a token count (64), a fraction (0.22) or a percentage (22%)") from None


def settings_of(pairs: list[str] | None) -> dict[str, Any]:
    """``key=value`` pairs; a value is a Python literal where it reads as one, else text."""
    out: dict[str, Any] = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip().isidentifier():
            raise ValueError(f"--set {pair}: write it as key=value")
        try:
            out[key.strip()] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            out[key.strip()] = value.strip()
    return out
