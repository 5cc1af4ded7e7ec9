"""Pictures of what was kept, merged and dropped; users of the public API only."""

from duet_vlm.viz.overlay import draw
from duet_vlm.viz.view import seen

__all__ = ["draw", "seen"]
