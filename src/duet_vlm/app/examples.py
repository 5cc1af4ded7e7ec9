"""Something to look at first: the shipped pictures, and a drawn clip or page where the model reads those."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from duet_vlm.api.embedded import Sample, embedded_task, task_names
from duet_vlm.api.loading import LoadedModel
from duet_vlm.evaluation import tiny

EACH = 4  # frames of the file that show one step of the clip


def examples(loaded: LoadedModel, folder: Path) -> list[tuple[Path, str]]:
    """Files, written to ``folder``, and a question about each."""
    if (own := own_sample(loaded)) is not None:
        return _clip(folder, own) if own.frames else _pictures(folder, own)
    complete = []
    for number, item in enumerate(tiny.demo_images()):
        path = folder / f"picture-{number + 1}.png"
        item.image.save(path)
        complete.append((path, item.questions[0][0]))
    clip = (
        embedded_task("tiny-video").sample("test", 0) if loaded.takes_clips and "tiny-video" in task_names() else None
    )
    return complete + (_clip(folder, clip) if clip else [])


def own_sample(loaded: LoadedModel) -> Sample | None:
    """A sample of the task that an embedded model was trained for; None for other models, and for "tiny", which has
    shipped pictures."""
    return (
        embedded_task(loaded.name).sample("test", 0) if loaded.name != "tiny" and loaded.name in task_names() else None
    )


def _pictures(folder: Path, sample: Sample) -> list[tuple[Path, str]]:
    """The first picture of a sample as a file, where the question is about one."""
    if len(sample.images) > 1:
        return []
    sample.image.save(folder / "picture.png")
    return [(folder / "picture.png", sample.question)]


def _clip(folder: Path, sample: Sample) -> list[tuple[Path, str]]:
    """A clip of the embedded task as a file; nothing where PyAV is not installed."""
    try:
        import av
    except ImportError:
        return []
    path = folder / "clip.mp4"
    frames = [np.asarray(frame) for frame in sample.frames for _ in range(EACH)]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "4"})
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return [(path, sample.question)]
