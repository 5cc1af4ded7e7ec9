"""The image as the model sees it: some processors cut the middle out of an image, and the token grid covers that
cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from duet_vlm.inputs.images import rgb


def model_view(image: Image.Image, pixels: Any, processor: Any) -> Image.Image:
    """The part of ``image`` that the tokens cover.

    Parameters
    ----------
    image : PIL.Image.Image
        As the user gave it.
    pixels : Tensor
        [3, H, W] of this image in ``pixel_values``; other shapes (packed patches) mean that the processor only resized
        it.
    processor : object
        The model's processor (or image processor): its mean and standard deviation are undone.
    """
    settings = getattr(processor, "image_processor", processor)
    if getattr(pixels, "ndim", 0) != 3 or not getattr(settings, "do_center_crop", False):
        return rgb(image)
    return _picture(pixels, settings)


def cropped_picture(image: Image.Image, inputs: Any, number: int, processor: Any) -> Image.Image:
    """Image ``number`` of a one-sample call as ``model_view``."""
    pixels = _pixels(inputs)
    return model_view(image, pixels[number] if pixels.ndim == 4 else None, processor)


def part_pictures(inputs: Any, processor: Any, count: int) -> list[Image.Image]:
    """The ``count`` crops of a processor that returns tiles one by one; none where it made another number."""
    pixels = _pixels(inputs)
    tiles = pixels.flatten(0, -4) if pixels.ndim > 3 else pixels[:0]
    return (
        [_picture(tile, getattr(processor, "image_processor", processor)) for tile in tiles]
        if len(tiles) == count
        else []
    )


def frame_pictures(
    frames: Sequence[Image.Image], inputs: Any, number: int, processor: Any
) -> tuple[list[Image.Image], int]:
    """The frames of video ``number`` of a one-sample call as ``model_view``, and the number of the model's time
    steps."""
    pixels, grids = inputs["pixel_values_videos"], inputs.get("video_grid_thw")
    pictures = [
        model_view(frame, pixels[number, i] if pixels.ndim == 5 else None, processor) for i, frame in enumerate(frames)
    ]
    return pictures, len(pictures) if grids is None else int(grids[number, 0])


def _pixels(inputs: Any) -> Any:
    return inputs["pixel_values" if "pixel_values" in inputs else "pixel_values_images"]  # Video-LLaVA's own name


def _picture(pixels: Any, settings: Any) -> Image.Image:
    """Pixels [3, H, W] as the processor's settings made them, as a picture again."""
    values = pixels.detach().float().cpu().numpy().transpose(1, 2, 0)
    if getattr(settings, "do_normalize", False):
        values = values * np.asarray(settings.image_std) + np.asarray(settings.image_mean)
    return Image.fromarray(np.clip(np.rint(values * 255), 0, 255).astype(np.uint8))
