"""Layout -> what every patch shows. Used for training, for the needed patches of a question and for the oracle
selection."""

from __future__ import annotations

import numpy as np

from duet_vlm.evaluation.tiny.assets import WORDS
from duet_vlm.evaluation.tiny.render import shape_mask
from duet_vlm.evaluation.tiny.scenes import COLOR_NAMES, GRID, PATCH, SHAPES, SIZES, Scene, SceneObject

# Classes per label; 0 means none. Kinds: 1 thing, 2 centre of a thing, 3 digit, 4 word.
LABELS = {"kind": 5, "shape": 11, "color": 9, "digit": 11, "word": len(WORDS) + 1, "size": 5}
PRESENCE = 80 + 10 + 8 + 10 + len(WORDS)  # colour-shape pairs, shapes, colours, digits, words
SHOWN = 0.15  # a patch shows a thing when the thing covers this share of it


def coverage(x: int, y: int, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Share of each touched patch that a mask at pixel (x, y) covers.

    Returns
    -------
    patches : ndarray (n,) int
        Patch numbers, row by row.
    share : ndarray (n,) float32
    """
    h, w = mask.shape
    r0, r1, c0, c1 = y // PATCH, (y + h - 1) // PATCH + 1, x // PATCH, (x + w - 1) // PATCH + 1
    pad = np.zeros(((r1 - r0) * PATCH, (c1 - c0) * PATCH), np.float32)
    pad[y - r0 * PATCH : y - r0 * PATCH + h, x - c0 * PATCH : x - c0 * PATCH + w] = mask
    share = pad.reshape(r1 - r0, PATCH, c1 - c0, PATCH).mean((1, 3))
    patches = np.arange(r0, r1)[:, None] * GRID + np.arange(c0, c1)
    return patches.ravel(), share.ravel()


def center_patch(thing: SceneObject) -> int:
    """The patch under the middle of a thing."""
    x, y = thing.center
    return int(y // PATCH) * GRID + int(x // PATCH)


def body_patches(thing: SceneObject) -> np.ndarray:
    """Patches that show the shape, (256,) bool."""
    out = np.zeros(GRID * GRID, bool)
    patches, share = coverage(thing.x, thing.y, shape_mask(thing.shape, thing.size))
    out[patches[share > SHOWN]] = True
    out[center_patch(thing)] = True
    return out


def tag_patches(thing: SceneObject) -> np.ndarray:
    """Patches that show the tag of a thing, (256,) bool; empty without a tag."""
    out = np.zeros(GRID * GRID, bool)
    if thing.tag:
        patches, share = coverage(thing.tag.x, thing.tag.y, np.ones((thing.tag.height, thing.tag.width), np.float32))
        out[patches[share > SHOWN]] = True
    return out


def patch_labels(scene: Scene) -> np.ndarray:
    """Labels of every patch, (256, 6) int64 in the order of ``LABELS``.

    The patches of a tag carry the shape and colour of the thing they belong to: "this 7 hangs on the star". Where two
    things share a patch, the larger share wins; the centre of a thing always wins.
    """
    out = np.zeros((GRID * GRID, len(LABELS)), np.int64)
    best = np.full(GRID * GRID, SHOWN, np.float32)
    for t in scene.things:
        size = SIZES.index(t.size) + 1
        patches, share = coverage(t.x, t.y, shape_mask(t.shape, t.size))
        win = patches[share > best[patches]]
        out[win] = (1, t.shape + 1, t.color + 1, 0, 0, size)
        best[patches] = np.maximum(best[patches], share)
        if t.tag:
            patches, share = coverage(t.tag.x, t.tag.y, np.ones((t.tag.height, t.tag.width), np.float32))
            win = patches[share > best[patches]]
            value = t.tag.value + 1
            out[win] = (
                (3, t.shape + 1, t.color + 1, value, 0, 0)
                if t.tag.kind == "digit"
                else (4, t.shape + 1, t.color + 1, 0, value, 0)
            )
            best[patches] = np.maximum(best[patches], share)
    for t in scene.things:
        out[center_patch(t)] = (2, t.shape + 1, t.color + 1, 0, 0, SIZES.index(t.size) + 1)
    return out


def presence(scene: Scene) -> np.ndarray:
    """Presence of every kind of thing on the picture, (PRESENCE,) float32 of 0 and 1."""
    out = np.zeros(PRESENCE, np.float32)
    base = len(SHAPES) * len(COLOR_NAMES)
    for t in scene.things:
        out[[t.shape * len(COLOR_NAMES) + t.color, base + t.shape, base + 10 + t.color]] = 1
        if t.tag:
            out[base + (18 if t.tag.kind == "digit" else 28) + t.tag.value] = 1
    return out
