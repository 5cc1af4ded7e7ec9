"""``duet-vlm run``: one prompt, answered with fewer visual tokens."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import asdict
from typing import Annotated, Any, cast

import typer

from duet_vlm.api.loading import load
from duet_vlm.cli.options import (
    Device,
    FrameCount,
    Images,
    Model,
    Prompt,
    Rate,
    Reduction,
    StillFrames,
    Videos,
    VisualInputs,
    pieces_of,
    reducing,
    warn_of_more,
)
from duet_vlm.cli.streamed_video import check_streamed, streamed
from duet_vlm.cli.timed_answer import TimedAnswer, timed_answer

BUDGET = 0.22  # where nobody names one


@reducing
def run(
    prompt: Prompt,
    reduction: Reduction,
    json_: bool,
    image: Images = None,
    video: Videos = None,
    frames: FrameCount = None,
    fps: Rate = None,
    model: Model = "tiny",
    compare: Annotated[
        bool, typer.Option("--compare", help="Also answer with the full model, and say how long each took.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer.")] = 64,
    chunk_frames: Annotated[
        int | None,
        typer.Option(
            "--chunk-frames",
            min=1,
            help="Frames of a clip that go through the vision tower at a time. With --method: the same answer, in less memory. Without: "
            "--budget tokens are held of a clip of any length, those that evs keeps.",
        ),
    ] = None,
    still_frames: StillFrames = None,
    device: Device = None,
) -> None:
    """Answer a question about images and clips, then report tokens, FLOPs and KV bytes.

    Without --budget, 22 % of the visual tokens are kept.
    """
    shown = VisualInputs.of(image, video, frames, fps, prompt)
    chunk_settings = pieces_of(chunk_frames, still_frames, bool(shown.videos), "give --video")
    if chunk_frames is not None and reduction.method is None:
        check_streamed(shown, reduction, compare, still_frames)
        streamed(load(model, device), shown, prompt, chunk_frames, cast(int, reduction.budget), max_new_tokens, json_)
        return
    loaded = load(model, device)
    if reduction.lacks_budget(loaded.model):
        reduction = dataclasses.replace(reduction, budget=BUDGET)
        typer.echo(f"no --budget: {BUDGET:.0%} of the visual tokens are kept", err=True)
    clips = shown.clips(loaded)
    with reduction.attach(loaded.model, loaded.processor, **chunk_settings) as handle:
        inputs = loaded.inputs(shown.images, prompt, clips)
        label = reduction.label_on(handle)
        width = max(len(label), 4)
        if compare:
            timed_answer(loaded, inputs, 1, False)  # the first call of a process pays for what all later ones find made
        if compare and not json_:
            sys.stdout.write(f"{label:<{width}} | ")
        short = timed_answer(loaded, inputs, max_new_tokens, not json_)
        report = handle.report()
        warn_of_more(reduction.budget, [span.span.tokens for span in handle.trace[0]])
        full = None
        if compare:
            if not json_:
                sys.stdout.write(f"{'full':<{width}} | ")
            with handle.paused():
                full = timed_answer(loaded, inputs, max_new_tokens, not json_)
    if json_:
        values: dict[str, Any] = {
            "model": model,
            "prompt": prompt,
            "answer": short.text,
            "full_answer": full and full.text,
        }
        values["timing"] = {"reduced": _plain(short), "full": full and _plain(full)}
        values["clips"] = [
            {"file": str(path), "frames": clip.indices, "of": clip.total}
            for path, clip in zip(shown.videos, clips, strict=True)
        ]
        print(json.dumps(values | {"report": json.loads(report.to_json())}))
        return
    if full is not None:
        print("same answer" if full.text == short.text else "the answers differ")
        print(f"\n{label:<{width}} : {short.timing()}\n{'full':<{width}} : {full.timing()}")
        print("measured once, on this machine; 'duet-vlm bench' measures in pairs and takes medians")
    print(f"\n{report}")


def _plain(answer: TimedAnswer) -> dict[str, Any]:
    return {key: value for key, value in asdict(answer).items() if key != "text"}
