"""Videos from files: evenly spaced frames, decoded with PyAV one after the other, never the whole video at once."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image

from duet_vlm.inputs.images import is_picture, local, rgb

FRAMES = 8  # where neither the user nor the model says how many
MAX_FRAME = 64_000_000  # pixels of one frame; larger ones are refused before they are decoded
MAX_PIXELS = 512_000_000  # of all chosen frames: they are held together, three bytes each
MAX_LENGTH = 1_000_000  # frames of the file, nine hours at 30 per second
CONTAINERS = (
    "mov,mp4,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,h264,hevc,obu,ivf,flv,ogg,asf,mxf,gif,nut,dv,3gp,mjpeg"
)


@dataclass(frozen=True)
class VideoFrames:
    """Some frames of a video.

    Attributes
    ----------
    frames : tuple of PIL.Image.Image
        RGB, upright, in time order, all of one size.
    indices : tuple of int
        Numbers of these frames in the file, counted from 0.
    total : int
        Frames in the file.
    rate : float
        Frames of the file per second.
    """

    frames: tuple[Image.Image, ...]
    indices: tuple[int, ...]
    total: int
    rate: float


def sampled(total: int, count: int) -> tuple[int, ...]:
    """Indices of ``count`` frames evenly spaced over ``total``: floor(i * total / count), as transformers samples by
    default; all of them where there are fewer."""
    count = min(count, total)
    return tuple(i * total // count for i in range(count))


def decode(path: Path, frames: int | None = None, fps: float | None = None) -> VideoFrames:
    """Frames of a video file, evenly spaced (see ``sampled``).

    Parameters
    ----------
    path : Path
        A file that FFmpeg can read, without reference to other files.
    frames : int, optional
        Number of frames; default 8. A shorter video gives all it has.
    fps : float, optional
        Frames per second of the video, in place of ``frames``: floor(seconds * fps) of them, at least one.

    Returns
    -------
    VideoFrames
        The file is read twice: once for its packets (``length``), once to decode up to the last chosen frame. A
        recording without a length in its header that was cut off (WebM, MPEG-TS) is a shorter video, not an error.

    Raises
    ------
    ValueError
        Naming the path and the fault: missing, a folder, no video, damaged (and how many frames can be read), too
        large, both ``frames`` and ``fps``, PyAV not installed.
    """
    indices, total, rate = _frame_indices(path, frames, fps)
    return VideoFrames(tuple(_pictures(path, indices, total, len(indices))), indices, total, rate)


def frame_numbers(path: Path, frames: int | None = None, fps: float | None = None) -> int:
    """Number of frames that ``decode`` takes. Errors as ``decode``; nothing is decoded."""
    return len(_frame_indices(path, frames, fps)[0])


def pieces(path: Path, size: int, frames: int | None = None, fps: float | None = None) -> Iterator[VideoFrames]:
    """As ``decode``, but ``size`` frames at a time: memory depends on them and not on the length of the video. Errors
    as ``decode``, and a ValueError for a size below 1."""
    if size < 1:
        raise ValueError(f"size={size}: frames of a piece, at least 1")
    indices, total, rate = _frame_indices(path, frames, fps)
    pictures = _pictures(path, indices, total, size)
    for start in range(0, len(indices), size):
        chunk = indices[start : start + size]
        yield VideoFrames(tuple(itertools.islice(pictures, len(chunk))), chunk, total, rate)


def _frame_indices(path: Path, frames: int | None, fps: float | None) -> tuple[tuple[int, ...], int, float]:
    """Numbers of the frames to take from a file, its total, and its frames per second."""
    if frames is not None and fps is not None:
        raise ValueError(f"frames={frames} and fps={fps}: give one of them")
    if frames is not None and (isinstance(frames, bool) or not isinstance(frames, int) or frames < 1):
        raise ValueError(f"frames={frames}: give a whole number of at least 1")
    if fps is not None and not 0 < fps < float("inf"):
        raise ValueError(f"fps={fps}: give a number above 0")
    total, rate = length(path)
    return sampled(total, frames or FRAMES if fps is None else max(1, int(total / rate * fps))), total, rate


def length(path: Path) -> tuple[int, float]:
    """Frames in a video file, and frames per second. Packets are counted, nothing is decoded. Errors as ``decode``."""
    local(path, "--video ")
    if not path.is_file():
        raise ValueError(f"--video {path}: {'is a folder' if path.is_dir() else 'no such file'}")
    with _opened(path) as (container, stream):
        total = packets = 0
        rate = stream.average_rate or stream.guessed_rate
        for packet in _readable(path, container.demux(stream), stream.frames):
            packets += packet.dts is not None  # the last one only ends the stream
            total += packet.size > 0 and not packet.is_discard
            if total > MAX_LENGTH:
                raise ValueError(f"--video {path}: more than {MAX_LENGTH} frames; cut it into shorter clips")
        if packets < stream.frames:
            raise _damaged(path, packets, stream.frames, "it ends early")
    if total == 0:
        raise ValueError(f"--video {path}: the video stream has no frames")
    return total, float(rate or 25)


def _pyav() -> ModuleType:
    try:
        import av
    except ImportError as error:
        raise ValueError('reading video files needs PyAV: pip install ".[video]" in your clone of duet-vlm') from error
    return av


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """Container and video stream; playlists and other files that name files are not opened."""
    av = _pyav()
    try:
        container = av.open(
            str(path.absolute()), options={"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
        )
    except (av.error.FFmpegError, ValueError) as error:
        if is_picture(path):
            raise ValueError(f"--video {path}: is a picture; give it to --image") from None
        raise ValueError(
            f"--video {path}: not a video that can be read, or one that was cut off ({_reason(error)})"
        ) from None
    with container:
        streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
        if not streams:
            raise ValueError(
                f"--video {path}: no video stream in it (a file that was cut off before its index looks the same)"
            )
        width, height = streams[0].codec_context.width, streams[0].codec_context.height
        if width * height > MAX_FRAME:
            raise ValueError(
                f"--video {path}: frames of {width} x {height} pixels; at most {MAX_FRAME / 1e6:.0f} million are read"
            )
        streams[0].thread_type = "AUTO"
        yield container, streams[0]


def _readable(path: Path, items: Iterator[Any], total: int) -> Iterator[Any]:
    """Packets or frames, up to the first one that cannot be read."""
    done = 0
    try:
        for item in items:
            yield item
            done += 1
    except _pyav().error.FFmpegError as error:
        raise _damaged(path, done, total, _reason(error)) from None


def _pictures(path: Path, indices: tuple[int, ...], total: int, buffered: int) -> Iterator[Image.Image]:
    """The frames with these indices, decoded in one go up to the last of them; all in the size of the first.
    ``buffered``: frames that the caller keeps together."""
    with _opened(path) as (container, stream):
        index_set, size, done = set(indices), None, 0
        for done, frame in enumerate(_readable(path, container.decode(stream), total), start=1):
            if done - 1 not in index_set:
                continue
            if frame.width * frame.height * buffered > MAX_PIXELS:
                max_frames = MAX_PIXELS // (frame.width * frame.height)
                raise ValueError(
                    f"--video {path}: {buffered} frames of {frame.width} x {frame.height} pixels are too many to "
                    f"hold; take at most {max_frames} at a time"
                )
            alpha = any(component.is_alpha for component in frame.format.components)
            picture = upright(rgb(frame.to_ndarray(format="rgba")) if alpha else frame.to_image(), frame.rotation)
            size = size or picture.size
            yield picture if picture.size == size else picture.resize(size)
            if done > indices[-1]:
                return
        raise _damaged(path, done, total, "it ends early")


def upright(picture: Image.Image, rotation: int) -> Image.Image:
    """Turn counter-clockwise by the file's rotation, as phones write it: multiples of 90 degrees."""
    turns = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}
    turn = turns.get(rotation % 360)
    return picture if turn is None else picture.transpose(turn)


def _damaged(path: Path, readable: int, total: int, reason: str) -> ValueError:
    readable_part = f"{readable} of {total} frames" if total else f"{readable} frames"
    return ValueError(f"--video {path}: damaged or cut off, {readable_part} can be read ({reason})")


def _reason(error: Exception) -> str:
    """FFmpeg's words without the number and the path."""
    return str(getattr(error, "strerror", None) or error).split(":")[0]
