"""Names that ``duet-vlm-lab`` brings, the second distribution of this repository: where it is missing, an error says
how to install it."""

from __future__ import annotations

MODELS = ("tiny-chain", "tiny-page", "tiny-video", "tiny-long")
TASKS = ("tiny-crowded", *MODELS)
METHODS = ("custom", "oracle", "whole_frames")


def how_to_install(what: str, name: str) -> str:
    """The message for a ``what`` ("--model", "task", "method") that only the lab has."""
    return (
        f"{what} {name!r} is part of duet-vlm-lab, which is not installed: pip install -e lab in your clone of duet-vlm"
    )
