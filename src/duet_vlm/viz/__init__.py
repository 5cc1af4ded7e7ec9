"""Drawings of the kept, merged and dropped tokens; uses the public API only."""

from duet_vlm.viz.depth import TokenFates, at_depth, history, token_fates, told
from duet_vlm.viz.overlay import Panel, draw, stack
from duet_vlm.viz.scores import ScoreRecorder
from duet_vlm.viz.video import film, film_place, on_film
from duet_vlm.viz.view import cropped_picture, frame_pictures, model_view, part_pictures

__all__ = [
    "TokenFates",
    "Panel",
    "ScoreRecorder",
    "at_depth",
    "draw",
    "token_fates",
    "film",
    "film_place",
    "history",
    "on_film",
    "model_view",
    "frame_pictures",
    "part_pictures",
    "cropped_picture",
    "stack",
    "told",
]
