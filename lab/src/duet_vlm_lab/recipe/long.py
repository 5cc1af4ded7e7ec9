"""The decoder of the tiny video model learns to find what is brief among hundreds of frames.

It learns from answers, and with two supports for what a clip's rows should remember: where something shows, one head
each of two early layers is told, less and less, to look back at what showed before that, and a linear read-out should
find its name there. Where text looks nobody tells it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from duet_vlm.evaluation.tiny.network import FEATURE_LAYER, HEAD_SIZE, WIDTH
from duet_vlm_lab.generators.long_clips import ROWS, LongClip, long_clip, render
from duet_vlm_lab.generators.long_questions import KINDS, LongQuestion, question
from duet_vlm_lab.generators.long_questions import name as name_of
from duet_vlm_lab.networks.long_network import LONG_TOKEN, start_from_clips
from duet_vlm_lab.recipe.chain_packing import PREFIX, PackedChains, answer_loss, decode, pack
from duet_vlm_lab.recipe.optim import optimizers, rate
from duet_vlm_lab.recipe.stages import Stage
from duet_vlm_lab.recipe.tower import to_pixels

ASKED = ("beside",) * 7 + ("when",) * 3 + ("order",) + ("read",) + ("count",) * 4
CLIPS, WHOLE_FRAMES = 8, 384  # clips of a step with few rows; frames of a step that shows them whole, about
SHOWN = (64, 128, 192, 256)  # frames of a clip
FEW = (24, 48, 96)  # visual rows of the shortened clips
# until when which share of the steps is whole, of how many of the lengths
PARTS = ((0.3, 0.0, 1), (0.6, 0.35, 1), (0.8, 0.5, 2), (1.0, 0.4, 4))
BACK_LAYERS, BACK_HEAD = (1, 2), 2  # look back
MEMORY_LAYER = 4  # what enters it should know what came before


def questions(clip: LongClip) -> list[LongQuestion]:
    """Questions about a clip in training."""
    rng = clip.generator(2)
    return [question(clip, kind, rng) for kind in ASKED]


def chosen(clip: LongClip, keep: int, rng: np.random.Generator) -> np.ndarray:
    """``keep`` rows in order, enough for every question: of every event two at most, half of them CLS, the rest by
    chance.

    Any row of a frame will do: it holds one thing at most, and all of them have seen it.
    """
    score = rng.random(clip.frames * ROWS)
    for event in clip.events:
        for _ in range(2):
            frame, row = event.first + int(rng.integers(event.frames)), int(rng.integers(1 - ROWS, ROWS))
            score[frame * ROWS + max(0, row)] += 1
    return np.sort(np.argsort(-score)[:keep])


def numbers(clip: LongClip, rows: np.ndarray) -> np.ndarray:
    """(K,): number of the event that shows, from 1; 0 where none does."""
    known = np.zeros(clip.frames, int)
    for number, event in enumerate(clip.events, 1):
        known[event.first : event.first + event.frames] = number
    return known[rows // ROWS]


def before(clip: LongClip, number: np.ndarray) -> np.ndarray:
    """(K,): the token of what showed before the event of that ``number`` ("<pad>": nothing), -100 without one."""
    return np.array([-100, LONG_TOKEN["<pad>"], *(LONG_TOKEN[name_of(event)] for event in clip.events)])[number]


def everything(clips: list[LongClip]) -> np.ndarray:
    """(B, K): all rows of clips of one length."""
    return np.tile(np.arange(clips[0].frames * ROWS), (len(clips), 1))


def by_kind(hits: list[Tensor], asked: list[list[LongQuestion]]) -> dict[str, float]:
    """Share of right answers per kind, and the mean of the kinds."""
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for row, mine in zip(hits, asked, strict=True):
        for hit, one in zip(row.tolist(), mine, strict=True):
            found[one.kind].append(hit)
    out = {kind: round(float(np.mean(v)), 3) for kind, v in found.items()}
    return {"all": round(float(np.mean(list(out.values()))), 3), **out}


class LongStage(Stage):
    """Projector and decoder: clips of all lengths with few rows first, then more and more clips with all of theirs, the
    longest last."""

    def __init__(self, seed: int, steps: int, bf16: bool) -> None:
        super().__init__(seed, steps, bf16)
        self.core = start_from_clips().model
        self.core.video_tower.requires_grad_(False)
        self.core.image_tower.requires_grad_(False)
        # the read-out, in training only
        self.memory = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, len(LONG_TOKEN)))
        layers, self.kept = self.core.language_model.layers, dict[Any, Tensor]()
        layers[MEMORY_LAYER].input_layernorm.register_forward_pre_hook(lambda _, args: self.kept.update(memory=args[0]))
        for i in BACK_LAYERS:
            for which in ("q_proj", "k_proj"):
                getattr(layers[i].self_attn, which).register_forward_hook(self._keep(i, which))

    def _keep(self, layer: int, which: str) -> Any:
        def hook(_module: nn.Module, _args: tuple, output: Tensor) -> None:
            self.kept[layer, which] = output

        return hook

    def batch(self, step: int) -> dict[str, Any]:
        rng = np.random.default_rng([self.seed, 31, step])
        _, share, lengths = next(part for part in PARTS if step / self.steps < part[0])
        whole = rng.random() < share
        frames = int(rng.choice(SHOWN[:lengths] if whole else SHOWN))
        clips = [
            long_clip("train", self.seed, step * CLIPS + i, frames)
            for i in range(WHOLE_FRAMES // frames if whole else CLIPS)
        ]
        keep = int(rng.choice(FEW))
        rows = everything(clips) if whole else np.stack([chosen(clip, keep, rng) for clip in clips])
        return {**self.packed(clips, rows), "guide": 0.3 * max(0.0, 1 - step / self.steps / 0.7)}

    def packed(self, clips: list[LongClip], rows: np.ndarray) -> dict[str, Any]:
        asked = [questions(clip) for clip in clips]
        numbered = np.stack([numbers(clip, mine) for clip, mine in zip(clips, rows, strict=True)])
        return {
            "clips": clips,
            "asked": asked,
            "rows": rows,
            "numbered": numbered,
            "packed": pack(asked, rows, clips[0].frames * ROWS, LONG_TOKEN),
        }

    def answers(
        self, clips: list[LongClip], asked: list[list[LongQuestion]], rows: np.ndarray, packed: PackedChains
    ) -> tuple[Tensor, Tensor]:
        """Loss and hits. Only frames of which a row is handed over go through the tower."""
        visual = torch.stack([self.seen(clip, mine) for clip, mine in zip(clips, rows, strict=True)])
        with self.autocast():
            last = decode(self.core.language_model, self.core.multi_modal_projector(visual), packed)
        return answer_loss(self.core.language_model, last, packed)

    @torch.no_grad()
    def seen(self, clip: LongClip, rows: np.ndarray) -> Tensor:
        """Features of some patches of a clip from the tower, (K, WIDTH)."""
        frames, place = np.unique(rows // ROWS, return_inverse=True)
        with self.autocast():
            pixels = to_pixels(list(render(clip)[frames]))
            states = self.core.video_tower(pixels, output_hidden_states=True).hidden_states[FEATURE_LAYER]
        return states[torch.from_numpy(place), torch.from_numpy(rows % ROWS)].float()

    def forward(self, **batch: Any) -> dict[str, Any]:
        guide, numbered = batch.pop("guide"), batch.pop("numbered")
        answer, hits = self.answers(**batch)
        known = torch.from_numpy(
            np.stack([before(clip, mine) for clip, mine in zip(batch["clips"], numbered, strict=True)])
        )
        memory = F.cross_entropy(
            self.memory(self.kept["memory"][:, PREFIX : PREFIX + known.shape[1]].float()).flatten(0, 1), known.flatten()
        )
        back = self.back_loss(batch["packed"], torch.from_numpy(numbered))
        numbers = {"answer": answer.item(), "memory": memory.item(), "back": back.item(), "tokens": known.shape[1]}
        return {"loss": answer + 0.5 * memory + guide * back, **numbers, **by_kind(list(hits), batch["asked"])}

    def back_loss(self, packed: PackedChains, numbered: Tensor) -> Tensor:
        """-log of the attention that rows of an event pay to those of the event before it; those of the first: to
        ``<s>``."""
        b, front = len(numbered), PREFIX + numbered.shape[1]
        # <s> is number 0
        event = torch.cat([torch.tensor([[0, -1]]).expand(b, -1), torch.where(numbered > 0, numbered, -1)], 1)
        previous = event[:, None] == event[:, :, None] - 1
        rotary, total = (
            self.core.language_model.rotary_emb(self.kept["memory"].float(), packed.positions[:, :front]),
            torch.zeros(()),
        )
        for layer in BACK_LAYERS:
            kept = (self.kept[layer, which][:, :front].float() for which in ("q_proj", "k_proj"))
            heads = (states.view(b, front, -1, HEAD_SIZE)[:, None, :, BACK_HEAD] for states in kept)
            query, key = apply_rotary_pos_emb(*heads, *rotary)
            score = (query @ key.transpose(2, 3))[:, 0] / HEAD_SIZE**0.5
            score = score.masked_fill(~torch.ones(front, front, dtype=torch.bool).tril(), -1e9)
            missed = score.logsumexp(2) - score.masked_fill(~previous, -1e9).logsumexp(2)
            total = total + missed[(event > 0) & previous.any(2)].mean()
        return total / len(BACK_LAYERS)

    def optimizers(self) -> list[torch.optim.Optimizer]:
        learning = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        return optimizers(learning, matrix=0.003, query_key=0.0015, embedding=1e-3, rest=1e-3)

    def rate(self, step: int) -> float:
        return rate(step / self.steps, flat=0.6)

    @torch.no_grad()
    def validate(self, clips: int = 8) -> dict[str, float]:
        """Accuracy per kind on whole validation clips of the shortest and the longest kind, and on short ones with few
        rows."""
        out: dict[str, float] = {}
        for name, frames, keep in (
            ("", SHOWN[0], None),
            (f"{SHOWN[-1]}_", SHOWN[-1], None),
            ("few_", SHOWN[0], FEW[1]),
        ):
            rng, hits, asked = np.random.default_rng(0), [], []
            for first in range(0, clips, 2):
                some = [long_clip("validation", 0, first + i, frames) for i in range(2)]
                rows = everything(some) if keep is None else np.stack([chosen(clip, keep, rng) for clip in some])
                made = self.packed(some, rows)
                made.pop("numbered")
                hits += list(self.answers(**made)[1])
                asked += made["asked"]
            out |= {f"{name}{kind}": value for kind, value in by_kind(hits, asked).items()}
        return out
