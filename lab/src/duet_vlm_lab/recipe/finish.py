"""Finish without guidance: attention is drawn anew where it was supervised, and learns from answers alone.

Joint training (``join.py``) tells some heads where to look, which flatters every method that drops tokens by the
decoder's attention. Going on without that loss is not enough: nothing pushes a pattern away that does no harm, and in a
trial of 1,000 steps it stayed. So the query and key matrices of every supervised layer go back to the start of an
untrained decoder, and the shipped model learns to use them again with no attention loss, no probes, and no mask that
knows what an answer needs. The tower stays as it is, as in LLaVA's instruction tuning: what the encoder's methods see
is the same before and after.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import LlamaModel, LlavaForConditionalGeneration

from duet_vlm.evaluation.tiny import load
from duet_vlm.evaluation.tiny.network import DECODER_LAYERS, VISUAL_TOKENS
from duet_vlm_lab.recipe.decoder import FEW, all_patches, lessons, shorten
from duet_vlm_lab.recipe.join import BATCH, QUESTIONS, pixels_of, validate, visual_tokens
from duet_vlm_lab.recipe.optim import optimizers, rate
from duet_vlm_lab.recipe.packing import PREFIX, Lesson, PackedLesson, pack
from duet_vlm_lab.recipe.reading import GUIDED_LAYERS, AttentionWatch, accuracy_by_kind, answer_loss, decode
from duet_vlm_lab.recipe.stages import Stage
from duet_vlm_lab.recipe.starts import start_decoder


@torch.no_grad()
def forget(decoder: LlamaModel, seed: int) -> None:
    """Put queries and keys of the supervised layers back to the start of an untrained decoder."""
    fresh = LlamaModel(decoder.config)
    start_decoder(fresh, torch.Generator().manual_seed(seed))
    for i in GUIDED_LAYERS:
        ours, theirs = decoder.layers[i].self_attn, fresh.layers[i].self_attn
        ours.q_proj.weight.copy_(theirs.q_proj.weight)
        ours.k_proj.weight.copy_(theirs.k_proj.weight)


class FinishStage(Stage):
    """Projector and decoder of the shipped model, on ``BATCH`` pictures a step.

    Queries and keys move at twice the rate of joint training: many of them start from nothing. Without ``cuts`` every
    picture keeps all its tokens: a start for comparisons with models that train on fewer.
    """

    def __init__(self, seed: int, steps: int, bf16: bool, cuts: bool = True) -> None:
        super().__init__(seed, steps, bf16)
        model, _ = load()
        model.set_attn_implementation("eager")  # the faster one at this size
        self.core, self.cuts = model.model, cuts
        self.core.vision_tower.requires_grad_(False)
        forget(self.core.language_model, seed)

    def batch(self, step: int) -> dict[str, Any]:
        rng = np.random.default_rng([self.seed, 8, step])
        items = lessons("train", self.seed + 4000, step * BATCH, BATCH, QUESTIONS)
        short = self.cuts and rng.random() < 0.5
        return {
            "items": items,
            "packed": shorten(items, int(rng.choice(FEW)), rng) if short else pack(items, all_patches(BATCH), rng),
        }

    def forward(self, items: list[Lesson], packed: PackedLesson) -> dict[str, Any]:
        with self.autocast():
            visual = visual_tokens(self.core, pixels_of(items))[0]
            kept = visual[torch.arange(len(items))[:, None], packed.patches]
            last, _ = decode(self.core.language_model, kept, packed, DECODER_LAYERS, DECODER_LAYERS)
        loss, hits = answer_loss(self.core.language_model, last, packed)
        return {
            "loss": loss,
            "tokens": packed.patches.shape[1],
            "answer": loss.item(),
            **accuracy_by_kind(list(hits), items),
        }

    def optimizers(self) -> list[torch.optim.Optimizer]:
        opts = optimizers(
            self.core.language_model.named_parameters(), matrix=0.003, query_key=0.0015, embedding=4e-4, rest=8e-4
        )
        return [
            *opts,
            torch.optim.AdamW(self.core.multi_modal_projector.parameters(), 8e-4, betas=(0.9, 0.98), weight_decay=0.01),
        ]

    def rate(self, step: int) -> float:
        return rate(step / self.steps, flat=0.5)

    def validate(self) -> dict[str, float]:
        return {**validate(self.core), "28": validate(self.core, keep=28)["all"]}


@torch.no_grad()
def looks(model: LlavaForConditionalGeneration, n: int = 48) -> dict[str, list]:
    """Attention of ``ASSISTANT:``, on ``n`` validation pictures with all tokens and ``QUESTIONS`` questions each.

    Returns
    -------
    dict
        ``mass`` (layers, heads): attention on the needed patches as a share of all attention, mean over the questions
        that need some. ``share``: the same of the attention on visual tokens only. ``patches``: the needed patches as a
        share of all, which is what ``share`` would be if attention were spread evenly.
    """
    model.set_attn_implementation("eager")  # the others do not tell
    decoder, rng = model.model.language_model, np.random.default_rng(0)
    watch, items = AttentionWatch(decoder, range(DECODER_LAYERS)), lessons("validation", 0, 0, n, QUESTIONS)
    mass, share, patches = [], [], []
    for i in range(0, n, BATCH):
        part = items[i : i + BATCH]
        packed = pack(part, all_patches(len(part)), rng)
        decode(decoder, visual_tokens(model.model, pixels_of(part))[0], packed, DECODER_LAYERS, DECODER_LAYERS)
        needed = packed.answer_sees.any(2)  # (B, Q, 256)
        picture, asked = needed.any(-1).nonzero().T
        shown, rows = needed[picture, asked].float(), PREFIX + VISUAL_TOKENS + packed.answer_rows[picture, asked]
        seen = torch.stack(
            [watch.weights[layer][picture, :, rows, PREFIX : PREFIX + VISUAL_TOKENS] for layer in range(DECODER_LAYERS)]
        )
        on_needed = torch.einsum("lmhk,mk->mlh", seen, shown)
        mass.append(on_needed)
        share.append(on_needed / seen.sum(-1).transpose(0, 1))
        patches.append(shown.mean(-1))
    watch.close()
    out = {"mass": torch.cat(mass).mean(0), "share": torch.cat(share).mean(0), "patches": torch.cat(patches).mean()}
    return {name: np.round(value.double().numpy(), 4).tolist() for name, value in out.items()}
