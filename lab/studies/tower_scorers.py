"""Small networks that say which patches matter, from patch embeddings: what ``tower_tries.py`` tries. Learned from the
training split."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from duet_vlm.evaluation.tiny.labels import coverage
from duet_vlm.evaluation.tiny.questions import needed_patches, questions, split_words
from duet_vlm.evaluation.tiny.render import render, shape_mask
from duet_vlm.evaluation.tiny.scenes import GRID, Scene, scene
from duet_vlm_lab.generators import clips, clips_questions
from duet_vlm_lab.networks.video_network import VIDEO_TOKEN
from duet_vlm_lab.recipe.tower import MEAN, STD, to_pixels

PICTURES, CLIPS, BATCH, EPOCHS, SEED = 4000, 1200, 8, 4, 900
ASKED = 6  # questions to a picture
Sample = tuple[Tensor, list[str], Tensor]  # pixels [P, 3, H, W], texts [Q], target [Q, P / pictures.., h, w]


class Scorer(nn.Module):
    """Content of a patch, from its embedding and those around it: ``embedded`` [P, D, h, w] -> [P, h, w]."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(128, width, 1),
            nn.GELU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width, 1, 1),
        )

    def forward(self, embedded: Tensor) -> Tensor:
        return self.layers(embedded - embedded.mean((2, 3), keepdim=True))[:, 0]


class AskedScorer(nn.Module):
    """The same, with channels scaled and shifted by the mean of the question's word embeddings: texts [P] of the
    pictures."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(len(VIDEO_TOKEN), 32)
        self.first, self.around, self.last = (
            nn.Conv2d(128, width, 1),
            nn.Conv2d(width, width, 3, padding=1),
            nn.Conv2d(width, 1, 1),
        )
        self.turn = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 4 * width))

    def forward(self, embedded: Tensor, texts: Sequence[str]) -> Tensor:
        numbers = [
            torch.tensor([VIDEO_TOKEN[word] for word in split_words(text) if word in VIDEO_TOKEN]) for text in texts
        ]
        ends = torch.tensor([0, *(len(n) for n in numbers[:-1])]).cumsum(0)
        scale, shift, scale2, shift2 = self.turn(self.words(torch.cat(numbers), ends))[..., None, None].chunk(4, 1)
        hidden = self.first(embedded - embedded.mean((2, 3), keepdim=True))
        hidden = nn.functional.gelu(hidden * (1 + scale) + shift)
        hidden = nn.functional.gelu(self.around(hidden) * (1 + scale2) + shift2)
        return self.last(hidden)[:, 0]


def scorer_flops(net: nn.Module, patches: int) -> int:
    """Two for each multiply-add of its convolutions; the words cost next to nothing."""
    return sum(2 * patches * layer.weight.numel() for layer in net.modules() if isinstance(layer, nn.Conv2d))


def shown(drawn: Scene) -> np.ndarray:
    """The share of each patch that a thing or its print covers."""
    out = np.zeros(GRID * GRID, np.float32)
    for thing in drawn.things:
        boxes = [(thing.x, thing.y, shape_mask(thing.shape, thing.size))]
        if thing.tag:
            boxes.append((thing.tag.x, thing.tag.y, np.ones((thing.tag.height, thing.tag.width), np.float32)))
        for box in boxes:
            patches, share = coverage(*box)
            out[patches] = np.maximum(out[patches], share)
    return out


def scenes(count: int) -> list[Scene]:
    """Two of three crowded."""
    return [scene("train", SEED, i, dense=i % 3 == 0, crowded=i % 3 != 0) for i in range(count)]


@torch.enable_grad()
def fitted(net: nn.Module, batches: int, loss_of: Callable[[int], Tensor]) -> nn.Module:
    """Trained on every batch ``EPOCHS`` times."""
    optimizer = torch.optim.AdamW(net.parameters(), 5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=EPOCHS * batches)
    for number in torch.cat([torch.randperm(batches) for _ in range(EPOCHS)]).tolist():
        optimizer.zero_grad()
        loss_of(number).backward()
        optimizer.step()
        schedule.step()
    return net.eval()


@functools.cache
def scorer(embed: nn.Module) -> Scorer:
    """Learned to tell patches that show something; ``embed`` is the tower's patch embedding."""
    torch.manual_seed(0)
    net, data, drawn = Scorer(), [], scenes(PICTURES)
    for first in range(0, PICTURES, BATCH):
        some = drawn[first : first + BATCH]
        with torch.no_grad():
            data.append(
                (
                    embed(to_pixels([render(s) for s in some])),
                    torch.from_numpy(np.stack([shown(s) for s in some])).view(-1, GRID, GRID),
                )
            )

    def loss_of(number: int) -> Tensor:
        embedded, cover = data[number]
        return nn.functional.binary_cross_entropy_with_logits(net(embedded), (cover > 0.03).float())

    return fitted(net, len(data), loss_of)


def asked_pictures(first: int, count: int, split: str = "train") -> tuple[Tensor, list[str], Tensor]:
    """Pixels [P, 3, H, W], the texts of ``ASKED`` questions to each, and the patches that each answer needs [P * ASKED,
    h, w]."""
    pixels, texts, needed = [], [], []
    for i in range(first, first + count):
        drawn = scene(split, SEED, i, crowded=i % 2 == 1)
        pixels.append(render(drawn))
        for asked in questions(drawn, ASKED, drawn.generator(2)):
            texts.append(asked.text)
            needed.append(needed_patches(drawn, asked).reshape(GRID, GRID))
    return to_pixels(pixels), texts, torch.from_numpy(np.stack(needed)).float()


def asked_clips(first: int, count: int, split: str = "train") -> tuple[Tensor, list[str], Tensor]:
    """The same of every frame of ``count`` clips, a question of each kind; a frame is asked what its clip is."""
    pixels, texts, needed = [], [], []
    for i in range(first, first + count):
        drawn = clips.clip(split, SEED, i)
        pixels.append(clips.render(drawn))
        asked = clips_questions.questions(drawn, clips_questions.KINDS, drawn.generator(2))
        maps = np.stack(
            [
                a.needed.reshape(clips.FRAMES, clips.ROWS)[:, 1:].reshape(clips.FRAMES, clips.GRID, clips.GRID)
                for a in asked
            ],
            1,
        )
        needed.append(maps.reshape(-1, clips.GRID, clips.GRID))  # frame by frame, its questions
        texts += [a.text for _ in range(clips.FRAMES) for a in asked]
    frames = torch.from_numpy(np.concatenate(pixels)).permute(0, 3, 1, 2).float()
    return (frames / 255 - MEAN) / STD, texts, torch.from_numpy(np.concatenate(needed)).float()


@functools.cache
def asked_scorer(embed: nn.Module, moving: bool) -> AskedScorer:
    """Learned to tell the patches that a question's answer needs."""
    torch.manual_seed(0)
    net, data, draw = AskedScorer(), [], asked_clips if moving else asked_pictures
    step = 1 if moving else BATCH
    for first in range(0, CLIPS if moving else PICTURES, step):
        pixels, texts, needed = draw(first, step)
        with torch.no_grad():
            data.append((embed(pixels), texts, needed))

    def loss_of(number: int) -> Tensor:
        embedded, texts, needed = data[number]
        logits = net(embedded.repeat_interleave(len(texts) // len(embedded), 0), texts)
        return nn.functional.binary_cross_entropy_with_logits(logits, needed, pos_weight=torch.tensor(5.0))

    return fitted(net, len(data), loss_of)


def embedding_of(pixels: Tensor, embed: Any, grid: tuple[int, int]) -> Tensor:
    """Patch embeddings [P, D, h, w] of what the processor made of the patches [P, N, 3, side, side]."""
    return torch.einsum("nucij,dcij->ndu", pixels, embed.weight).unflatten(2, grid)
