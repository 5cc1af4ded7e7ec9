"""Pictures of what was kept, merged and dropped; users of the public API only."""

from duet_vlm.viz.clips import film, film_place, on_film
from duet_vlm.viz.depth import Fates, at_depth, fates, history, told
from duet_vlm.viz.overlay import Panel, draw, stack
from duet_vlm.viz.scores import Watched
from duet_vlm.viz.view import seen, seen_frames, seen_parts, seen_picture

__all__ = [
    "Fates",
    "Panel",
    "Watched",
    "at_depth",
    "draw",
    "fates",
    "film",
    "film_place",
    "history",
    "on_film",
    "seen",
    "seen_frames",
    "seen_parts",
    "seen_picture",
    "stack",
    "told",
]
