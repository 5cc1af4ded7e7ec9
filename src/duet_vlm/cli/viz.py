"""``duet-vlm viz``: a picture of what was kept, merged and dropped."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from PIL import Image

from duet_vlm.cli.errors import folder_for
from duet_vlm.cli.options import Device, FrameCount, Images, Model, Prompt, Rate, Reduction, Shown, Videos, reducing
from duet_vlm.cli.run import answer
from duet_vlm.loading import Loaded, load
from duet_vlm.video import Clip

if TYPE_CHECKING:
    from duet_vlm import Handle, SpanTrace

STEP = 160  # pixels of the longer side of a clip's panel, per step of time


def overlay(loaded: Loaded, inputs: Any, images: list[Image.Image], number: int, trace: SpanTrace, title: str) -> Image.Image:
    """The drawing of image ``number`` of a one-sample call."""
    from duet_vlm.viz import draw, seen

    pixels = inputs["pixel_values"]
    return draw(seen(images[number], pixels[number] if pixels.ndim == 4 else None, loaded.processor), trace, title=title)


def film(frames: Sequence[Image.Image], steps: int) -> Image.Image:
    """The frames of a clip one below the other, one for each step of time that the model makes of them."""
    chosen = [frames[step * len(frames) // steps] for step in range(steps)]
    width, height = chosen[0].size
    strip = Image.new("RGB", (width, height * steps))
    for step, frame in enumerate(chosen):
        strip.paste(frame, (0, step * height))
    return strip


def on_film(trace: SpanTrace, steps: int) -> SpanTrace:
    """The trace of a clip on the grid of its ``film``. Families that hand out a square per frame behind its CLS row name no grid: there the
    CLS rows are counted first, as ``draw`` wants rows that show nothing, and the patches of all frames after them."""
    from duet_vlm import SpanTrace
    from duet_vlm.tokens import StageTrace

    each, side = trace.span.tokens // steps, math.isqrt(trace.span.tokens // steps)
    patches, front = side * side, each - side * side
    if trace.span.grid is not None or front > 1 or each * steps != trace.span.tokens:
        return trace

    def place(token: int) -> int:
        step, row = divmod(token, each)
        return step * front + row if row < front else steps * front + step * patches + row - front

    def places(tokens: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted(place(token) for token in tokens))

    def groups(merged: dict[int, tuple[int, ...]]) -> dict[int, tuple[int, ...]]:
        return {place(anchor): places(members) for anchor, members in merged.items()}

    def placed(stage: StageTrace) -> StageTrace:
        return StageTrace(stage.layer, places(stage.kept), places(stage.dropped), groups(stage.merged))

    return SpanTrace(
        dataclasses.replace(trace.span, grid=(steps * side, side)), groups(trace.merged), tuple(map(placed, trace.stages)),
        trace.tower and placed(trace.tower),
    )  # fmt: skip


def clip_overlay(loaded: Loaded, inputs: Any, clip: Clip, number: int, trace: SpanTrace, title: str) -> Image.Image:
    """The drawing of clip ``number`` of a one-sample call."""
    from duet_vlm.viz import draw, seen

    pixels, grids = inputs["pixel_values_videos"], inputs.get("video_grid_thw")
    frames = [seen(frame, pixels[number, i] if pixels.ndim == 5 else None, loaded.processor) for i, frame in enumerate(clip.frames)]
    steps = len(frames) if grids is None else int(grids[number, 0])
    return draw(film(frames, steps), on_film(trace, steps), title=title, size=STEP * steps)


def file_name(reduction: Reduction, handle: Handle) -> str:
    """What tells the pictures of one reduction from those of another, as a piece of a file's name: method, budget, and settings by hand."""
    budget = None if handle.budget is None else f"{handle.budget:g}"
    settings = [f"{key}={value}" for key, value in reduction.fields.items()]
    words = [f"preset-{reduction.preset}"] if reduction.preset else [handle.reducer.name, *([budget] if budget else []), *settings]
    return re.sub(r"[^\w.=+-]+", "_", "-".join(words)).strip("_")


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
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the PNG files, named by file, method, budget and settings.")] = Path("out/viz"),
    device: Device = None,
) -> None:
    """Draw, for each image, clip and stage, the patches that were kept, merged (one colour per group) and dropped."""
    shown = Shown.of(image, video, frames, fps)
    folder_for("--out", out)
    loaded = load(model, device)
    clips = shown.clips(loaded)
    with reduction.attach(loaded.model, loaded.processor) as handle:
        inputs = loaded.inputs(shown.images, prompt, clips)
        said = answer(loaded, inputs, 16, False).text
        (spans,), report, label, name = handle.trace, handle.report(), reduction.label_on(handle), file_name(reduction, handle)
    files, paths = [], shown.paths
    if len(spans) != len(paths):
        raise ValueError(f"{len(paths)} files make {len(spans)} spans in this model (frames handed out one by one), which cannot be drawn yet")
    for number, (path, trace) in enumerate(zip(paths, spans, strict=True)):
        title = f"{label}, {report.measured_mean / len(spans):.1f} tokens per layer.  {prompt}  {said}"
        if number < len(shown.images):
            sheet = overlay(loaded, inputs, shown.images, number, trace, title)
        else:
            sheet = clip_overlay(loaded, inputs, clips[number - len(shown.images)], number - len(shown.images), trace, title)
        files.append(out / f"{number + 1}-{path.stem}-{name}.png")
        sheet.save(files[-1])
    if json_:
        print(json.dumps({"answer": said, "files": [str(file) for file in files], "mean_tokens": report.measured_mean}))
        return
    print(said)
    for file in files:
        print(f"wrote {file}")
