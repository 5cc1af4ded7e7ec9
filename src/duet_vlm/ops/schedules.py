"""When visual tokens leave inside the decoder: before which layer, and the share of those that entered which goes on. Plain numbers, no tensors."""

from __future__ import annotations

Drops = tuple[tuple[int, float], ...]  # a schedule of shares (``duet_vlm.planning.budget.Schedule``)

LATE, EARLY = (8, 16, 24), (2, 8, 16)  # of 32 layers: PyramidDrop's stages, and its authors' answer for small budgets
LATE_SHARE, EARLY_SHARE = 0.5, 0.56  # kept per stage in the paper (a mean of 270 of 576 tokens), and early for a mean of 192
AMPLE, LEAN = 0.14, 0.1  # of a picture: from here on a budget needs no drops; below, they come earlier the less it is


def paper_schedule(depth: int) -> Drops:
    """DUET-VLM's: half of the entering tokens from half of the depth on, none from three quarters on ([16, 24] of 32 layers in the paper)."""
    return tuple({depth // 2: 0.5, 3 * depth // 4: 0.0}.items())


def pyramid(depth: int, layers: tuple[int, ...] = LATE, share: float = LATE_SHARE) -> Drops:
    """PyramidDrop's: stages at ``layers``/32 of the depth (never before layer 1), keeping share, share^2, share^3."""
    stages: dict[int, float] = {}
    for power, layer in enumerate(layers, start=1):
        stages[max(1, layer * depth // 32)] = share**power
    return tuple(stages.items())


def halfway(depth: int) -> Drops:
    """VScan's: a third stays from the middle of the decoder on (layer 16 of 32)."""
    return ((max(1, depth // 2), 1 / 3),)


def tapered_schedule(depth: int, share: float | None = None) -> Drops:
    """DUET+'s, by the ``share`` of its tokens that a budget leaves a picture: no drops where that is ample; DUET's (half of what entered from half of
    the depth on, none from three quarters on); below ``LEAN`` less from a quarter on, and half of that.

    What a question needs must enter, and what it needs late must not be dropped early: with few tokens the first counts more, with many the second.
    Chosen on validation questions of both embedded tasks (docs/comparison.md).
    """
    if share is not None and share >= AMPLE:
        return ()
    early = min(1.0, (LEAN if share is None else share) / LEAN)
    return tuple({max(1, depth // 4): early, max(1, depth // 2): early / 2, max(1, 3 * depth // 4): 0.0}.items())
