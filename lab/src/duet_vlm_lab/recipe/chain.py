"""``tiny-chain`` learns from answers alone: no attention targets, no probes, no blinding, no counting head, at any
time.

The tower is the shipped one and stays as it is. The projector starts as a fit from what the tower sees to the words for
it; from there on projector and decoder learn from the cross-entropy of answers and nothing else. What makes this
feasible is the order of the lessons.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import CLIPVisionModel
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from duet_vlm.evaluation.tiny import load
from duet_vlm.evaluation.tiny.labels import patch_labels
from duet_vlm.evaluation.tiny.network import FEATURE_LAYER, VISUAL_TOKENS
from duet_vlm.evaluation.tiny.render import render
from duet_vlm.evaluation.tiny.scenes import GRID
from duet_vlm_lab.generators.chain_questions import KINDS, PAIRS, SINGLE, GridScene, pair_question
from duet_vlm_lab.generators.chain_scenes import CELLS, SIDE, STREAMS, grid_scene
from duet_vlm_lab.networks.chain_network import CHAIN_TOKEN, TURNS, build_decoder
from duet_vlm_lab.recipe.chain_lessons import LESSONS, questions
from duet_vlm_lab.recipe.chain_packing import PackedChains, PackedQuestion, answer_loss, decode, pack
from duet_vlm_lab.recipe.decoder import LabelFeatures
from duet_vlm_lab.recipe.optim import optimizers
from duet_vlm_lab.recipe.packing import Lesson, choose_patches, lesson
from duet_vlm_lab.recipe.stages import Stage
from duet_vlm_lab.recipe.tower import to_pixels

ANSWERS = 96  # of a step about single pictures
PAIRS_SHOWN, PAIR_QUESTIONS, PAIR_EVERY = 4, 12, 6  # every so many steps pairs of pictures, once pictures are whole
FEW_KEPT = {2: 10, 3: 20}  # by side: visual tokens of the shortest pictures in validation
CHUNK = 4  # pictures that go through the tower together
WARM, FALL = 100, 2200  # steps of the learning rate's rise and of its fall at the end
LOOKUPS = ("attribute", "read_digit", "read_word")
FIT_STEPS, FIT_ROWS, FIT_PICTURES = 1500, 1024, 320


@dataclass(frozen=True)
class CurriculumPart:
    """A part of the curriculum, up to step ``until``: pictures of side x side cells, so many a step with ``keep``
    tokens each; weighted kinds."""

    until: int
    side: int
    pictures: int
    keep: tuple[int, ...]
    kinds: dict[str, float]


PLACES = ("cell", "at", "paint")
MORE = ("existence", "count", "spatial", "compare")
TWINS = {"twin": 3.0, "other": 2.0, "there": 2.0}
# of long chains
CHAINS = {"twin": 1.0, "other": 0.3, "there": 1.0, "tint": 0.5, "mixed": 2.0, "far": 2.0, "land2": 0.3, "land3": 0.5}
JOINED = {**CHAINS, "mixed": 4.0, "far": 3.0, "land3": 1.0}
AFTER = {**CHAINS, "far": 1.5, "mixed": 1.0, "near": 5.0, "tint": 0.3}
WHOLE = {
    **dict.fromkeys((*LOOKUPS, *PLACES), 0.3), **dict.fromkeys(MORE, 0.7), "count": 2.0, "hop1": 0.7, "any2": 1.5, "any3": 2.5,
    "twin": 0.3, "there": 0.5, "mixed": 1.0, "far": 1.0, "land3": 0.3,
}  # fmt: skip
LAST = {  # the kinds of the task, and little else
    **dict.fromkeys((*LOOKUPS, *PLACES), 0.3), **dict.fromkeys(MORE, 0.8), "count": 2.5, "hop1": 0.8, "hop2": 1.5, "hop3": 2.5, "land3": 0.5,
    "there": 0.3, "order": 0.3,
}  # fmt: skip
EVEN = {  # what was behind the rest
    **dict.fromkeys((*LOOKUPS, *PLACES), 0.3), "existence": 0.6, "count": 3.0, "spatial": 2.0, "compare": 2.0, "hop1": 0.6, "hop2": 1.0, "hop3": 1.5,
    "order": 0.6,
}  # fmt: skip


def weighted(lookups: float, places: float, more: float, **others: float) -> dict[str, float]:
    return {**dict.fromkeys(LOOKUPS, lookups), **dict.fromkeys(PLACES, places), **dict.fromkeys(MORE, more), **others}


PARTS = (
    CurriculumPart(700, 2, 8, (10,), weighted(1.0, 1.0, 0.0)),
    CurriculumPart(
        1400, 2, 8, (10,), weighted(0.5, 0.7, 0.3, land1=1.0, hop1=1.5, twin=0.7, other=0.4, there=0.7, tint=0.4)
    ),
    CurriculumPart(
        2400,
        3,
        8,
        (20, 28),
        weighted(0.5, 0.7, 0.3, land1=0.5, land2=0.7, hop1=1.5, any2=1.0, order=0.3, tint=0.4, twin=0.7, there=0.7),
    ),
    CurriculumPart(3400, 3, 8, (20, 28), weighted(0.2, 0.2, 0.3, hop1=0.7, any2=1.0, tint=0.3, **TWINS)),
    CurriculumPart(4600, 3, 8, (20, 28), weighted(0.2, 0.2, 0.3, hop1=0.7, any2=1.0, any3=1.0, **CHAINS)),
    CurriculumPart(6400, 3, 8, (20, 28), weighted(0.2, 0.2, 0.2, hop1=0.7, any2=1.0, any3=1.5, **JOINED)),
    CurriculumPart(
        9000, 4, 8, (32, 40, 57), weighted(0.3, 0.2, 0.7, order=0.3, hop1=0.7, any2=1.5, any3=2.0, **CHAINS)
    ),
    CurriculumPart(10400, 4, 4, (VISUAL_TOKENS,), WHOLE),
    CurriculumPart(12400, 4, 8, (32, 40, 57), weighted(0.2, 0.2, 0.5, hop1=0.5, any2=1.0, any3=2.0, **AFTER)),
    CurriculumPart(12800, 4, 4, (VISUAL_TOKENS,), {**WHOLE, "near": 1.5}),
    CurriculumPart(13800, 4, 4, (VISUAL_TOKENS,), LAST),
    CurriculumPart(15000, 4, 4, (VISUAL_TOKENS,), EVEN),
    CurriculumPart(10**9, 4, 4, (VISUAL_TOKENS,), {**EVEN, "count": 1.5, "tally": 4.0}),
)


def part_at(step: int) -> CurriculumPart:
    """Part of the curriculum that a step belongs to."""
    return next(part for part in PARTS if step < part.until)


def shows_pairs(step: int) -> bool:
    """True for a step with questions about pairs of pictures."""
    return part_at(step).side == SIDE and step % PAIR_EVERY == 0


def answers_seen(step: int) -> int:
    """Number of answers that were learned from before ``step``."""
    return sum(PAIRS_SHOWN * PAIR_QUESTIONS if shows_pairs(s) else ANSWERS for s in range(step))


@functools.cache
def tower() -> CLIPVisionModel:
    """The shipped tower, which nothing here changes."""
    return load()[0].model.vision_tower.requires_grad_(False)


class FeaturePool:
    """Pictures of a stream with what the tower sees on them, in memory, made when they are first asked for; always
    ``CHUNK`` at a time."""

    def __init__(self, split: str, seed: int, side: int, size: int, bf16: bool) -> None:
        self.split, self.seed, self.side, self.size, self.bf16 = split, seed, side, size, bf16
        self.tower = tower()
        self.chunks: dict[int, tuple[list[Lesson], Tensor]] = {}

    @torch.no_grad()
    def chunk(self, number: int) -> tuple[list[Lesson], Tensor]:
        if number not in self.chunks:
            scenes = [grid_scene(self.split, self.seed, number * CHUNK + i, self.side) for i in range(CHUNK)]
            with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
                seen = self.tower(to_pixels([render(s) for s in scenes]), output_hidden_states=True).hidden_states[
                    FEATURE_LAYER
                ][:, 1:]
            self.chunks[number] = [lesson(s, []) for s in scenes], seen.half()
        return self.chunks[number]

    def take(self, first: int, n: int) -> tuple[list[Lesson], Tensor]:
        """Pictures ``first`` to ``first + n``, round and round, and their features (n, 256, WIDTH)."""
        where = [divmod((first + i) % self.size, CHUNK) for i in range(n)]
        found = [self.chunk(c) for c, _ in where]
        lessons = [items[i] for (items, _), (_, i) in zip(found, where, strict=True)]
        return lessons, torch.stack([seen[i] for (_, seen), (_, i) in zip(found, where, strict=True)]).float()


def cell_words() -> Tensor:
    """Token of the cell that each patch lies in, (256,)."""
    at = torch.arange(GRID) // (GRID // SIDE)
    return torch.tensor([CHAIN_TOKEN[name] for name in CELLS])[at[:, None] * SIDE + at].flatten()


def start_projector(words: Tensor, pool: FeaturePool, seed: int) -> LlavaMultiModalProjector:
    """A projector that makes of a patch what the decoder's words for it are, plus its place: a fit of ``FIT_STEPS``
    small steps."""
    model = load()[0]
    projector, rng = LlavaMultiModalProjector(model.config), torch.Generator().manual_seed(seed)
    wanted, content = LabelFeatures(), words - words.mean(0)  # what is on a picture is no word
    wanted.start(content, rng)
    with torch.no_grad():
        wanted.place.weight += content[cell_words()]
    lessons, seen = pool.take(0, min(FIT_PICTURES, pool.size))
    labels = torch.from_numpy(np.stack([patch_labels(x.scene) for x in lessons]))
    with torch.no_grad():
        target = wanted(labels, torch.arange(VISUAL_TOKENS).expand(len(lessons), -1)).flatten(0, 1)
        weight = (1.0 + 3.0 * (labels[..., :1] > 0)).flatten(0, 1)
    seen, optimizer = seen.flatten(0, 1), torch.optim.AdamW(projector.parameters(), 3e-3)
    for step in range(FIT_STEPS):
        optimizer.param_groups[0]["lr"] = 3e-3 * max(0.05, 1 - step / FIT_STEPS)
        rows = torch.randint(len(seen), (FIT_ROWS,), generator=rng)
        loss = (weight[rows] * (projector(seen[rows]) - target[rows]) ** 2).mean() / (weight * target**2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return projector


def draw_kinds(kinds: dict[str, float], n: int, rng: np.random.Generator) -> list[str]:
    """``n`` kinds by weight, each as often as its weight says, up to one."""
    names, weights = list(kinds), np.array(list(kinds.values()))
    weights = weights / weights.sum()
    counts = np.floor(weights * n + rng.random(len(names))).astype(int)
    drawn = rng.permutation(np.repeat(names, counts))
    return [str(k) for k in np.concatenate([drawn, rng.choice(names, n, p=weights)])[:n]]


class ChainStage(Stage):
    """Projector and decoder on some pictures, or on ``PAIRS_SHOWN`` pairs of pictures, a step."""

    def __init__(self, seed: int, steps: int, bf16: bool, pictures: int = 9000) -> None:
        super().__init__(seed, steps, bf16)
        self.pools = {
            side: FeaturePool("train", seed, side, pictures if side == SIDE else pictures // 3, bf16)
            for side in STREAMS
        }
        self.decoder = build_decoder(seed)
        self.projector: nn.Module = start_projector(self.decoder.embed_tokens.weight.detach(), self.pools[SIDE], seed)
        self.held = {side: FeaturePool("validation", seed, side, 10**6, bf16) for side in STREAMS}

    def batch(self, step: int) -> dict[str, Any]:
        part, rng = part_at(step), np.random.default_rng([self.seed, 14, step])
        if shows_pairs(step):
            return self.pair_batch(part, rng)
        lessons, seen = self.pools[part.side].take(step * part.pictures, part.pictures)
        kinds = draw_kinds(part.kinds, ANSWERS // part.pictures, rng)
        asked = [questions(x.scene, kinds, rng) for x in lessons]
        patches = chosen(lessons, int(rng.choice(part.keep)), rng)
        return {"asked": asked, "seen": seen, "patches": patches, "packed": pack(asked, patches, VISUAL_TOKENS)}

    def pair_batch(self, part: CurriculumPart, rng: np.random.Generator) -> dict[str, Any]:
        """Pairs of pictures that stand at random places of the pool."""
        pool, pairs, asked = self.pools[SIDE], [], []
        for _ in range(PAIRS_SHOWN):
            a, b = (pool.take(int(i), 1) for i in rng.integers(pool.size, size=2))
            found: list[PackedQuestion] = []
            while len(found) < PAIR_QUESTIONS:
                one = pair_question((a[0][0].scene, b[0][0].scene), PAIRS[int(rng.integers(2))], rng)
                found += [one] if one else []
            pairs.append((a, b))
            asked.append(found)
        keep = min(part.keep[-1], VISUAL_TOKENS)
        patches = np.concatenate(
            [chosen([p[n][0][0] for p in pairs], keep, rng) + n * VISUAL_TOKENS for n in (0, 1)], 1
        )
        seen = torch.stack([torch.cat([a[1][0], b[1][0]]) for a, b in pairs])
        return {"asked": asked, "seen": seen, "patches": patches, "packed": pack(asked, patches, 2 * VISUAL_TOKENS)}

    def answers(
        self, asked: list[list[PackedQuestion]], seen: Tensor, patches: np.ndarray, packed: PackedChains
    ) -> tuple[Tensor, Tensor]:
        """Loss and hits."""
        kept = seen[torch.arange(len(seen))[:, None], torch.from_numpy(patches)]
        return answer_loss(self.decoder, decode(self.decoder, self.projector(kept), packed, TURNS), packed)

    def forward(self, **batch: Any) -> dict[str, Any]:
        with self.autocast():
            loss, hits = self.answers(**batch)
        return {"loss": loss, "tokens": batch["patches"].shape[1], **by_kind(hits, batch["asked"])}

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return optimizers(self.named_parameters(), matrix=0.006, query_key=0.003, embedding=1e-3, rest=1.5e-3)

    def rate(self, step: int) -> float:
        return min(1.0, (step + 1) / WARM, max(0.02, (self.steps - step) / min(FALL, self.steps)))

    @torch.no_grad()
    def validate(self, pictures: int = 24) -> dict[str, float]:
        """Accuracy per kind on validation pictures with all their tokens; ``few2_`` and ``few3_``: on smaller ones with
        few tokens."""
        out: dict[str, float] = {}
        for side, pool in self.held.items():
            rng, hits, asked = np.random.default_rng(0), [], []
            for first in range(0, pictures, 4):
                lessons, seen = pool.take(first, 4)
                mine = [questions(x.scene, [*SINGLE, *SINGLE, *LESSONS], x.scene.generator(2)) for x in lessons]
                patches = chosen(lessons, FEW_KEPT.get(side, VISUAL_TOKENS), rng)
                hits += list(self.answers(mine, seen, patches, pack(mine, patches, VISUAL_TOKENS))[1])
                asked += mine
                if side == SIDE:
                    mine = [
                        some_pairs((lessons[i].scene, lessons[i - 1].scene), lessons[i].scene.generator(3))
                        for i in range(4)
                    ]
                    seen = torch.stack([torch.cat([seen[i], seen[i - 1]]) for i in range(4)])
                    everything = np.tile(np.arange(2 * VISUAL_TOKENS), (4, 1))
                    hits += list(self.answers(mine, seen, everything, pack(mine, everything, 2 * VISUAL_TOKENS))[1])
                    asked += mine
            name = "" if side == SIDE else f"few{side}_"
            out |= {f"{name}{kind}": value for kind, value in by_kind(hits, asked).items()}
        return out


def some_pairs(scenes: tuple[GridScene, GridScene], rng: np.random.Generator, n: int = 4) -> list[PackedQuestion]:
    """``n`` questions over two pictures."""
    found: list[PackedQuestion] = []
    while len(found) < n:
        one = pair_question(scenes, PAIRS[len(found) % 2], rng) or pair_question(scenes, "pair_count", rng)
        found += [one] if one else []
    return found


def chosen(lessons: list[Lesson], keep: int, rng: np.random.Generator) -> np.ndarray:
    """(B, keep) patches in order, enough for every question."""
    if keep >= VISUAL_TOKENS:
        return np.tile(np.arange(VISUAL_TOKENS), (len(lessons), 1))
    return np.stack([choose_patches(x, keep, rng) for x in lessons])


def by_kind(hits: Tensor | list[Tensor], asked: list[list[PackedQuestion]]) -> dict[str, float]:
    """Share of right answers per kind, and the mean of the kinds."""
    found: dict[str, list[float]] = {kind: [] for kind in (*KINDS, *LESSONS)}
    for row, mine in zip(hits, asked, strict=True):
        for hit, one in zip(row.tolist(), mine, strict=True):
            found[one.kind].append(hit)
    out = {kind: round(float(np.mean(v)), 3) for kind, v in found.items() if v}
    return {"all": round(float(np.mean(list(out.values()))), 3), **out}
