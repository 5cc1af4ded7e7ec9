"""Drop schedules inside the decoder: (layer, share of the entering tokens kept from there on). Plain numbers, no
tensors.
"""

from __future__ import annotations

Drops = tuple[tuple[int, float], ...]  # a schedule of shares (``duet_vlm.planning.budget.Schedule``)

LATE, EARLY = (8, 16, 24), (2, 8, 16)  # of 32 layers: PyramidDrop's stages, and its authors' answer for small budgets
# kept per stage in the paper (a mean of 270 of 576 tokens), and early for a mean of 192
LATE_SHARE, EARLY_SHARE = 0.5, 0.56
AWAKE, SCARCE = 0.05, 0.06  # of the entering tokens awake in later layers; of a picture: below, more in more layers
AMPLE, LEAN = 0.14, 0.1  # of a picture: from here on a budget needs no drops; below, they come earlier the less it is


def duet_schedule(depth: int) -> Drops:
    """DUET-VLM's schedule: half of the entering tokens from half of the depth on, none from three quarters on.

    That is [16, 24] of 32 layers in the paper.
    """
    return tuple({depth // 2: 0.5, 3 * depth // 4: 0.0}.items())


def pyramid(depth: int, layers: tuple[int, ...] = LATE, share: float = LATE_SHARE) -> Drops:
    """PyramidDrop's schedule: stages at ``layers``/32 of the depth (never before layer 1), keeping share, share^2,
    share^3.
    """
    stages: dict[int, float] = {}
    for power, layer in enumerate(layers, start=1):
        stages[max(1, layer * depth // 32)] = share**power
    return tuple(stages.items())


def halfway(depth: int) -> Drops:
    """VScan's schedule: a third is kept from the middle of the decoder on (layer 16 of 32)."""
    return ((max(1, depth // 2), 1 / 3),)


def tapered_schedule(depth: int, share: float | None = None) -> Drops:
    """DUET+'s schedule, by the share of its tokens that a budget allows an image.

    No drops from ``AMPLE`` on; DUET's (half of the entering tokens from half of the depth on, none from three quarters
    on) from ``LEAN`` on; below ``LEAN``, fewer tokens from a quarter of the depth on, and half of that from the middle
    on. Chosen on validation questions of both embedded tasks (docs/comparison.md): tokens that the question needs must
    enter, and tokens needed late must not be dropped early; with few tokens the first counts more, with many the
    second.

    Parameters
    ----------
    depth : int
        Decoder layers.
    share : float, optional
        Share of the image's tokens, in [0, 1]; None: DUET's schedule.
    """
    if share is not None and share >= AMPLE:
        return ()
    early = min(1.0, (LEAN if share is None else share) / LEAN)
    return tuple({max(1, depth // 4): early, max(1, depth // 2): early / 2, max(1, 3 * depth // 4): 0.0}.items())


def awake_schedule(depth: int, share: float | None = None) -> Drops:
    """DUET+'s schedule with re-entry, by the share of its tokens that a budget allows an image.

    A third of the layers reads all that entered, each later one a twentieth; below ``SCARCE`` the first layer alone
    reads all and the later ones a tenth, so that more can enter. Chosen on validation questions of ``tiny-chain``,
    ``tiny-crowded`` and ``tiny-page`` (docs/reentry.md): the first layers gather from all, so that sleeping tokens are
    chosen by a text that has seen them.

    Parameters
    ----------
    depth : int
        Decoder layers; a single one keeps all.
    share : float, optional
        Share of the image's tokens, in [0, 1]; None: as for a large one.
    """
    if depth == 1:
        return ()
    if share is not None and share < SCARCE:
        return ((1, 2 * AWAKE),)
    return ((max(1, depth // 3), AWAKE),)
