"""Peak memory of a question about a long clip, in pieces and in one: ``python lab/studies/stream.py``.

Clips of 60, 600 and 3,600 frames (an hour at one frame per second) are written with PyAV and asked about with
``tiny-video``, each in a process of its own: the most resident memory from when the clip comes, less what was held
before (Linux). In one piece clips of up to 600 frames. Results land in lab/studies/results/stream.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import benchmark_path  # noqa: F401
import torch
from common import environment

FRAMES, SIZE, BUDGET = (60, 600, 3600), 16, 520
WHOLE = 600  # frames of the longest clip that is read in one piece
QUESTION = "What shape is the red object?"


def write(path: Path, frames: int) -> None:
    """A clip of the embedded task over and over, one frame per second."""
    import av
    import numpy as np

    from duet_vlm_lab.tasks import video

    pictures = [np.asarray(frame) for item in video.samples("test", 8) for frame in item.frames]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=1)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for number in range(frames):
            container.mux(
                stream.encode(av.VideoFrame.from_ndarray(pictures[number // 4 % len(pictures)], format="rgb24"))
            )
        container.mux(stream.encode())


def memory(what: str) -> float:
    """MiB that this process holds (VmRSS), or has held at most since ``forget`` (VmHWM)."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[what].split()[0]) / 1024


def forget() -> None:
    """Begin to look for the most anew."""
    Path("/proc/self/clear_refs").write_text("5")


def ask(path: Path, way: str) -> dict[str, float]:
    """One question, in this process."""
    import duet_vlm
    from duet_vlm.api.loading import load
    from duet_vlm.api.streaming import StreamingVideo
    from duet_vlm.cli.timed_answer import timed_answer
    from duet_vlm.inputs.video import decode, pieces

    torch.set_num_threads(1)
    loaded = load("tiny-video")
    warm = next(pieces(path, SIZE, fps=1))
    loaded.inputs([], QUESTION, [warm])
    forget()
    before, start = memory("VmRSS"), time.perf_counter()
    with torch.no_grad():
        if way == "pieces":
            stream = StreamingVideo(loaded.model, BUDGET)
            for piece in pieces(path, SIZE, fps=1):
                inputs = loaded.inputs([], QUESTION, [piece])
                stream.add(**inputs)
            timed_answer(loaded, stream.inputs(inputs["input_ids"]), 4, False)
            tokens = stream.steps * stream.places
        else:
            inputs = loaded.inputs([], QUESTION, [decode(path, fps=1)])
            with duet_vlm.attach(loaded.model, "evs", budget=BUDGET) as handle:
                timed_answer(loaded, inputs, 4, False)
                tokens = handle.trace[0][0].span.tokens
    return {
        "tokens": tokens,
        "peak_mib": round(memory("VmHWM") - before, 1),
        "seconds": round(time.perf_counter() - start, 2),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--frames", default=",".join(map(str, FRAMES)))
    parser.add_argument("--ask", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.ask:
        print(json.dumps(ask(Path(args.ask[0]), args.ask[1])))
        return
    rows = []
    for frames in map(int, args.frames.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "clip.mp4"
            write(path, frames)
            for way in ("pieces", "whole") if frames <= WHOLE else ("pieces",):
                words = [sys.executable, __file__, "--ask", str(path), way]
                found = json.loads(
                    subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
                )
                rows.append({"frames": frames, "way": way, **found})
                print(rows[-1], flush=True)
    settings = {"chunk_frames": SIZE, "budget": BUDGET, "model": "tiny-video", "fps": 1}
    args.out.mkdir(parents=True, exist_ok=True)
    made = {"environment": environment(), "settings": settings, "results": rows}
    (args.out / "stream.json").write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
