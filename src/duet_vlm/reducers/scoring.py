"""Rules by which the scores of a method are made."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ScoringRules:
    """Rules by which the runtime makes the signals and scores of a method. The defaults are what papers describe;
    another value reproduces the code of one.

    Attributes
    ----------
    signal_segments : bool
        Attention is summed within the tower's own segments (images, frames, windows); False: over all of a call.
    signal_heads : str
        Attention of "each" head, added up; "one": all heads side by side as a single wide one.
    score_heads : str
        The heads of ``Input.SCORES``: their "mean", their "max", the "most" of any head and query, or "each".
    score_mask : str
        "causal": a text query sees what precedes it; "none": every token.
    score_positions : str
        "as_is"; "divided": attention divided by what positions alone would give.
    probe : str
        Layer behind which ``Input.GRADIENT`` is taken: the "next"; "last": the one before once more, with the input
        embeddings in place of the head.
    """

    signal_segments: bool = True
    signal_heads: str = "each"
    score_heads: str = "mean"
    score_mask: str = "causal"
    score_positions: str = "as_is"
    probe: str = "next"
