"""Cluttered background fields: smooth colour noise with muted strokes, blobs, arcs and fake text.

Drawn once per process from fixed seeds. The test stream has fields of its own.
"""

from __future__ import annotations

import functools

import numpy as np
from PIL import Image, ImageDraw

FIELD = 288  # pixels; a scene takes a random 224 x 224 window
FIELDS = {"train": 128, "validation": 128, "test": 32}
SEEDS = {"train": 7001, "validation": 7001, "test": 7002}


def _noise(rng: np.random.Generator, falloff: float) -> np.ndarray:
    """Value noise, (FIELD, FIELD) float32 with mean 0 and deviation 1: octaves of random grids, coarse ones louder."""
    total = np.zeros((FIELD, FIELD), np.float32)
    for cells in (3, 6, 12, 24, 48, 96, 288):
        grid = Image.fromarray(rng.integers(0, 256, (cells, cells)).astype(np.uint8))
        layer = np.asarray(grid.resize((FIELD, FIELD), Image.Resampling.BICUBIC), np.float32) - 127.5
        total += layer * np.float32((3 / cells) ** falloff)
    return (total - total.mean()) / total.std()


def _clutter(draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    """One stroke, blob, arc or row of ticks in a muted colour."""
    grey, form = rng.uniform(30, 220), int(rng.integers(4))
    color = tuple(int(v) for v in np.clip(grey + rng.normal(0, 22, 3), 0, 255))
    x, y = rng.uniform(0, FIELD, 2)
    if form == 0:
        draw.line([(x, y), (x + rng.normal(0, 60), y + rng.normal(0, 60))], fill=color, width=int(rng.integers(1, 4)))
    elif form == 1:
        draw.polygon([(x + rng.normal(0, 14), y + rng.normal(0, 14)) for _ in range(5)], fill=color)
    elif form == 2:
        draw.arc((x, y, x + rng.uniform(8, 50), y + rng.uniform(8, 50)), 0, rng.uniform(60, 300), fill=color, width=2)
    else:
        for i in range(int(rng.integers(3, 7))):
            draw.line([(x + i * 6, y), (x + i * 6 + rng.normal(0, 3), y + rng.uniform(3, 9))], fill=color, width=2)


def _field(rng: np.random.Generator) -> np.ndarray:
    base, mean = _noise(rng, rng.uniform(0.5, 1.2)), rng.uniform(60, 190)
    channels = []
    for _ in range(3):
        gain, offset = rng.uniform(14, 34), rng.normal(0, 18)
        channels.append(mean + offset + gain * (0.75 * base + 0.4 * _noise(rng, 0.7)))
    image = Image.fromarray(np.stack(channels, -1).clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(15, 50))):
        _clutter(draw, rng)
    return np.asarray(image)


@functools.cache
def _fields(seed: int, n: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([_field(rng) for _ in range(n)])


def fields(split: str) -> np.ndarray:
    """All fields of a split, (n, FIELD, FIELD, 3) uint8; training and validation share theirs, test has its own."""
    return _fields(SEEDS[split], FIELDS[split])


def window(split: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """A random window, mirrored at random, brighter or darker, (size, size, 3) float32."""
    all_fields = fields(split)
    field = all_fields[int(rng.integers(len(all_fields)))]
    dy, dx = rng.integers(0, FIELD - size, 2)
    view = field[dy : dy + size, dx : dx + size]
    if rng.random() < 0.5:
        view = view[:, ::-1]
    if rng.random() < 0.5:
        view = view[::-1]
    return view.astype(np.float32) * np.float32(rng.uniform(0.8, 1.2))
