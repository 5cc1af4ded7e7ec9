"""``duet-vlm viz``: a picture of what was kept, merged and dropped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from PIL import Image

from duet_vlm.cli.options import Device, Images, Model, Prompt, Reduction, reducing
from duet_vlm.cli.run import answer
from duet_vlm.loading import Loaded, load, open_image
from duet_vlm.tokens import SpanTrace
from duet_vlm.viz import draw, seen


def overlay(loaded: Loaded, inputs: Any, images: list[Image.Image], number: int, trace: SpanTrace, title: str) -> Image.Image:
    """The drawing of image ``number`` of a one-sample call."""
    pixels = inputs["pixel_values"]
    return draw(seen(images[number], pixels[number] if pixels.ndim == 4 else None, loaded.processor), trace, title=title)


@reducing
def viz(
    image: Images,
    prompt: Prompt,
    reduction: Reduction,
    json_: bool,
    model: Model = "tiny",
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the PNG files.")] = Path("out/viz"),
    device: Device = None,
) -> None:
    """Draw, for each image and stage, the patches that were kept, merged (one colour per group) and dropped."""
    pictures = [open_image(path) for path in image]
    loaded = load(model, device)
    with reduction.attach(loaded.model, loaded.processor) as handle:
        inputs = loaded.inputs(pictures, prompt)
        said = answer(loaded, inputs, 16, False)
        (spans,), report, label = handle.trace, handle.report(), reduction.label_on(handle)
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for number, trace in enumerate(spans):
        cost = f"{report.measured_mean / len(spans):.1f} tokens per layer"
        sheet = overlay(loaded, inputs, pictures, number, trace, f"{label}, {cost}.  {prompt}  {said}")
        files.append(out / f"{number + 1}-{image[number].stem}-{label}.png")
        sheet.save(files[-1])
    if json_:
        print(json.dumps({"answer": said, "files": [str(file) for file in files], "mean_tokens": report.measured_mean}))
        return
    print(said)
    for file in files:
        print(f"wrote {file}")
