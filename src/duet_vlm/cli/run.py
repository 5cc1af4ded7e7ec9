"""``duet-vlm run``: one prompt, answered with fewer visual tokens."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

from duet_vlm.cli.options import Device, FrameCount, Images, Model, Prompt, Rate, Reduction, Shown, Videos, reducing
from duet_vlm.loading import Loaded, load


def answer(loaded: Loaded, inputs: Any, max_new_tokens: int, show: bool) -> str:
    """Greedy answer of the model as it stands; with ``show`` it is written to stdout as it comes."""
    from transformers import TextStreamer

    class Screen(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            sys.stdout.write(text + ("\n" if stream_end else ""))
            sys.stdout.flush()

    streamer = Screen(loaded.processor.tokenizer, skip_prompt=True, skip_special_tokens=True) if show else None
    out = loaded.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer)
    return str(loaded.processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


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
    compare: Annotated[bool, typer.Option("--compare", help="Also answer with the full model.")] = False,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer.")] = 64,
    device: Device = None,
) -> None:
    """Answer a question about images and clips, then report tokens, FLOPs and KV bytes."""
    shown = Shown.of(image, video, frames, fps)
    loaded = load(model, device)
    clips = shown.clips(loaded)
    with reduction.attach(loaded.model, loaded.processor) as handle:
        inputs = loaded.inputs(shown.images, prompt, clips)
        label = reduction.label_on(handle)
        width = max(len(label), 4)
        if compare and not json_:
            sys.stdout.write(f"{label:<{width}} | ")
        short = answer(loaded, inputs, max_new_tokens, not json_)
        report = handle.report()
        full = None
        if compare:
            if not json_:
                sys.stdout.write(f"{'full':<{width}} | ")
            inputs.pop("salient_mask", None)
            with handle.paused():
                full = answer(loaded, inputs, max_new_tokens, not json_)
    if json_:
        values: dict[str, Any] = {"model": model, "prompt": prompt, "answer": short, "full_answer": full}
        values["clips"] = [{"file": str(path), "frames": clip.indices, "of": clip.total} for path, clip in zip(shown.videos, clips, strict=True)]
        print(json.dumps(values | {"report": json.loads(report.to_json())}))
        return
    if compare:
        print("same answer" if full == short else "the answers differ")
    print(f"\n{report}")
