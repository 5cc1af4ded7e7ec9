"""Merges stage by stage; groups have the same numbers in all pictures of a span."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from duet_vlm.planning.tokens import SpanTrace, StageTrace

MergeSources = Mapping[int, tuple[int, ...]]


def stages(trace: SpanTrace) -> Iterator[tuple[StageTrace, MergeSources]]:
    """The stages along the depth, a reduced tower first, with the merges of each."""
    if trace.tower is not None:
        yield trace.tower, {}
    for number, stage in enumerate(trace.stages):
        yield stage, stage.merged if number else trace.merged


def numbered(trace: SpanTrace) -> dict[int, int]:
    """A number for each token that others are merged into, in the order of the stages at which that begins."""
    numbers: dict[int, int] = {}
    for _, merged in stages(trace):
        for anchor in sorted(merged):
            numbers.setdefault(anchor, len(numbers))
    return numbers


def stage_name(layer: int) -> str:
    """A stage in words, by the layer after it: -1 in the tower, 0 before the decoder."""
    return {-1: "in the vision tower", 0: "at the entry to the decoder"}.get(layer, f"in front of layer {layer}")


def origins(trace: SpanTrace) -> str:
    """The groups that began at each stage, in a line; empty without merges."""
    known: set[int] = set()
    said = []
    for stage, merged in stages(trace):
        first, known = len(known) + 1, known.union(merged)
        if len(known) >= first:
            said.append(
                f"{first}-{len(known)} {stage_name(stage.layer)}"
                if len(known) > first
                else f"{first} {stage_name(stage.layer)}"
            )
    return f"groups by where their merging begins: {', '.join(said)}" if said else ""
