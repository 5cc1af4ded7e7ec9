"""``duet-vlm app``: a page to play with, on this machine."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated

import typer

from duet_vlm.api.loading import check_model, load
from duet_vlm.cli.errors import friendly
from duet_vlm.cli.options import (
    BudgetText,
    Debug,
    Device,
    Method,
    Model,
    Positions,
    Preset,
    Settings,
    one,
    reductions_of,
)
from duet_vlm.cli.serve import check_port


def app(
    model: Model = "tiny",
    method: Method = None,
    preset: Preset = None,
    budget: BudgetText = None,
    positions: Positions = None,
    settings: Settings = None,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; 0.0.0.0 for other machines.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port to listen on.")] = 7860,
    device: Device = None,
    debug: Debug = False,
) -> None:
    """Open a page: drop a picture or clip, ask, and see full and reduced answers side by side, and which patches are
    left at each depth."""
    with friendly(debug, interrupted="the same command opens the page again"):
        one("--budget", budget)
        (reduction,) = reductions_of(method, preset, budget, positions, settings)
        check_port(host, port)
        check_model(model)
        reduction.check(model)
        if find_spec("gradio") is None:
            raise ValueError('the page needs Gradio: pip install ".[app]" in your clone of duet-vlm')
        from duet_vlm.app.controls import starting
        from duet_vlm.app.serve import serve

        loaded = load(model, device)
        first = starting(reduction.method, reduction.budget, reduction.fields, loaded.model)
        if host not in ("127.0.0.1", "localhost", "::1"):
            typer.echo(f"warning: anyone who reaches {host}:{port} can use this page", err=True)
        serve(loaded, first, host, port)
