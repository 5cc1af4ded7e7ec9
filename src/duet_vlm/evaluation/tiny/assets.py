"""Draw the digit and word bitmaps that scenes are printed with, from our own stroke definitions.

``python -m duet_vlm.evaluation.tiny.assets`` writes ``assets.npz`` beside this file. Generation reads only that file,
so scenes do not depend on a font or on a data set, and every pixel is ours.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

FILE = Path(__file__).with_name("assets.npz")
WORDS = (
    "cafe",
    "bank",
    "hotel",
    "taxi",
    "park",
    "shop",
    "exit",
    "open",
    "sale",
    "milk",
    "book",
    "fish",
    "bread",
    "music",
    "pizza",
    "stop",
)
DIGIT_SIZE = 28  # pixels: two patches, so a digit always touches several patches
WORD_HEIGHT = 14
DIGIT_VARIANTS = 600  # per digit; the last TEST_SHARE of them is never seen in training
WORD_VARIANTS = 20
TEST_SHARE = 1 / 6
SCALE = 4  # drawn this much larger, then averaged down
LEVELS = 16  # grey levels kept: fewer compress better and look the same

Stroke = list[tuple[float, float]]


def arc(cx: float, cy: float, rx: float, ry: float, start: float, stop: float, n: int = 14) -> Stroke:
    """Points on an ellipse, angles in degrees, clockwise from the right (y points down)."""
    angles = np.radians(np.linspace(start, stop, n))
    return [(cx + rx * math.cos(a), cy + ry * math.sin(a)) for a in angles]


DIGITS: dict[int, list[list[Stroke]]] = {
    0: [[arc(0.5, 0.5, 0.36, 0.46, 0, 360, 24)], [arc(0.5, 0.5, 0.30, 0.46, -70, 290, 24)]],
    1: [
        [[(0.28, 0.24), (0.54, 0.04), (0.54, 0.96)]],
        [[(0.5, 0.04), (0.5, 0.96)]],
        [[(0.28, 0.22), (0.52, 0.04), (0.52, 0.96)], [(0.26, 0.96), (0.78, 0.96)]],
    ],
    2: [
        [arc(0.5, 0.3, 0.34, 0.26, 190, 400) + [(0.14, 0.95), (0.88, 0.95)]],
        [arc(0.48, 0.28, 0.33, 0.24, 200, 390) + [(0.45, 0.68), (0.14, 0.94), (0.5, 0.9), (0.9, 0.95)]],
    ],
    3: [
        [arc(0.46, 0.27, 0.32, 0.23, 200, 450), arc(0.46, 0.73, 0.37, 0.24, 270, 520)],
        [[(0.16, 0.05), (0.82, 0.05), (0.44, 0.42)] + arc(0.44, 0.69, 0.38, 0.27, 275, 520)],
    ],
    4: [
        [[(0.62, 0.04), (0.1, 0.68), (0.92, 0.68)], [(0.66, 0.4), (0.66, 0.97)]],
        [[(0.2, 0.05), (0.14, 0.54), (0.88, 0.54)], [(0.7, 0.12), (0.7, 0.97)]],
        [[(0.9, 0.68), (0.1, 0.68), (0.66, 0.04), (0.66, 0.97)]],
    ],
    5: [
        [[(0.82, 0.05), (0.24, 0.05), (0.2, 0.46)] + arc(0.46, 0.68, 0.37, 0.27, 235, 515)],
        [[(0.24, 0.05), (0.22, 0.44)] + arc(0.45, 0.68, 0.36, 0.27, 240, 510), [(0.24, 0.06), (0.82, 0.05)]],
    ],
    6: [
        [[(0.74, 0.04), (0.42, 0.2), (0.22, 0.44), (0.16, 0.68)] + arc(0.5, 0.7, 0.34, 0.26, 180, 540, 20)],
        [arc(0.56, 0.4, 0.42, 0.36, 290, 190) + arc(0.5, 0.7, 0.35, 0.25, 185, 545, 20)],
    ],
    7: [
        [[(0.12, 0.06), (0.88, 0.06), (0.4, 0.97)]],
        [[(0.12, 0.06), (0.88, 0.06), (0.44, 0.97)], [(0.32, 0.52), (0.82, 0.52)]],
        [[(0.14, 0.2), (0.14, 0.06), (0.86, 0.06), (0.56, 0.45), (0.42, 0.97)]],
    ],
    8: [
        [arc(0.5, 0.27, 0.28, 0.22, 90, 450, 20), arc(0.5, 0.73, 0.35, 0.24, -90, 270, 20)],
        [
            [(0.78, 0.14)]
            + arc(0.5, 0.27, 0.29, 0.22, -45, -250)
            + arc(0.5, 0.74, 0.34, 0.23, -70, 240)
            + [(0.78, 0.16)]
        ],
    ],
    9: [
        [arc(0.5, 0.3, 0.34, 0.26, 0, 360, 20) + [(0.82, 0.62), (0.66, 0.97)]],
        [arc(0.5, 0.3, 0.33, 0.25, 0, 360, 20) + [(0.84, 0.6)] + arc(0.5, 0.68, 0.33, 0.28, 10, 140)],
    ],
}

LETTERS: dict[str, list[Stroke]] = {
    "a": [[(0, 1), (0.5, 0), (1, 1)], [(0.2, 0.66), (0.8, 0.66)]],
    "b": [
        [(0.5, 0.46), (0, 0.46), (0, 0), (0.5, 0)]
        + arc(0.5, 0.23, 0.4, 0.23, -90, 90, 6)
        + arc(0.5, 0.73, 0.5, 0.27, -90, 90, 6)
        + [(0, 1), (0, 0.46)]
    ],
    "c": [arc(0.55, 0.5, 0.55, 0.5, -50, -310, 12)],
    "d": [[(0, 0), (0.4, 0)] + arc(0.4, 0.5, 0.6, 0.5, -90, 90, 8) + [(0, 1), (0, 0)]],
    "e": [[(0.95, 0), (0, 0), (0, 1), (0.95, 1)], [(0, 0.48), (0.75, 0.48)]],
    "f": [[(0.95, 0), (0, 0), (0, 1)], [(0, 0.48), (0.75, 0.48)]],
    "h": [[(0, 0), (0, 1)], [(1, 0), (1, 1)], [(0, 0.5), (1, 0.5)]],
    "i": [[(0.5, 0), (0.5, 1)], [(0.2, 0), (0.8, 0)], [(0.2, 1), (0.8, 1)]],
    "k": [[(0, 0), (0, 1)], [(0.95, 0), (0.05, 0.55)], [(0.35, 0.4), (1, 1)]],
    "l": [[(0, 0), (0, 1), (0.9, 1)]],
    "m": [[(0, 1), (0, 0), (0.5, 0.6), (1, 0), (1, 1)]],
    "n": [[(0, 1), (0, 0), (1, 1), (1, 0)]],
    "o": [arc(0.5, 0.5, 0.5, 0.5, 0, 360, 16)],
    "p": [[(0, 1), (0, 0), (0.55, 0)] + arc(0.55, 0.27, 0.42, 0.27, -90, 90, 8) + [(0, 0.54)]],
    "r": [[(0, 1), (0, 0), (0.55, 0)] + arc(0.55, 0.26, 0.42, 0.26, -90, 90, 8) + [(0, 0.52)], [(0.5, 0.52), (1, 1)]],
    "s": [arc(0.5, 0.25, 0.45, 0.25, -20, -250, 8) + arc(0.5, 0.74, 0.48, 0.26, -80, 160, 8)],
    "t": [[(0, 0), (1, 0)], [(0.5, 0), (0.5, 1)]],
    "u": [[(0, 0), (0, 0.7)] + arc(0.5, 0.65, 0.5, 0.35, 180, 0, 8) + [(1, 0)]],
    "x": [[(0, 0), (1, 1)], [(1, 0), (0, 1)]],
    "z": [[(0, 0), (1, 0), (0, 1), (1, 1)]],
}


def draw_strokes(strokes: list[np.ndarray], width: int, height: int, pen: float) -> np.ndarray:
    """Draw polylines with round ends and joints.

    Parameters
    ----------
    strokes : list of ndarray, each (points, 2)
        Coordinates in pixels.
    width, height : int
        Size of the picture.
    pen : float
        Width of the line in pixels.

    Returns
    -------
    ndarray, (height, width) uint8
    """
    image = Image.new("L", (width * SCALE, height * SCALE), 0)
    draw = ImageDraw.Draw(image)
    thick, r = max(1, round(pen * SCALE)), pen * SCALE / 2
    for points in strokes:
        xy = [(float(x), float(y)) for x, y in points * SCALE]
        draw.line(xy, fill=255, width=thick, joint="curve")
        for x, y in (xy[0], xy[-1]):
            draw.ellipse((x - r, y - r, x + r, y + r), fill=255)
    small = np.asarray(image.resize((width, height), Image.Resampling.BOX), np.float32)
    return (np.round(small / 255 * (LEVELS - 1)) * (255 / (LEVELS - 1))).astype(np.uint8)


def digit_glyph(digit: int, rng: np.random.Generator) -> np.ndarray:
    """One handwritten-looking digit, (28, 28) uint8: jittered points, slant, turn, aspect and pen width."""
    forms = DIGITS[digit]
    form = forms[int(rng.integers(len(forms)))]
    turn, slant = rng.normal(0, 0.07), rng.normal(0.06, 0.14)
    size = np.array([rng.uniform(11, 17), rng.uniform(18, 22)])
    matrix = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]]) @ np.array(
        [[1, -slant], [0, 1]]
    )
    bend = rng.normal(0, 0.035, (2, 2))  # one slow wave per axis, shared by the strokes: the form stays connected
    strokes = []
    for points in form:
        p = np.array(points) - 0.5
        p = (
            p
            + bend[0] * np.sin(np.pi * 2 * p[:, 1:])
            + bend[1] * np.cos(np.pi * 2 * p[:, :1])
            + rng.normal(0, 0.012, p.shape)
        )
        strokes.append((p @ matrix.T) * size)
    allp = np.concatenate(strokes)
    centre = (allp.min(0) + allp.max(0)) / 2
    shift = DIGIT_SIZE / 2 + rng.uniform(-1.2, 1.2, 2) - centre
    return draw_strokes([s + shift for s in strokes], DIGIT_SIZE, DIGIT_SIZE, rng.uniform(1.8, 3.6))


def word_width(word: str) -> int:
    """Width in pixels of a word's picture: a multiple of 7, so that it can be snapped like everything else."""
    return -(-(6 * len(word) + 2) // 7) * 7


def word_glyph(word: str, rng: np.random.Generator) -> np.ndarray:
    """One word in capitals, (14, width) uint8: jittered letters, slant, letter height and pen width."""
    width, slant = word_width(word), rng.normal(0, 0.08)
    height, letter = rng.uniform(8.0, 9.5), rng.uniform(3.6, 4.2)
    advance = (width - 2.5) / len(word) if rng.random() < 0.5 else 6.0
    left, top = (width - advance * len(word)) / 2 + (advance - letter) / 2, (WORD_HEIGHT - height) / 2
    strokes = []
    for i, name in enumerate(word):
        wobble = rng.normal(0, 0.25, 2)
        for points in LETTERS[name]:
            p = np.array(points) * (letter, height) + rng.normal(0, 0.12, (len(points), 2))
            p[:, 0] += slant * (height / 2 - p[:, 1])
            strokes.append(p + (left + i * advance, top) + wobble)
    return draw_strokes(strokes, width, WORD_HEIGHT, rng.uniform(1.1, 1.7))


def build(seed: int = 0) -> dict[str, np.ndarray]:
    """All bitmaps.

    Returns
    -------
    dict
        ``digits``: (10, DIGIT_VARIANTS, 28, 28) uint8; ``word_<name>``: (WORD_VARIANTS, 14, width) uint8.
    """
    rng = np.random.default_rng(seed)
    out = {"digits": np.stack([np.stack([digit_glyph(d, rng) for _ in range(DIGIT_VARIANTS)]) for d in range(10)])}
    for word in WORDS:
        out[f"word_{word}"] = np.stack([word_glyph(word, rng) for _ in range(WORD_VARIANTS)])
    return out


if __name__ == "__main__":
    np.savez_compressed(FILE, **build())
    print(f"wrote {FILE} ({FILE.stat().st_size / 1e6:.2f} MB)")
