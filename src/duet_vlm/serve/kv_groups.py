"""KV-cache groups of a decoder with stages: how many vLLM makes, and how many layers of memory they waste.

vLLM (0.32, ``_get_kv_cache_groups_uniform_page_size``) gives all groups the same number of layers: that of the smallest
stage, or of the largest where it is below 1.5 times the smallest. A stage that is no multiple of it ends in a group
with layers that nobody uses.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from duet_vlm.planning.budget import SpanPlan
from duet_vlm.serve.decoder_stages import DecoderStages

MOST_GROUPS = 8  # each costs tables in every step; more than this is told at the start
PICTURE, TEXT = 576, 64  # visual tokens of an image, and rows of text beside it, that are told about at the start
CLOSE = 1.5  # stages of sizes within this factor share the largest one's


@dataclass(frozen=True)
class KVGroups:
    """``count`` groups of ``layers`` layers each, ``padding`` of them unused."""

    count: int
    layers: int
    padding: int

    @classmethod
    def of(cls, stages: DecoderStages) -> KVGroups:
        """The groups that vLLM makes for these stages."""
        smallest, largest = min(stages.sizes), max(stages.sizes)
        layers = largest if largest < CLOSE * smallest else smallest
        count = sum(-(-size // layers) for size in stages.sizes)
        return cls(count, layers, count * layers - stages.depth)

    @property
    def good(self) -> bool:
        """True where no layer is wasted and the groups are few."""
        return not self.padding and self.count <= MOST_GROUPS


def prompts_held(
    stages: DecoderStages, plan: SpanPlan, blocks: int, block_size: int, text: int = TEXT
) -> tuple[float, float]:
    """Prompts with one image that a pool holds at once: with drops inside the decoder, and without them, if as many
    rows entered.

    Parameters
    ----------
    plan : SpanPlan
        Of the image.
    blocks, block_size : int
        Of the pool, and rows of a block. A block holds the keys and values of one group's layers.
    text : int
        Rows of the prompt that are no image.
    """
    groups = KVGroups.of(stages)
    needed = [-(-(text + visual) // block_size) for visual in stages.counts(plan)]
    together = sum(count * -(-size // groups.layers) for count, size in zip(needed, stages.sizes, strict=True))
    return blocks / together, blocks * groups.layers / (needed[0] * stages.depth)


def nearest_good(stages: DecoderStages) -> DecoderStages | None:
    """The stages with good groups whose drops are moved least (in layers, added up); of equals those with fewer groups,
    then later drops.

    None where no such stages with as many drops exist, as in a decoder of a prime number of layers.
    """
    tried: set[tuple[int, int, tuple[int, ...]]] = set()
    depth, drops = stages.depth, len(stages.starts)
    for unit in (
        n for n in range(1, depth + 1) if depth % n == 0 and depth // n <= MOST_GROUPS
    ):  # stages are multiples of one size
        for starts in itertools.combinations(range(unit, depth, unit), drops):
            groups = KVGroups.of(DecoderStages(depth, starts))
            if groups.good:
                moved = sum(abs(a - b) for a, b in zip(starts, stages.starts, strict=True))
                tried.add((moved, groups.count, tuple(-start for start in starts)))
    return DecoderStages(depth, tuple(-start for start in min(tried)[2])) if tried else None


def describe(stages: DecoderStages) -> str:
    """The stages and their groups in a sentence, with the nearest good schedule where these waste memory."""
    groups = KVGroups.of(stages)
    lines = (
        f"rows leave before decoder layers {', '.join(map(str, stages.starts)) or 'none'} of {stages.depth}; "
        f"{groups.count} KV-cache groups of {groups.layers} layers"
    )
    if groups.good:
        return lines
    better = nearest_good(stages)
    remedy = "" if better is None else f"; drops before {', '.join(map(str, better.starts))} would waste nothing"
    return f"{lines}, {groups.padding} of them padding that holds memory for nobody{remedy}"


def describe_plan(stages: DecoderStages, plan: SpanPlan) -> str:
    """The rows of an image in each stage, in a sentence."""
    entered, *later = stages.counts(plan)
    left = "".join(f", {count} from layer {start} on" for start, count in zip(stages.starts, later, strict=True))
    return f"an image of {plan.tokens} visual tokens: {entered} enter{left}; a mean of {plan.mean:.4g} over the layers"


def describe_pool(stages: DecoderStages, plan: SpanPlan, blocks: int, block_size: int) -> str:
    """The prompts that a pool holds with and without drops, in a sentence."""
    inside, without = prompts_held(stages, plan, blocks, block_size)
    return (
        f"the KV cache has {blocks} blocks of {block_size} rows and holds {inside:.1f} prompts of {TEXT} rows of text and an image of {plan.tokens} "
        f"visual tokens, and would hold {without:.1f} if the {plan.entry} that enter stayed to the end"
    )
