"""``duet-vlm report``: tables, plots and one page from result files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from duet_vlm.cli.errors import folder_for, friendly
from duet_vlm.cli.options import AsJson, Debug, several_paths


def report(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Result files that 'duet-vlm eval' wrote.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the page, the tables and the plots.")] = Path(
        "out/report"
    ),
    json_: AsJson = False,
    debug: Debug = False,
) -> None:
    """Render result files: report.html (sort and filter in a browser), markdown tables, plots as PNG and SVG."""
    with friendly(debug, json_):
        from rich.console import Console

        from duet_vlm.evaluation.results import load

        paths = several_paths(files)
        for file in paths:
            load(file)  # what is missing or damaged is named before seconds go by: drawing imports torch
        try:
            import matplotlib  # noqa: F401  # before a folder is made
        except ImportError as error:
            raise ImportError('plots need matplotlib: pip install ".[viz]"') from error
        folder_for("--out", out)
        from duet_vlm.evaluation.report import write

        with Console(stderr=True).status("reading the results") as status:  # moves on a terminal, is silent elsewhere
            try:
                written = write(paths, out, lambda text: status.update(f"drawing {escape(text)}"))
            except OSError as error:
                if error.filename is None or not Path(error.filename).is_relative_to(out):
                    raise
                raise ValueError(f"--out {out}: cannot be written to ({error.strerror}: {error.filename})") from error
        if json_:
            print(json.dumps({"files": [str(file) for file in written]}))
            return
        for file in written:
            print(f"wrote {file}")
