"""Pictures of what was kept, merged and dropped; users of the public API only."""

from duet_vlm.viz.overlay import draw, stack
from duet_vlm.viz.scores import Watched
from duet_vlm.viz.view import seen

__all__ = ["Watched", "draw", "seen", "stack"]
