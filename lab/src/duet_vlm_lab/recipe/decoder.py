"""Stage B: the decoder learns to answer from label features, which stand in for tower and projector."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from duet_vlm.evaluation.tiny.assets import WORDS
from duet_vlm.evaluation.tiny.labels import LABELS
from duet_vlm.evaluation.tiny.network import DECODER_LAYERS, VISUAL_TOKENS, WIDTH, decoder_config
from duet_vlm.evaluation.tiny.questions import KINDS, PLURALS, questions
from duet_vlm.evaluation.tiny.scenes import COLOR_NAMES, GRID, SHAPES, generator, scene
from duet_vlm.evaluation.tiny.text import TOKEN
from duet_vlm_lab.recipe.optim import optimizers, rate
from duet_vlm_lab.recipe.packing import Lesson, PackedLesson, choose_patches, lesson, pack
from duet_vlm_lab.recipe.reading import (
    AttentionWatch,
    FactProbes,
    accuracy_by_kind,
    answer_loss,
    attention_loss,
    decode,
    probe_loss,
)
from duet_vlm_lab.recipe.stages import Stage
from duet_vlm_lab.recipe.starts import position_waves, start_decoder

BATCH, QUESTIONS = 8, 12
FEW = (28, 40, 57, 85, 128)  # visual tokens of the shortened pictures
LOOKUPS = ("attribute", "read_digit", "read_word")
LABEL_WORDS = {"shape": SHAPES, "color": COLOR_NAMES, "digit": tuple("0123456789"), "word": WORDS}


class LabelFeatures(nn.Module):
    """Patch labels, row and column -> a visual token: the sum of learned embeddings, which start at the words they
    mean."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(n, WIDTH) for n in LABELS.values())
        self.place = nn.Embedding(VISUAL_TOKENS, WIDTH)

    @torch.no_grad()
    def start(self, words: Tensor, rng: torch.Generator) -> None:
        """``words`` (vocabulary, WIDTH): the decoder's token embeddings."""
        for name, table in zip(LABELS, self.tables, strict=True):
            table.weight.normal_(std=0.15, generator=rng)
            if name in LABEL_WORDS:
                table.weight[0] = 0
                table.weight[1:] = words[[TOKEN[w] for w in LABEL_WORDS[name]]]
        mix = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=rng))[0]  # spread the waves over all dimensions
        ramp = (torch.arange(GRID) - 7.5) / 8
        rows, columns = ramp[:, None].expand(GRID, GRID).flatten(), ramp[None].expand(GRID, GRID).flatten()
        waves = 0.12 * position_waves()
        waves[:, 60], waves[:, 124] = rows, columns  # one straight scale each: "left of" is then a difference
        self.place.weight.copy_(waves @ mix)

    def forward(self, labels: Tensor, patches: Tensor) -> Tensor:
        """(B, K, 6) and (B, K) -> (B, K, WIDTH)."""
        return sum(table(labels[..., i]) for i, table in enumerate(self.tables)) + self.place(patches)


def lessons(split: str, seed: int, first: int, n: int, per_scene: int, kinds: tuple[str, ...] = KINDS) -> list[Lesson]:
    """Pictures ``first`` to ``first + n`` of a stream with ``per_scene`` questions each (without drawing them)."""
    scenes = [scene(split, seed, first + i) for i in range(n)]
    return [lesson(s, questions(s, per_scene, generator(split, seed, s.index, 2), kinds)) for s in scenes]


def all_patches(n: int) -> np.ndarray:
    """(n, 256): every patch."""
    return np.tile(np.arange(VISUAL_TOKENS), (n, 1))


def shorten(items: list[Lesson], keep: int, rng: np.random.Generator) -> PackedLesson:
    """Pack with ``keep`` visual tokens per picture; sometimes with consecutive position numbers."""
    return pack(items, np.stack([choose_patches(i, keep, rng) for i in items]), rng, spread=rng.random() < 0.7)


def labels_of(items: list[Lesson], packed: PackedLesson, lost: float, rng: np.random.Generator) -> Tensor:
    """Labels (B, K, 6) of the packed patches; a share ``lost`` of them is blanked."""
    labels = np.stack([i.labels[p] for i, p in zip(items, packed.patches.numpy(), strict=True)])
    labels[rng.random(labels.shape[:2]) < lost] = 0
    return torch.from_numpy(labels)


def lecture(items: list[Lesson], t: float, rng: np.random.Generator) -> PackedLesson:
    """The curriculum: few tokens, then a varying number, then half of the time all of them."""
    if t < 0.35:
        return shorten(items, FEW[0], rng)
    if t < 0.7 or rng.random() < 0.5:
        return shorten(items, int(rng.choice(FEW)), rng)
    return pack(items, all_patches(len(items)), rng, late=rng.random() < 0.5)


def build_decoder(seed: int) -> LlamaModel:
    """The decoder at its start; plurals start as their singulars."""
    config: LlamaConfig = decoder_config()
    config._attn_implementation = "eager"
    decoder = LlamaModel(config)
    start_decoder(decoder, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        words = decoder.embed_tokens.weight
        for one, many in zip(SHAPES, PLURALS, strict=True):
            words[TOKEN[many]] = 0.8 * words[TOKEN[one]] + 0.3 * words[TOKEN[many]]
    return decoder


class DecoderStage(Stage):
    """Decoder, label features and probes on ``BATCH`` pictures a step."""

    def __init__(self, seed: int, steps: int, bf16: bool) -> None:
        super().__init__(seed, steps, bf16)
        self.decoder, self.features, self.probes = build_decoder(seed), LabelFeatures(), FactProbes()
        self.features.start(self.decoder.embed_tokens.weight, torch.Generator().manual_seed(seed + 1))
        self.watch = AttentionWatch(self.decoder)

    def batch(self, step: int) -> dict[str, Any]:
        t, rng = step / self.steps, np.random.default_rng([self.seed, step])
        items = lessons("train", self.seed + 1000, step * BATCH, BATCH, QUESTIONS, LOOKUPS if t < 0.06 else KINDS)
        packed = lecture(items, t, rng)
        depth, cut = (8 if t < 0.35 else DECODER_LAYERS), int(rng.choice((6, 7, 9, 10)))
        guide = min(1.0, max(0.2, (0.9 - t) / 0.4))
        return {
            "items": items,
            "packed": packed,
            "labels": labels_of(items, packed, 0.1, rng),
            "depth": depth,
            "cut": cut,
            "guide": guide,
        }

    def forward(
        self, items: list[Lesson], packed: PackedLesson, labels: Tensor, depth: int, cut: int, guide: float
    ) -> dict[str, Any]:
        with self.autocast():
            last, states = decode(self.decoder, self.features(labels, packed.patches), packed, depth, cut)
        answer, hits = answer_loss(self.decoder, last, packed)
        lookup, shared = attention_loss(self.watch, packed, depth)
        facts = probe_loss(self.probes, states, packed)
        losses = {"answer": answer.item(), "lookup": lookup.item(), "shared": shared.item(), "facts": facts.item()}
        return {
            "loss": answer + guide * (0.3 * lookup + 0.15 * shared + 0.1 * facts),
            **losses,
            **accuracy_by_kind(list(hits), items),
        }

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return optimizers(self.named_parameters(), matrix=0.006, query_key=0.0015, embedding=1e-3, rest=1.5e-3)

    def rate(self, step: int) -> float:
        return rate(step / self.steps)

    @torch.no_grad()
    def validate(self, n: int = 32) -> dict[str, float]:
        """Accuracy per kind on label features, all 256 tokens."""
        rng, hits, items = np.random.default_rng(0), [], lessons("validation", 0, 0, n, QUESTIONS)
        for i in range(0, n, 8):
            packed = pack(items[i : i + 8], all_patches(8), rng)
            visual = self.features(labels_of(items[i : i + 8], packed, 0.0, rng), packed.patches)
            last, _ = decode(self.decoder, visual, packed, DECODER_LAYERS, DECODER_LAYERS)
            hits += list(answer_loss(self.decoder, last, packed)[1])
        return accuracy_by_kind(hits, items)
