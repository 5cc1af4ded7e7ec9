"""The decoder of the tiny model learns time: the shipped weights go on from pictures to clips, in one stage."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import VideoLlavaModel

from duet_vlm.evaluation.tiny.network import DECODER_LAYERS, FEATURE_LAYER, WIDTH
from duet_vlm_lab.generators.clips import FRAMES, ROWS, clip, render
from duet_vlm_lab.generators.clips_questions import KINDS
from duet_vlm_lab.networks.video_network import start_from_pictures
from duet_vlm_lab.recipe.optim import optimizers, rate
from duet_vlm_lab.recipe.packing import PREFIX, PackedLesson
from duet_vlm_lab.recipe.reading import PAIR_LAYER, AttentionWatch, answer_loss, attention_loss, count_loss, decode
from duet_vlm_lab.recipe.stages import Stage
from duet_vlm_lab.recipe.tower import to_pixels
from duet_vlm_lab.recipe.video_packing import ClipLesson, all_rows, choose_rows, clip_lesson, pack_clips

BATCH = 8
ASKED = ("motion", "motion", "order", "order", "order", "change", "change", "read", "read", "count")
FEW = (64, 96, 144, 208, 312)  # visual rows of the shortened clips
TIME_LAYER = 1  # after this layer visual rows should know their frame


class TimeProbes(nn.Module):
    """Linear read-outs, used in training only: the frame of a visual row, and what a comparison compares."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, FRAMES))
        self.gaps = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3))


def lessons(split: str, seed: int, first: int, n: int) -> list[ClipLesson]:
    """Clips ``first`` to ``first + n`` of a stream with their questions (without drawing them)."""
    return [clip_lesson(clip(split, seed, first + i), ASKED) for i in range(n)]


def visual_rows(core: VideoLlavaModel, items: list[ClipLesson]) -> Tensor:
    """Visual tokens of the decoder, (B, 520, WIDTH); the tower stays as it is."""
    pixels = to_pixels([frame for item in items for frame in render(item.clip)])
    with torch.no_grad():
        seen = core.video_tower(pixels, output_hidden_states=True).hidden_states[FEATURE_LAYER]
    return core.multi_modal_projector(seen).view(len(items), FRAMES * ROWS, WIDTH)


def accuracy(hits: list[Tensor], items: list[ClipLesson]) -> dict[str, float]:
    """Share of right answers per kind, and the mean of the kinds."""
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for row, item in zip(hits, items, strict=True):
        for hit, asked in zip(row.tolist(), item.questions, strict=True):
            found[asked.kind].append(hit)
    out = {kind: round(float(np.mean(v)), 3) for kind, v in found.items() if v}
    return {"all": round(float(np.mean(list(out.values()))), 3), **out}


@torch.no_grad()
def validate(core: VideoLlavaModel, n: int = 48, keep: int | None = None) -> dict[str, float]:
    """Accuracy per kind on validation clips; ``keep``: only so many visual rows, those that matter first."""
    rng, hits, items = np.random.default_rng(0), [], lessons("validation", 0, 0, n)
    for i in range(0, n, BATCH):
        part = items[i : i + BATCH]
        rows = np.stack([choose_rows(item, keep, rng) for item in part]) if keep else all_rows(len(part))
        packed = pack_clips(part, rows, rng)
        visual = visual_rows(core, part)[torch.arange(len(part))[:, None], packed.patches]
        last, _ = decode(core.language_model, visual, packed, DECODER_LAYERS, DECODER_LAYERS)
        hits += list(answer_loss(core.language_model, last, packed)[1])
    return accuracy(hits, items)


class VideoStage(Stage):
    """Projector and decoder on ``BATCH`` clips a step: first few rows of a clip, later in a third of the steps all of
    them.

    Attention is told where to look in the look-up layers only, less and less; the second half learns from answers (and
    read-outs) alone.
    """

    def __init__(self, seed: int, steps: int, bf16: bool) -> None:
        super().__init__(seed, steps, bf16)
        model = start_from_pictures()
        model.set_attn_implementation("eager")  # the faster one at this size
        self.core, self.probes = model.model, TimeProbes()
        self.core.video_tower.requires_grad_(False)
        self.core.image_tower.requires_grad_(False)
        self.watch = AttentionWatch(self.core.language_model)
        self.core.language_model.layers[TIME_LAYER].register_forward_hook(self._keep)

    def _keep(self, _module: nn.Module, _args: tuple, output: Tensor) -> None:
        self.early = output

    def batch(self, step: int) -> dict[str, Any]:
        t, rng = step / self.steps, np.random.default_rng([self.seed, 9, step])
        items = lessons("train", self.seed + 5000, step * BATCH, BATCH)
        few = t < 0.25 or rng.random() < 0.65
        keep = int(rng.choice(FEW[:2] if t < 0.25 else FEW))
        rows = np.stack([choose_rows(item, keep, rng) for item in items]) if few else all_rows(BATCH)
        packed = pack_clips(items, rows, rng, spread=rng.random() < 0.8, late=rng.random() < 0.5)
        return {"items": items, "packed": packed, "cut": int(rng.choice((6, 7, 9))), "guide": max(0.0, 1 - t / 0.5)}

    def forward(self, items: list[ClipLesson], packed: PackedLesson, cut: int, guide: float) -> dict[str, Any]:
        decoder = self.core.language_model
        with self.autocast():
            visual = visual_rows(self.core, items)[torch.arange(len(items))[:, None], packed.patches]
            last, states = decode(decoder, visual, packed, DECODER_LAYERS, cut)
        answer, hits = answer_loss(decoder, last, packed)
        time = self.time_loss(packed)
        gaps = self.gap_loss(states, packed)
        loss, numbers = (
            answer + 0.2 * time + 0.5 * max(guide, 0.2) * gaps,
            {"answer": answer, "time": time, "gaps": gaps},
        )
        if guide:
            lookup, _ = attention_loss(self.watch, packed, DECODER_LAYERS)
            counted = count_loss(self.watch, packed)
            loss, numbers = (
                loss + guide * (0.3 * lookup + 0.15 * counted),
                {**numbers, "lookup": lookup, "counted": counted},
            )
        plain = {name: value.item() for name, value in numbers.items()}
        return {"loss": loss, "tokens": packed.patches.shape[1], **plain, **accuracy(list(hits), items)}

    def time_loss(self, packed: PackedLesson) -> Tensor:
        """Loss of naming the frame of a visual token."""
        said = self.probes.time(self.early[:, PREFIX : PREFIX + packed.patches.shape[1]].float())
        return F.cross_entropy(said.flatten(0, 1), (packed.patches // ROWS).flatten())

    def gap_loss(self, states: list[Tensor], packed: PackedLesson) -> Tensor:
        """Loss of direction and distance, at ``ASSISTANT:``."""
        rows = packed.answer_rows[..., None].expand(-1, -1, WIDTH)
        said, known = self.probes.gaps(states[PAIR_LAYER].float().gather(1, rows)), ~packed.pair_facts.isnan()
        return F.smooth_l1_loss(said[known], packed.pair_facts[known])

    def optimizers(self) -> list[torch.optim.Optimizer]:
        learning = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        return optimizers(learning, matrix=0.003, query_key=0.0015, embedding=1e-3, rest=1e-3)

    def rate(self, step: int) -> float:
        return rate(step / self.steps, flat=0.5)

    def validate(self) -> dict[str, float]:
        return {**validate(self.core), "64": validate(self.core, keep=64)["all"]}
