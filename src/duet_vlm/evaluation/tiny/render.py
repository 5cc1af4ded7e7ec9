"""Layout -> picture."""

from __future__ import annotations

import functools
import math

import numpy as np
from PIL import Image, ImageDraw

from duet_vlm.evaluation.tiny.assets import WORDS
from duet_vlm.evaluation.tiny.backgrounds import window
from duet_vlm.evaluation.tiny.scenes import COLORS, IMAGE_SIZE, SHAPES, Scene, SceneObject, Tag, glyphs

_COLOR_TABLE = np.array(list(COLORS.values()), np.float32)


def _outline(name: str, n: int) -> list[tuple[float, float]]:
    """Corner points of the straight-edged shapes in an n x n box."""
    c, r = n / 2, n / 2 - 1

    def radial(radii: list[float]) -> list[tuple[float, float]]:
        turns = [2 * math.pi * i / len(radii) for i in range(len(radii))]
        return [(c + q * math.sin(t), c - q * math.cos(t)) for t, q in zip(turns, radii, strict=True)]

    a, b = n * 0.34, n * 0.66
    return {
        "square": [(n * 0.06, n * 0.06), (n * 0.94, n * 0.06), (n * 0.94, n * 0.94), (n * 0.06, n * 0.94)],
        "triangle": radial([r] * 3),
        "diamond": [(c, 1), (n * 0.82, c), (c, n - 1), (n * 0.18, c)],
        "star": radial([r, r * 0.42] * 5),
        "cross": [
            (a, 1),
            (b, 1),
            (b, a),
            (n - 1, a),
            (n - 1, b),
            (b, b),
            (b, n - 1),
            (a, n - 1),
            (a, b),
            (1, b),
            (1, a),
            (a, a),
        ],
        "arrow": [(1, n * 0.36), (c, n * 0.36), (c, n * 0.1), (n - 1, c), (c, n * 0.9), (c, n * 0.64), (1, n * 0.64)],
    }[name]


@functools.cache
def shape_mask(shape: int, size: int) -> np.ndarray:
    """Coverage of a shape, (size, size) float32 in 0..1."""
    name, n = SHAPES[shape], size * 4
    image = Image.new("L", (n, n), 0)
    draw = ImageDraw.Draw(image)
    if name in ("circle", "ring", "moon"):
        draw.ellipse((2, 2, n - 2, n - 2), fill=255)
        if name == "ring":
            draw.ellipse((n * 0.27, n * 0.27, n * 0.73, n * 0.73), fill=0)
        elif name == "moon":
            draw.ellipse((n * 0.34, -n * 0.06, n * 1.2, n * 0.8), fill=0)
    elif name == "heart":
        draw.ellipse((2, n * 0.06, n * 0.53, n * 0.57), fill=255)
        draw.ellipse((n * 0.47, n * 0.06, n - 2, n * 0.57), fill=255)
        draw.polygon([(n * 0.05, n * 0.42), (n * 0.95, n * 0.42), (n * 0.5, n * 0.97)], fill=255)
    else:
        draw.polygon(_outline(name, n), fill=255)
    return np.asarray(image.resize((size, size), Image.Resampling.BOX), np.float32) / 255


def tag_mask(tag: Tag) -> np.ndarray:
    """Ink of a tag, (height, width) float32 in 0..1."""
    bitmaps = glyphs()["digits"][tag.value] if tag.kind == "digit" else glyphs()[f"word_{WORDS[tag.value]}"]
    return bitmaps[tag.variant].astype(np.float32) / 255


def _draw_thing(image: np.ndarray, thing: SceneObject, plain: float, rng: np.random.Generator) -> None:
    s = thing.size
    view = image[thing.y : thing.y + s, thing.x : thing.x + s]
    mask = shape_mask(thing.shape, s)[..., None]
    color = _COLOR_TABLE[thing.color] * np.float32(rng.uniform(0.85, 1.08)) + rng.normal(0, 8, 3).astype(np.float32)
    grain = rng.standard_normal((s, s, 1), np.float32) * np.float32(10 * (1 - plain))
    view += mask * (color + grain - view)


def _draw_tag(image: np.ndarray, tag: Tag, plain: float, rng: np.random.Generator) -> None:
    view = image[tag.y : tag.y + tag.height, tag.x : tag.x + tag.width]
    dark_ink = rng.random() < 0.5 * (1 - plain)
    ink, paper = (
        (rng.uniform(0, 60), rng.uniform(180, 255)) if dark_ink else (rng.uniform(190, 255), rng.uniform(0, 70))
    )
    mask = tag_mask(tag)[..., None]
    tint = rng.normal(0, 5, 3).astype(np.float32)
    view *= np.float32(0.12)
    view += np.float32(0.88) * (np.float32(paper) + mask * np.float32(ink - paper) + tint)


def render(scene: Scene, plain: float = 0.0) -> np.ndarray:
    """Draw a scene.

    Parameters
    ----------
    scene : Scene
    plain : float
        0 full clutter, 1 dark background and clean colours (the first lessons of training).

    Returns
    -------
    ndarray, (224, 224, 3) uint8
    """
    rng = scene.generator(1)
    image = window(scene.split, IMAGE_SIZE, rng)
    if plain:
        image = image * np.float32(1 - plain) + np.float32(35 * plain)
    for thing in scene.things:
        _draw_thing(image, thing, plain, rng)
        if thing.tag:
            _draw_tag(image, thing.tag, plain, rng)
    return image.clip(0, 255).astype(np.uint8)
