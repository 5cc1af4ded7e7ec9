"""``duet-vlm viz``: a picture of what was kept, merged and dropped."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from PIL import Image

from duet_vlm.api.loading import LoadedModel, load
from duet_vlm.cli.errors import folder_for
from duet_vlm.cli.options import (
    SEVERAL,
    Device,
    FrameCount,
    Images,
    Model,
    Prompt,
    Rate,
    Reduction,
    Videos,
    VisualInputs,
    budget_of,
    method_of,
    reducing,
    several,
    warn_of_more,
)
from duet_vlm.cli.timed_answer import timed_answer
from duet_vlm.inputs.video import VideoFrames

if TYPE_CHECKING:
    from duet_vlm import Handle, SpanTrace

Scores = Sequence[Mapping[int, float] | None]
STEP = 160  # pixels of the longer side of a clip's panel, per step of time


def overlay(
    loaded: LoadedModel,
    inputs: Any,
    images: list[Image.Image],
    number: int,
    trace: SpanTrace,
    title: str,
    lines: Sequence[str],
    scores: Scores,
) -> Image.Image:
    """The drawing of image ``number`` of a one-sample call."""
    from duet_vlm.viz import cropped_picture, draw

    picture = cropped_picture(images[number], inputs, number, loaded.processor)
    return draw(picture, trace, title=title, lines=lines, scores=scores)


def clip_overlay(
    loaded: LoadedModel, inputs: Any, clip: VideoFrames, number: int, trace: SpanTrace, title: str, lines: Sequence[str]
) -> Image.Image:
    """The drawing of video ``number`` of a one-sample call."""
    from duet_vlm.viz import draw, film, frame_pictures, on_film

    frames, steps = frame_pictures(clip.frames, inputs, number, loaded.processor)
    return draw(film(frames, steps), on_film(trace, steps), title=title, lines=lines, size=STEP * steps, shows="clip")


def file_name(reduction: Reduction, handle: Handle) -> str:
    """Part of a file's name that is unique to a reduction: method, budget, and settings by hand."""
    budget = None if handle.budget is None else f"{handle.budget:g}"
    settings = [f"{key}={value}" for key, value in reduction.fields.items()]
    words = (
        [f"preset-{reduction.preset}"]
        if reduction.preset
        else [handle.reducer.name, *([budget] if budget else []), *settings]
    )
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
    compare: Annotated[
        list[str] | None,
        typer.Option(
            "--compare",
            metavar="TEXT",
            help=f"Methods (fastv), budgets (0.11) or both (fastv@0.11) to draw below. {SEVERAL}",
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer.")] = 32,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for the PNG files, named by file, method, budget and settings.")
    ] = Path("out/viz"),
    device: Device = None,
) -> None:
    """Draw, for each image, clip and stage, the patches that were kept, merged (a colour and a number per group) and
    dropped.

    Below a stage: the scores that decided. Above: what the full model answers, and what the reduced one does.
    """
    shown = VisualInputs.of(image, video, frames, fps, prompt)
    reduction.check_budget(model)
    reductions = [reduction, *(beside(reduction, text) for text in several(compare))]
    for each in reductions[1:]:
        each.check(model)
    folder_for("--out", out)
    from duet_vlm.viz import stack

    loaded = load(model, device)
    clips = shown.clips(loaded)
    inputs = loaded.inputs(shown.images, prompt, clips)
    full = timed_answer(loaded, inputs, max_new_tokens, False).text
    drawn = [_view(loaded, shown, clips, each, prompt, full, max_new_tokens) for each in reductions]
    views = list({view[0]: view for view in drawn}.values())  # who compares duet with fastv may well name both
    files, names = [], [name for name, *_ in views]
    for number, path in enumerate(shown.paths):
        stem = f"{number + 1}-{path.stem}-{'-vs-'.join(names)}"
        files.append(out / f"{stem if len(stem) < 200 else stem[:190]}.png")
        stack([sheets[number] for _, sheets, *_ in views]).save(files[-1])
    if json_:
        first = views[0][2]
        compared = [{"name": name} | facts for name, _, facts in views]
        print(
            json.dumps({"full_answer": full} | first | {"files": [str(file) for file in files], "compared": compared})
        )
        return
    print(f"full model: {full}")
    for name, _, facts in views:
        print(f"{name}: {facts['answer']}")
    for file in files:
        print(f"wrote {file}")


def beside(reduction: Reduction, text: str) -> Reduction:
    """The reduction that ``--compare`` names: another method, another budget, or both (``fastv@0.11``); the rest as in
    ``reduction``.

    Raises
    ------
    ValueError
        Neither a method nor a budget, or a preset to vary.
    """
    if reduction.preset is not None:
        raise ValueError(
            f"--compare {text}: --preset {reduction.preset} brings its own budget; give --method and --budget to compare with others"
        )
    name, _, amount = text.rpartition("@")
    if not name and re.match(r"\.?\d", amount):
        return dataclasses.replace(reduction, budget=budget_of(amount))
    method, own, kept = method_of(name or amount)
    budget = budget_of(amount) if name else reduction.budget if own is None else own
    same = isinstance(reduction.method, str) and reduction.method == method
    return dataclasses.replace(reduction, method=method, budget=budget, fields=reduction.fields if same else kept)


def _view(
    loaded: LoadedModel,
    shown: VisualInputs,
    clips: list[VideoFrames],
    reduction: Reduction,
    prompt: str,
    full: str,
    longest: int,
) -> tuple[str, list[Image.Image], dict[str, Any]]:
    """One reduction: its name, a sheet for each image and video, and its answer."""
    from duet_vlm import attach
    from duet_vlm.viz import ScoreRecorder

    with reduction.attach(loaded.model, loaded.processor) as handle:
        name, label, budget = file_name(reduction, handle), reduction.label_on(handle), handle.budget
        watched = ScoreRecorder(handle.reducer)
    with attach(loaded.model, watched.reducer, budget=budget, processor=loaded.processor) as handle:
        inputs = loaded.inputs(shown.images, prompt, clips)
        said = timed_answer(loaded, inputs, longest, False).text
        (spans,), report = handle.trace, handle.report()
    warn_of_more(reduction.budget, [trace.span.tokens for trace in spans])
    if len(spans) != len(shown.paths):
        files = len(shown.paths)
        raise ValueError(
            f"{files} files make {len(spans)} spans in this model (frames handed out one by one), which cannot be drawn yet"
        )
    words = (
        "" if budget is None else f" at {budget:.4g} tokens" if isinstance(budget, int) else f" at {100 * budget:.4g} %"
    )
    told = "the same answer" if said == full else "another answer"
    lines = [prompt, f"full model: {full}", f"reduced: {said}  ({told})"]
    sheets = []
    for number, trace in enumerate(spans):
        title = f"{label}{words}: {report.images[0][number]:.1f} of {trace.span.tokens} tokens per layer"
        if number < len(shown.images):
            sheets.append(overlay(loaded, inputs, shown.images, number, trace, title, lines, watched.of(trace, number)))
        else:
            sheets.append(
                clip_overlay(
                    loaded, inputs, clips[number - len(shown.images)], number - len(shown.images), trace, title, lines
                )
            )
    return name, sheets, {"answer": said, "budget": budget, "mean_tokens": report.measured_mean}
