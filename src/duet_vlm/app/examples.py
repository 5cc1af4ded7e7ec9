"""First examples: the shipped images, and a drawn video or page where the model takes those."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from duet_vlm import tiny
from duet_vlm.api.loading import LoadedModel
from duet_vlm.tiny import long, page, video

EACH = 4  # frames of the file that show one step of the clip
CLIPS: dict[str, Callable[[str, int], video.ClipSample]] = {"tiny-video": video.sample, "tiny-long": long.sample}


def examples(loaded: LoadedModel, folder: Path) -> list[tuple[Path, str]]:
    """Files, written to ``folder``, and a question about each."""
    if loaded.name in CLIPS:
        return _clip(folder, CLIPS[loaded.name])
    if loaded.name == "tiny-page":
        sample = page.sample("test", 0)
        sample.image.save(folder / "page.png")
        return [(folder / "page.png", sample.question)]
    files = []
    for number, item in enumerate(tiny.demo_images()):
        path = folder / f"picture-{number + 1}.png"
        item.image.save(path)
        files.append((path, item.questions[0][0]))
    return files + (_clip(folder, CLIPS["tiny-video"]) if loaded.takes_clips else [])


def _clip(folder: Path, drawn: Callable[[str, int], video.ClipSample]) -> list[tuple[Path, str]]:
    """A clip of the embedded task as a file; nothing where PyAV is not installed."""
    try:
        import av
    except ImportError:
        return []
    sample, path = drawn("test", 0), folder / "clip.mp4"
    frames = [np.asarray(frame) for frame in sample.frames for _ in range(EACH)]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "4"})
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return [(path, sample.question)]
