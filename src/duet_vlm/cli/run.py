"""``duet-vlm run``: one prompt, answered with fewer visual tokens."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer

from duet_vlm.cli.options import Device, FrameCount, Images, Model, Prompt, Rate, Reduction, Shown, Videos, reducing
from duet_vlm.loading import Loaded, load


@dataclass(frozen=True)
class Answer:
    """What was said, in how many ``tokens``; seconds to the first of them and to the last."""

    text: str
    tokens: int
    first_token: float
    seconds: float

    def timing(self) -> str:
        return f"{self.first_token:.3g} s to the first token, {self.seconds:.3g} s to the last of {self.tokens}"


def answer(loaded: Loaded, inputs: Any, max_new_tokens: int, show: bool) -> Answer:
    """Greedy answer of the model as it stands; with ``show`` it is written to stdout as it comes."""
    from transformers import TextStreamer

    class Screen(TextStreamer):
        first: float | None = None

        def put(self, value: Any) -> None:
            if not self.next_tokens_are_prompt and self.first is None:  # the prompt comes first; tokens arrive on the host
                self.first = time.perf_counter()
            super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if show:
                sys.stdout.write(text + ("\n" if stream_end else ""))
                sys.stdout.flush()

    streamer = Screen(loaded.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    start = time.perf_counter()
    out = loaded.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer)
    new = out[0, inputs["input_ids"].shape[1] :].tolist()
    end = time.perf_counter()
    text = str(loaded.processor.tokenizer.decode(new, skip_special_tokens=True)).strip()
    return Answer(text, len(new), (streamer.first or end) - start, end - start)


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
    compare: Annotated[bool, typer.Option("--compare", help="Also answer with the full model, and say how long each took.")] = False,
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
        if compare:
            answer(loaded, inputs, 1, False)  # the first call of a process pays for what all later ones find made
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
        values: dict[str, Any] = {"model": model, "prompt": prompt, "answer": short.text, "full_answer": full and full.text}
        values["timing"] = {"reduced": _plain(short), "full": full and _plain(full)}
        values["clips"] = [{"file": str(path), "frames": clip.indices, "of": clip.total} for path, clip in zip(shown.videos, clips, strict=True)]
        print(json.dumps(values | {"report": json.loads(report.to_json())}))
        return
    if full is not None:
        print("same answer" if full.text == short.text else "the answers differ")
        print(f"\n{label:<{width}} : {short.timing()}\n{'full':<{width}} : {full.timing()}")
        print("measured once, on this machine; 'duet-vlm bench' measures in pairs and takes medians")
    print(f"\n{report}")


def _plain(found: Answer) -> dict[str, Any]:
    return {key: value for key, value in asdict(found).items() if key != "text"}
