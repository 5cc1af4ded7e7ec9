"""Many questions about one picture in one sequence.

``<s> USER:`` and the visual tokens come first; every question with its answer follows, sees this prefix and itself, and
its position numbers start again. That is exactly the single-turn computation at a fraction of the cost.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from duet_vlm.evaluation.tiny.labels import body_patches, center_patch, patch_labels, tag_patches
from duet_vlm.evaluation.tiny.network import VISUAL_TOKENS
from duet_vlm.evaluation.tiny.questions import SceneQuestion, question_tokens_of
from duet_vlm.evaluation.tiny.scenes import SIZES, Scene
from duet_vlm.evaluation.tiny.text import TOKEN

PREFIX = 2  # <s> USER:
NOTHING = -100  # a target that does not count
BLOCKED = float(torch.finfo(torch.float32).min) / 2


@dataclass(frozen=True)
class PackedLesson:
    """A batch of B pictures, K visual tokens each, Q questions each; N = PREFIX + K + T rows.

    Attributes
    ----------
    patches : (B, K) patch number of every visual token
    ids : (B, T) tokens of the packed questions
    positions : (B, N); mask : (B, 1, N, N) additive
    late_mask : (B, 1, N, N), the mask of later layers, where text rows see fewer visual tokens
    answer_rows, answers : (B, Q) row of ``ASSISTANT:`` and the token to be said there
    answer_sees : (B, Q, 2, K) bool, what ``ASSISTANT:`` should look at, for the first and the second thing named
    mention_rows : (M, 2) picture and row of every naming word; mention_sees : (M, K) bool
    mention_facts : (M, 7) shape, colour, size, digit, word (class or NOTHING), then centre x, y in patches
    count_rows : (C, 2) picture and row of the plural in count questions; count_sees : (C, K) bool, centres of the
    things to be counted
    pair_facts : (B, Q, 4) difference of x, y, size, and same colour, of two named things; NaN elsewhere
    """

    patches: Tensor
    ids: Tensor
    positions: Tensor
    mask: Tensor
    late_mask: Tensor
    answer_rows: Tensor
    answers: Tensor
    answer_sees: Tensor
    mention_rows: Tensor
    mention_sees: Tensor
    mention_facts: Tensor
    count_rows: Tensor
    count_sees: Tensor
    pair_facts: Tensor


@dataclass(frozen=True)
class Lesson:
    """One picture with its patch labels (256, 6) and its questions."""

    scene: Scene
    labels: np.ndarray
    questions: list[SceneQuestion]
    bodies: np.ndarray
    tags: np.ndarray


def lesson(scene: Scene, questions: list[SceneQuestion]) -> Lesson:
    """Collect what packing needs to know about a scene."""
    bodies = np.stack([body_patches(t) for t in scene.things])
    tags = np.stack([tag_patches(t) for t in scene.things])
    return Lesson(scene, patch_labels(scene), questions, bodies, tags)


def choose_patches(item: Lesson, keep: int, rng: np.random.Generator) -> np.ndarray:
    """``keep`` patches in order, enough for every question: thing centres, one patch per tag, then foreground or
    chance."""
    score = rng.random(VISUAL_TOKENS)
    if rng.random() < 0.5:
        score += item.labels[:, 0] > 0
    for i, t in enumerate(item.scene.things):
        score[center_patch(t)] += 4
        shown = np.flatnonzero(item.tags[i])
        if len(shown):
            score[shown[len(shown) // 2]] += 3
    return np.sort(np.argsort(-score)[:keep])


def _sees(item: Lesson, asked: SceneQuestion) -> np.ndarray:
    """(2, 256) bool: where ``ASSISTANT:`` should look for the first and the second thing; both rows alike with one
    thing."""
    out = np.zeros((2, VISUAL_TOKENS), bool)
    two = asked.kind in ("spatial", "compare")
    for n, i in enumerate(asked.needed):
        shown = item.tags[i] if asked.reads else item.bodies[i]
        out[n if two else slice(None)] |= shown
    return out


def _facts(item: Lesson, things: tuple[int, ...]) -> list[float]:
    if len(things) != 1:
        return [NOTHING] * 5 + [float("nan")] * 2
    t = item.scene.things[things[0]]
    digit = t.tag.value + 1 if t.tag and t.tag.kind == "digit" else 0
    word = t.tag.value + 1 if t.tag and t.tag.kind == "word" else 0
    return [t.shape, t.color, SIZES.index(t.size), digit, word, t.center[0] / 14, t.center[1] / 14]


def _pair(item: Lesson, asked: SceneQuestion) -> list[float]:
    if asked.kind not in ("spatial", "compare"):
        return [float("nan")] * 4
    a, b = (item.scene.things[i] for i in asked.needed)
    return [
        (a.center[0] - b.center[0]) / 56,
        (a.center[1] - b.center[1]) / 56,
        (a.size - b.size) / 14,
        float(a.color == b.color),
    ]


def _rows(item: Lesson) -> tuple[list[int], list[int], list[int], list[int], list[tuple[int, int, int]]]:
    """Tokens, question number, position inside the question, answer rows and mentions (row, question, mention number)."""
    ids, owner, place, answer_rows, mentions = [], [], [], [], []
    for q, asked in enumerate(item.questions):
        start = len(ids)
        ids += [*question_tokens_of(asked, TOKEN), TOKEN["ASSISTANT:"], TOKEN[asked.answer]]
        owner += [q] * (len(ids) - start)
        place += range(len(ids) - start)
        answer_rows.append(len(ids) - 2)
        mentions += [(start + word, q, m) for m, (word, _) in enumerate(asked.mentions)]
    return ids, owner, place, answer_rows, mentions


def _block(owner: Tensor, visual: int) -> Tensor:
    """(B, N, N) bool: causal, and a question's rows see no other question."""
    b, t = owner.shape
    n = PREFIX + visual + t
    full = torch.cat([torch.full((b, n - t), -1), owner], 1)
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    return causal & ((full[:, None, :] == -1) | (full[:, :, None] == full[:, None, :]))


def _additive(allowed: Tensor) -> Tensor:
    return torch.zeros(allowed.shape).masked_fill_(~allowed, BLOCKED)[:, None]


def pack(
    items: list[Lesson], patches: np.ndarray, rng: np.random.Generator, spread: bool = True, late: bool = False
) -> PackedLesson:
    """Pack a batch.

    Parameters
    ----------
    items : list of Lesson
        The same number of questions each.
    patches : ndarray (B, K)
        Patches that are handed over.
    rng : Generator
    spread : bool
        Whether visual tokens keep the position numbers of the full picture; else they are numbered consecutively.
    late : bool
        Whether text rows lose sight of a random part of the unneeded visual tokens in ``late_mask``.
    """
    b, k = patches.shape
    rows = [_rows(item) for item in items]
    length = max(len(r[0]) for r in rows)

    def padded(column: int, fill: int) -> Tensor:
        return torch.tensor([r[column] + [fill] * (length - len(r[column])) for r in rows])

    owner = padded(1, -2)
    where = torch.from_numpy(patches) if spread else torch.arange(k).expand(b, -1)
    after = PREFIX + (VISUAL_TOKENS if spread else k)
    positions = torch.cat([torch.arange(PREFIX).expand(b, -1), where + PREFIX, padded(2, 0) + after], 1)
    allowed = _block(owner, k)
    sees = np.stack([np.stack([_sees(item, q) for q in item.questions]) for item in items])
    late_allowed = allowed
    if late:
        late_allowed = allowed.clone()
        keep = (sees.any(2) | (rng.random((b, sees.shape[1], VISUAL_TOKENS)) < rng.uniform(0.03, 0.4))).astype(bool)
        for i in range(b):
            shown = torch.from_numpy(keep[i][:, patches[i]])
            late_allowed[i, PREFIX + k :, PREFIX : PREFIX + k] &= shown[owner[i].clamp(min=0)]
    mentions = [(i, row, q, m) for i, r in enumerate(rows) for row, q, m in r[4]]
    named = [items[i].questions[q].mentions[m][1] for i, _, q, m in mentions]
    looks = np.zeros((len(mentions), k), bool)
    for n, ((i, _, q, _), things) in enumerate(zip(mentions, named, strict=True)):
        for thing in things:
            shown = items[i].bodies[thing] | (items[i].tags[thing] & items[i].questions[q].reads)
            looks[n] |= shown[patches[i]]
    counted = [n for n, (i, _, q, _) in enumerate(mentions) if items[i].questions[q].kind == "count"]
    centers = np.zeros((len(counted), k), bool)
    for n, m in enumerate(counted):
        item = items[mentions[m][0]]
        centers[n] = np.isin(patches[mentions[m][0]], [center_patch(item.scene.things[t]) for t in named[m]])
    facts = [_facts(items[i], things) for (i, _, _, _), things in zip(mentions, named, strict=True)]
    return PackedLesson(
        patches=torch.from_numpy(patches),
        ids=padded(0, TOKEN["<pad>"]),
        positions=positions,
        mask=_additive(allowed),
        late_mask=_additive(late_allowed),
        answer_rows=torch.tensor([r[3] for r in rows]),
        answers=torch.tensor([[TOKEN[q.answer] for q in item.questions] for item in items]),
        answer_sees=torch.from_numpy(np.stack([s[:, :, p] for s, p in zip(sees, patches, strict=True)])),
        mention_rows=torch.tensor([m[:2] for m in mentions]),
        mention_sees=torch.from_numpy(looks),
        mention_facts=torch.tensor(facts),
        count_rows=torch.tensor([mentions[m][:2] for m in counted], dtype=torch.int64).view(-1, 2),
        count_sees=torch.from_numpy(centers),
        pair_facts=torch.tensor([[_pair(item, q) for q in item.questions] for item in items]),
    )
