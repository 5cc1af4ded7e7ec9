"""LLaVA-NeXT tiles: the order of the tokens of several tiles."""

from __future__ import annotations

import math

from mosaic import mosaic_order

from golden_runner.case import Case


def check(case: Case) -> None:
    config = case.config
    rows, keep = case.given("tile_features"), case.given("keep_indices_with_cls")
    patches = keep[:, 1:].sort(1).values - 1  # rows lie in patch order, the recorded indices in score order
    contextual = rows.shape[1] - keep.shape[1]
    for run in case.runs:
        if "error" in case.runs[run]:
            with case.official_error(run):
                mosaic_order(patches, contextual, config["tiles_wide"], math.isqrt(config["patches_per_tile"]))
            continue
        order = mosaic_order(patches, contextual, config["tiles_wide"], math.isqrt(config["patches_per_tile"]))
        case.close(run, "features", rows.flatten(0, 1)[order])
