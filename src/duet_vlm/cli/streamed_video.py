"""``duet-vlm run --chunk-frames`` without a method: a video of any length in bounded memory."""

from __future__ import annotations

import json
from dataclasses import asdict

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from duet_vlm.api.loading import LoadedModel
from duet_vlm.cli.options import Reduction, VisualInputs
from duet_vlm.cli.timed_answer import timed_answer
from duet_vlm.inputs.video import frame_numbers, pieces


def check_streamed(shown: VisualInputs, reduction: Reduction, compare: bool, still: float | None) -> None:
    """Refuse options that a streamed video cannot be combined with.

    Raises
    ------
    ValueError
        Images, several videos, settings of a method, a budget that is no number of tokens, a comparison with the full
        model, still frames.
    """
    remedy = "or name a --method, which chooses among all tokens of the clip"
    if shown.images or len(shown.videos) != 1:
        raise ValueError(
            f"--chunk-frames: {len(shown.images)} images and {len(shown.videos)} clips; give one --video and nothing else, {remedy}"
        )
    if reduction.fields:
        raise ValueError(
            f"--chunk-frames without --method holds the tokens that evs keeps: leave out --set and --positions, {remedy}"
        )
    if isinstance(reduction.budget, bool) or not isinstance(reduction.budget, int):
        raise ValueError(
            f"--chunk-frames: say with --budget how many visual tokens are held, e.g. --budget 256, {remedy}"
        )
    if compare:
        raise ValueError(
            f"--compare: the full model would need the whole clip at once; leave out --chunk-frames or --compare, {remedy}"
        )
    if still is not None:
        raise ValueError(
            f"--still-frames {still}: what is held as it comes is encoded frame by frame; leave it out, {remedy}"
        )


def streamed(
    loaded: LoadedModel, shown: VisualInputs, prompt: str, size: int, budget: int, max_new_tokens: int, json_: bool
) -> None:
    """Answer a question about one video, ``size`` frames of which go through the vision tower at a time."""
    from duet_vlm.api.streaming import StreamingVideo

    together = int(getattr(getattr(loaded.model.config, "vision_config", None), "temporal_patch_size", 1) or 1)
    if size % together:
        raise ValueError(
            f"--chunk-frames {size}: this model puts {together} frames together; give a multiple of {together}"
        )
    stream, frames, inputs = StreamingVideo(loaded.model, budget), 0, None
    given = (loaded.frames if shown.frames is None and shown.fps is None else shown.frames), shown.fps
    with _bar() as bar:
        task = bar.add_task("frames", total=frame_numbers(shown.videos[0], *given), held=0)
        for piece in pieces(shown.videos[0], size, *given):
            inputs = loaded.inputs([], prompt, [piece])
            stream.add(**inputs)
            frames += len(piece.frames)
            bar.update(task, completed=frames, held=len(stream.held))
    assert inputs is not None  # a clip has a frame
    answer = timed_answer(loaded, stream.inputs(inputs["input_ids"]), max_new_tokens, not json_)
    tokens, held = stream.steps * stream.places, len(stream.held)
    if json_:
        values = {
            "model": loaded.name,
            "prompt": prompt,
            "answer": answer.text,
            "frames": frames,
            "visual_tokens": tokens,
            "held": held,
        }
        timing = {key: value for key, value in asdict(answer).items() if key != "text"}
        print(json.dumps(values | {"chunk_frames": size, "timing": timing}))
        return
    print(f"\n{frames} frames, {size} at a time: {held} of {tokens} visual tokens held; {answer.timing()}")


def _bar() -> Progress:
    """Progress of the video and number of kept tokens, on a terminal."""
    console = Console(stderr=True)
    held = TextColumn("{task.fields[held]} visual tokens held")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        held,
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, disable=not console.is_terminal)
