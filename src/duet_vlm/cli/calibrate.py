"""``duet-vlm calibrate``: measure on a model the statistics that a method needs before it runs on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

import duet_vlm
from duet_vlm.api.loading import check_model
from duet_vlm.cli.errors import folder_for, friendly
from duet_vlm.cli.options import AsJson, Debug, Device, Images, Model, VisualInputs, method_of
from duet_vlm.reducers import method_files

QUESTION = "Describe the image."


def calibrate(
    method: Annotated[
        str, typer.Argument(metavar="METHOD", help="fitprune (a table, .json) or d2pruner (a prior, .safetensors).")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where to write what was learned.")],
    image: Images = None,
    model: Model = "tiny",
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help="The question that is asked about each image.")
    ] = QUESTION,
    device: Device = None,
    json_: AsJson = False,
    debug: Debug = False,
) -> None:
    """Ask a question about each image, watch the model's attention, and store what a method needs of it.

    A hundred images like those to come are plenty. Name the file when you attach: --set table=FILE (fitprune) or --set
    prior=FILE (d2pruner).
    """
    with friendly(debug, json_):
        method, *_ = method_of(method)
        able = [name for name, cls in duet_vlm.list_methods().items() if hasattr(cls, "observer")]
        if not method_files.names() and method not in able:
            raise ValueError(f"{method} is not calibrated to a model; methods that are: {', '.join(able)}")
        pictures = VisualInputs.of(image, None, None, None, prompt).images
        check_model(model)
        folder_for("--out", out.parent)

        from duet_vlm.api.calibrate import calibrate as learn
        from duet_vlm.api.calibrate import observer_of
        from duet_vlm.api.loading import load

        observer_of(method)  # refused before anything large is loaded
        loaded = load(model, device)
        made = learn(loaded.model, method, (loaded.inputs([picture], prompt) for picture in pictures), out)
        if json_:
            print(json.dumps({"file": str(out), "method": method, "images": len(pictures), "model": made.model}))
        else:
            print(f"{method} knows {model} from {len(pictures)} image{'s'[: len(pictures) != 1]}: {out}")
