"""Many questions about one clip in one sequence, as :mod:`.packing` does for pictures."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from duet_vlm.evaluation.tiny.questions import split_words
from duet_vlm_lab.generators.clips import CLIP_ROWS, FRAMES, ROWS, Clip, center, covered
from duet_vlm_lab.generators.clips_questions import ClipQuestion, questions
from duet_vlm_lab.networks.video_network import VIDEO_TOKEN
from duet_vlm_lab.recipe.packing import PREFIX, PackedLesson, _additive, _block


@dataclass(frozen=True)
class ClipLesson:
    """One clip with its questions; ``shown`` and ``centers`` (520,) say which rows show anything, and the middle of
    something."""

    clip: Clip
    questions: list[ClipQuestion]
    shown: np.ndarray
    centers: np.ndarray


def clip_lesson(clip: Clip, kinds: tuple[str, ...]) -> ClipLesson:
    """Ask one question of each kind named."""
    shown, centers = np.zeros((FRAMES, ROWS), bool), np.zeros((FRAMES, ROWS), bool)
    for actor in clip.actors:
        shown |= covered(actor)
        for frame in actor.frames:
            centers[frame, center(actor, frame)] = True
    return ClipLesson(clip, questions(clip, kinds, clip.generator(2)), shown.ravel(), centers.ravel())


def choose_rows(item: ClipLesson, keep: int, rng: np.random.Generator) -> np.ndarray:
    """``keep`` rows in order, enough for every question: middles of everything shown, mostly CLS, then foreground or
    chance."""
    score = rng.random(CLIP_ROWS)
    if rng.random() < 0.5:
        score += item.shown
    if rng.random() < 0.7:
        score[::ROWS] += 4
    return np.sort(np.argsort(-(score + 4 * item.centers))[:keep])


def all_rows(n: int) -> np.ndarray:
    """(n, 520): every row."""
    return np.tile(np.arange(CLIP_ROWS), (n, 1))


def _text(item: ClipLesson) -> tuple[list[int], list[int], list[int], list[int]]:
    """Tokens, question number, position inside the question, and the rows of ``ASSISTANT:``."""
    ids, owner, place, answer_rows = [], [], [], []
    for q, asked in enumerate(item.questions):
        words = [*split_words(asked.text), "ASSISTANT:", asked.answer]
        answer_rows.append(len(ids) + len(words) - 2)
        ids += [VIDEO_TOKEN[w] for w in words]
        owner += [q] * len(words)
        place += range(len(words))
    return ids, owner, place, answer_rows


def pack_clips(
    items: list[ClipLesson], rows: np.ndarray, rng: np.random.Generator, spread: bool = True, late: bool = False
) -> PackedLesson:
    """Pack a batch; like :func:`.packing.pack`, but ``late`` takes visual rows away at random, needed or not.

    Parameters
    ----------
    items : list of ClipLesson
        The same number of questions each.
    rows : ndarray (B, K)
        Visual rows that are handed over.
    rng : Generator
    spread : bool
        Whether they keep the position numbers of the full clip; else they are numbered consecutively.
    late : bool
        Whether text loses sight of a random part of them in ``late_mask``.
    """
    b, k = rows.shape
    texts = [_text(item) for item in items]
    length = max(len(t[0]) for t in texts)

    def padded(column: int, fill: int) -> torch.Tensor:
        return torch.tensor([t[column] + [fill] * (length - len(t[column])) for t in texts])

    owner = padded(1, -2)
    where = torch.from_numpy(rows) if spread else torch.arange(k).expand(b, -1)
    after = PREFIX + (CLIP_ROWS if spread else k)
    allowed = late_allowed = _block(owner, k)
    if late:
        left = torch.from_numpy(rng.random((b, k)) < rng.uniform(0.0, 0.6, (b, 1)))
        late_allowed = allowed.clone()
        late_allowed[:, PREFIX + k :, PREFIX : PREFIX + k] &= left[:, None]
    looks = np.stack(
        [np.stack([np.stack(q.looks)[:, r] for q in item.questions]) for item, r in zip(items, rows, strict=True)]
    )
    mentions, sees, counts, counted, start = [], [], [], [], 0
    for i, item in enumerate(items):
        start = 0
        for asked in item.questions:
            for word, seen in asked.mentions:
                mentions.append((i, start + word))
                sees.append(seen[rows[i]])
            if asked.kind == "count":
                counts.append((i, start + asked.mentions[0][0]))
                counted.append(asked.counted[rows[i]])
            start += len(split_words(asked.text)) + 2
    return PackedLesson(
        patches=torch.from_numpy(rows),
        ids=padded(0, VIDEO_TOKEN["<pad>"]),
        positions=torch.cat([torch.arange(PREFIX).expand(b, -1), where + PREFIX, padded(2, 0) + after], 1),
        mask=_additive(allowed),
        late_mask=_additive(late_allowed),
        answer_rows=torch.tensor([t[3] for t in texts]),
        answers=torch.tensor([[VIDEO_TOKEN[q.answer] for q in item.questions] for item in items]),
        answer_sees=torch.from_numpy(looks),
        mention_rows=torch.tensor(mentions),
        mention_sees=torch.from_numpy(np.stack(sees)),
        mention_facts=torch.empty(0),
        count_rows=torch.tensor(counts, dtype=torch.int64).view(-1, 2),
        count_sees=torch.from_numpy(np.array(counted, bool).reshape(-1, k)),
        pair_facts=torch.tensor([[q.gaps for q in item.questions] for item in items]),
    )
