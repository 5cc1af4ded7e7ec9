"""Images as models take them, whatever their source: upright, RGB, eight bits per channel."""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 64_000_000  # larger pictures are refused before they are decoded
ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/|data:")
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # of an array, by its channels
# endings that no picture has
CLIPS = {".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".3gp"}
OVERSHOOT = 0.125  # of the range: resampling leaves floats a little outside of it


def rgb(picture: Image.Image | np.ndarray) -> Image.Image:
    """Convert an image of any mode, or an array, to RGB with eight bits per channel; not turned (``open_image`` turns).

    Transparent parts are put on white. Numbers are scaled by the range of their type: bool, 8 and 16 bits have one; of
    wider integers and of floats the smallest of 0..1 (floats only), 0..255, 0..65535 and (integers only) 0..the type's
    largest that holds them all is taken. 32-bit integers from a file have 16 bits at least.

    Parameters
    ----------
    picture : PIL.Image.Image or array
        An array is [height, width], [height, width, channels] or [channels, height, width] with 1 (grey), 2 (grey,
        alpha), 3 (RGB) or 4 (RGBA) channels; channels last where both could be meant.

    Raises
    ------
    ValueError
        An array of another shape or without pixels, or numbers outside of every range (negative, NaN, Inf).
    """
    if not isinstance(picture, Image.Image):
        picture = _of_array(np.asarray(picture))
    elif picture.mode.startswith(("I", "F")):
        picture = _of_grey(picture)
    if "transparency" in picture.info or picture.mode[-1] in "Aa":
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))
    return picture.convert("RGB")


def eight_bits(values: np.ndarray, least: int = 0) -> np.ndarray:
    """Numbers of any type scaled to 0..255, as in ``rgb``; ``least``: lower bound of white, for wide integers."""
    if values.dtype == np.uint8:
        return values
    white = _white(values, least)
    return np.rint(values.astype(np.float32).clip(0, white) * (255 / white)).astype(np.uint8)


def local(path: Path | str, lead: str = "--image ") -> Path:
    """A file's path; addresses on the net are refused.

    Raises
    ------
    ValueError
        ``path`` is an address (https://..., data:...); ``lead`` and the address come first.
    """
    if ADDRESS.match(str(path)):
        address = re.sub(r":/+", "://", str(path), count=1)[:100]  # a Path keeps one slash of two
        raise ValueError(
            f"{lead}{address}: a URL is not opened, as nothing is downloaded unless a hub id is named: download the "
            "file and give its path"
        )
    return Path(path)


def open_image(path: Path) -> Image.Image:
    """An upright RGB image from a file (see ``rgb``), the first one of several with a warning.

    Raises
    ------
    ValueError
        With the path and the fault: an address, missing, a folder, empty, no image, damaged, cut off or huge.
    """
    path = local(path)
    if not os.path.isfile(path):
        raise ValueError(f"--image {path}: {'is a folder' if os.path.isdir(path) else 'no such file'}")
    if not os.path.getsize(path):
        raise ValueError(f"--image {path}: the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Pillow thinks of the file
            with Image.open(path) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
                # MPO: more versions of one photograph
                count = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
                image.load()
                with contextlib.suppress(Exception):  # a broken EXIF block says nothing, and the pixels are there
                    ImageOps.exif_transpose(image, in_place=True)
                picture = rgb(image)
    except Image.DecompressionBombError as error:
        size = str(error).split(",")[0]  # Pillow goes on about attacks
        raise ValueError(
            f"--image {path}: {size}; at most {MAX_PIXELS / 1e6:.0f} million pixels are read. Make it smaller first"
        ) from None
    except UnidentifiedImageError:
        clip = "; clips are given to --video" if path.suffix.lower() in CLIPS else ""
        raise ValueError(f"--image {path}: not an image that can be read{clip}") from None
    except Exception as error:  # decoders of damaged files raise all kinds
        raise ValueError(
            f"--image {path}: the file is damaged or cannot be read ({' '.join(str(error).split())})"
        ) from error
    if count > 1:
        warnings.warn(f"{path}: shows {count} pictures one after the other, the first is taken", stacklevel=2)
    return picture


def is_picture(path: Path) -> bool:
    """True if the head of a file is that of an image; nothing of it is decoded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Image.open(path).close()
    except Exception:  # as in ``open_image``
        return False
    return True


def _of_array(values: np.ndarray) -> Image.Image:
    channels_last = values[..., None] if values.ndim == 2 else values
    if channels_last.ndim == 3 and channels_last.shape[-1] not in MODES:
        channels_last = np.moveaxis(channels_last, 0, -1)
    if channels_last.ndim != 3 or channels_last.shape[-1] not in MODES or not channels_last.size:
        raise ValueError(
            f"an array of shape {values.shape} is no picture: give [height, width], [height, width, channels] or "
            "[channels, height, width], "
            "with 1 to 4 channels"
        )
    eight = np.ascontiguousarray(eight_bits(channels_last))
    return Image.fromarray(eight[..., 0] if channels_last.shape[-1] == 1 else eight)


def _of_grey(picture: Image.Image) -> Image.Image:
    """Convert images of one channel with more than eight bits; the grey that a file calls transparent becomes white."""
    values = np.asarray(picture)
    eight = eight_bits(values, least=65535 if picture.format else 0)
    if "transparency" in picture.info:
        eight = np.where(values == picture.info["transparency"], np.uint8(255), eight)
    return Image.fromarray(eight)


def _white(values: np.ndarray, least: int) -> int:
    """The number that means white."""
    kind: Any = values.dtype
    if kind.kind == "b":
        return 1
    if kind.kind == "u" and kind.itemsize <= 2:
        return int(np.iinfo(kind).max)
    low, high = float(values.min()), float(values.max())
    if kind.kind == "f":
        tops, slack = [1, 255, 65535], OVERSHOOT
    else:
        largest, slack = int(np.iinfo(kind).max), 0.0
        tops = [top for top in sorted({min(255, largest), min(65535, largest), largest}) if top >= least]
    for top in tops:
        if -slack * max(1, high) <= low and high <= (1 + slack) * top:
            return top
    ranges = ", ".join(f"0..{top}" for top in tops)
    raise ValueError(
        f"pixels from {low:g} to {high:g} ({kind}) are in none of the ranges that are read ({ranges}): scale them first"
    )
