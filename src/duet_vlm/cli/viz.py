"""``duet-vlm viz``: a picture of what was kept, merged and dropped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from PIL import Image

from duet_vlm.cli.options import Device, FrameCount, Images, Model, Prompt, Rate, Reduction, Shown, Videos, reducing
from duet_vlm.cli.run import answer
from duet_vlm.loading import Loaded, load
from duet_vlm.tokens import SpanTrace
from duet_vlm.video import Clip
from duet_vlm.viz import draw, seen

STEP = 160  # pixels of the longer side of a clip's panel, per step of time


def overlay(loaded: Loaded, inputs: Any, images: list[Image.Image], number: int, trace: SpanTrace, title: str) -> Image.Image:
    """The drawing of image ``number`` of a one-sample call."""
    pixels = inputs["pixel_values"]
    return draw(seen(images[number], pixels[number] if pixels.ndim == 4 else None, loaded.processor), trace, title=title)


def film(clip: Clip, steps: int) -> Image.Image:
    """The frames of a clip one below the other, one for each step of time that the model makes of them."""
    frames = [clip.frames[step * len(clip.frames) // steps] for step in range(steps)]
    width, height = frames[0].size
    strip = Image.new("RGB", (width, height * steps))
    for step, frame in enumerate(frames):
        strip.paste(frame, (0, step * height))
    return strip


def clip_overlay(inputs: Any, clip: Clip, number: int, trace: SpanTrace, title: str) -> Image.Image:
    """The drawing of clip ``number`` of a one-sample call."""
    grids = inputs.get("video_grid_thw")
    steps = len(clip.frames) if grids is None else int(grids[number, 0])
    return draw(film(clip, steps), trace, title=title, size=STEP * steps)


@reducing
def viz(
    prompt: Prompt,
    reduction: Reduction,
    json_: bool,
    image: Images = None,
    video: Videos = None,
    frames: FrameCount = None,
    fps: Rate = None,
    model: Model = "tiny",
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the PNG files.")] = Path("out/viz"),
    device: Device = None,
) -> None:
    """Draw, for each image, clip and stage, the patches that were kept, merged (one colour per group) and dropped."""
    shown = Shown.of(image, video, frames, fps)
    loaded = load(model, device)
    clips = shown.clips(loaded)
    with reduction.attach(loaded.model, loaded.processor) as handle:
        inputs = loaded.inputs(shown.images, prompt, clips)
        said = answer(loaded, inputs, 16, False)
        (spans,), report, label = handle.trace, handle.report(), reduction.label_on(handle)
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for number, (path, trace) in enumerate(zip([*(image or []), *shown.videos], spans, strict=True)):
        title = f"{label}, {report.measured_mean / len(spans):.1f} tokens per layer.  {prompt}  {said}"
        if number < len(shown.images):
            sheet = overlay(loaded, inputs, shown.images, number, trace, title)
        else:
            sheet = clip_overlay(inputs, clips[number - len(shown.images)], number - len(shown.images), trace, title)
        files.append(out / f"{number + 1}-{path.stem}-{label}.png")
        sheet.save(files[-1])
    if json_:
        print(json.dumps({"answer": said, "files": [str(file) for file in files], "mean_tokens": report.measured_mean}))
        return
    print(said)
    for file in files:
        print(f"wrote {file}")
