"""Stage C: tower and decoder meet. First the projector alone learns to imitate the label features, then everything is
trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlavaModel

from duet_vlm.evaluation.tiny.labels import presence
from duet_vlm.evaluation.tiny.network import DECODER_LAYERS, FEATURE_LAYER, VISUAL_TOKENS, build_model
from duet_vlm.evaluation.tiny.render import render
from duet_vlm_lab.recipe.decoder import FEW, DecoderStage, all_patches, lessons, shorten
from duet_vlm_lab.recipe.optim import optimizers, rate
from duet_vlm_lab.recipe.packing import Lesson, PackedLesson, pack
from duet_vlm_lab.recipe.reading import (
    AttentionWatch,
    accuracy_by_kind,
    answer_loss,
    attention_loss,
    count_loss,
    decode,
    probe_loss,
)
from duet_vlm_lab.recipe.stages import Stage, weights
from duet_vlm_lab.recipe.tower import TowerStage, dense_loss, presence_loss, to_pixels

BATCH, QUESTIONS = 8, 16
FIT_BATCH = 16
REPEATS = 4


def pixels_of(items: list[Lesson]) -> Tensor:
    """(B, 3, 224, 224) of the pictures of lessons."""
    return to_pixels([render(i.scene) for i in items])


class ProjectorStage(Stage):
    """Tower and decoder of the stages before in one model, whose projector alone learns to make label features of tower
    features.

    Drawing and the tower cost far more than the projector, so every batch is used for ``REPEATS`` steps.
    """

    def __init__(self, seed: int, steps: int, bf16: bool, folder: Path) -> None:
        super().__init__(seed, steps, bf16)
        model = build_model()
        model.set_attn_implementation("eager")
        tower, decoder = TowerStage(seed, 1, bf16), DecoderStage(seed, 1, bf16)
        tower.load_state_dict(weights(folder / "tower"))
        decoder.load_state_dict(weights(folder / "decoder"))
        self.core, self.heads, self.probes, self.features = model.model, tower.heads, decoder.probes, decoder.features
        self.core.vision_tower.load_state_dict(tower.tower.state_dict())
        self.core.language_model.load_state_dict(decoder.decoder.state_dict())
        self.drawn: tuple[int, dict[str, Any]] = (-1, {})

    def batch(self, step: int) -> dict[str, Any]:
        number = step // REPEATS
        if self.drawn[0] != number:
            self.drawn = number, self.draw(number)
        return self.drawn[1]

    @torch.no_grad()
    def draw(self, number: int) -> dict[str, Any]:
        """Tower features, label features and the weight of every patch in batch ``number``."""
        items = lessons("train", self.seed + 2000, number * FIT_BATCH, FIT_BATCH, 0)
        labels = torch.from_numpy(np.stack([i.labels for i in items]))
        with self.autocast():
            seen = (
                self.core.vision_tower(pixels_of(items), output_hidden_states=True)
                .hidden_states[FEATURE_LAYER][:, 1:]
                .float()
            )
            target = self.features(labels, torch.arange(VISUAL_TOKENS).expand(len(items), -1))
        return {"seen": seen, "target": target, "weight": 1.0 + 3.0 * (labels[..., :1] > 0)}

    def forward(self, seen: Tensor, target: Tensor, weight: Tensor) -> dict[str, Any]:
        return {
            "loss": (weight * (self.core.multi_modal_projector(seen) - target) ** 2).mean()
            / (weight * target**2).mean()
        }

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.AdamW(self.core.multi_modal_projector.parameters(), 3e-3)]

    def rate(self, step: int) -> float:
        return max(0.05, 1 - step // REPEATS * REPEATS / self.steps)


def visual_tokens(core: LlavaModel, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Visual tokens (B, 256, WIDTH), the tower features they come from (B, 257, WIDTH), and the last CLS output (B,
    WIDTH)."""
    out = core.vision_tower(pixels, output_hidden_states=True)
    features = out.hidden_states[FEATURE_LAYER]
    return core.multi_modal_projector(features[:, 1:]), features.float(), out.pooler_output.float()


@torch.no_grad()
def validate(core: LlavaModel, n: int = 48, keep: int | None = None) -> dict[str, float]:
    """Accuracy per kind on validation pictures; ``keep``: only so many visual tokens, those that matter first."""
    rng, hits, items = np.random.default_rng(0), [], lessons("validation", 0, 0, n, QUESTIONS)
    for i in range(0, n, 8):
        part = items[i : i + 8]
        packed = shorten(part, keep, rng) if keep else pack(part, all_patches(8), rng)
        visual = visual_tokens(core, pixels_of(part))[0][torch.arange(8)[:, None], packed.patches]
        last, _ = decode(core.language_model, visual, packed, DECODER_LAYERS, DECODER_LAYERS)
        hits += list(answer_loss(core.language_model, last, packed)[1])
    return accuracy_by_kind(hits, items)


class JoinStage(Stage):
    """Everything, on ``BATCH`` pictures a step; begins with what :class:`ProjectorStage` left."""

    def __init__(self, seed: int, steps: int, bf16: bool, fitted: ProjectorStage) -> None:
        super().__init__(seed, steps, bf16)
        self.core, self.heads, self.probes = fitted.core, fitted.heads, fitted.probes
        self.watch = AttentionWatch(self.core.language_model)

    def batch(self, step: int) -> dict[str, Any]:
        rng = np.random.default_rng([self.seed, 7, step])
        items = lessons("train", self.seed + 3000, step * BATCH, BATCH, QUESTIONS)
        short = rng.random() < 0.5
        packed = (
            shorten(items, int(rng.choice(FEW)), rng)
            if short
            else pack(items, all_patches(BATCH), rng, late=rng.random() < 0.5)
        )
        return {
            "items": items,
            "packed": packed,
            "cut": int(rng.choice((6, 7, 9, 10))),
            "guide": max(0.25, 1 - step / self.steps / 0.7),
        }

    def forward(self, items: list[Lesson], packed: PackedLesson, cut: int, guide: float) -> dict[str, Any]:
        decoder = self.core.language_model
        with self.autocast():
            visual, features, cls = visual_tokens(self.core, pixels_of(items))
            kept = visual[torch.arange(len(items))[:, None], packed.patches]
            last, states = decode(decoder, kept, packed, DECODER_LAYERS, cut)
        labels = torch.from_numpy(np.stack([i.labels for i in items]))
        present = torch.from_numpy(np.stack([presence(i.scene) for i in items]))
        answer, hits = answer_loss(decoder, last, packed)
        dense = dense_loss(self.heads.patch(features[:, 1:]), labels)[0]
        seen = presence_loss(self.heads, features, cls, present)
        lookup, shared = attention_loss(self.watch, packed, DECODER_LAYERS)
        counted = count_loss(self.watch, packed)
        facts = probe_loss(self.probes, states, packed)
        loss = answer + 0.1 * dense + 0.3 * seen
        loss = loss + guide * (0.15 * lookup + 0.15 * shared + 0.1 * counted + 0.05 * facts)
        losses = {
            "answer": answer,
            "dense": dense,
            "seen": seen,
            "lookup": lookup,
            "shared": shared,
            "counted": counted,
            "facts": facts,
        }
        numbers = {"tokens": packed.patches.shape[1], **{k: v.item() for k, v in losses.items()}}
        return {"loss": loss, **numbers, **accuracy_by_kind(list(hits), items)}

    def optimizers(self) -> list[torch.optim.Optimizer]:
        opts = optimizers(
            self.core.vision_tower.named_parameters(), matrix=0.0015, query_key=4e-4, embedding=1e-4, rest=4e-4
        )
        opts += optimizers(
            self.core.language_model.named_parameters(), matrix=0.003, query_key=8e-4, embedding=4e-4, rest=8e-4
        )
        rest = [*self.core.multi_modal_projector.parameters(), *self.heads.parameters(), *self.probes.parameters()]
        return [*opts, torch.optim.AdamW(rest, 8e-4, betas=(0.9, 0.98), weight_decay=0.01)]

    def rate(self, step: int) -> float:
        return rate(step / self.steps, flat=0.3)

    def validate(self) -> dict[str, float]:
        return {**validate(self.core), "28": validate(self.core, keep=28)["all"]}
