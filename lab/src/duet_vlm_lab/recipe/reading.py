"""The decoder on packed questions: forward pass, answer loss, and the two supports that get it past guessing.

*Attention supervision*: naming words and ``ASSISTANT:`` should look at the patches that show the things named.
*Probes*: after the look-up layers a naming word should know its thing, and ``ASSISTANT:`` how two named things differ.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaModel

from duet_vlm.evaluation.tiny.network import WIDTH
from duet_vlm.evaluation.tiny.questions import KINDS
from duet_vlm.evaluation.tiny.text import TOKEN
from duet_vlm_lab.recipe.packing import PREFIX, Lesson, PackedLesson

MENTION_LAYERS = (2, 3)  # one head each for these, first two heads
ANSWER_LAYERS = (3, 4)
COUNT_LAYERS, COUNT_HEAD = (3, 4), 3
SHARED_LAYERS = (5, 6, 9)  # mean over heads: where token pruning will read its scores
GUIDED_LAYERS = tuple(sorted({*MENTION_LAYERS, *ANSWER_LAYERS, *SHARED_LAYERS}))
FACT_LAYER, PAIR_LAYER = 4, 6
FACTS = (10, 8, 4, 11, 17)  # classes of shape, colour, size, digit, word


class FactProbes(nn.Module):
    """Linear read-outs of the decoder, used in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.facts = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, sum(FACTS) + 2))
        self.pairs = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4))


class AttentionWatch:
    """Keeps the attention weights of chosen layers of the running pass (needs the eager attention)."""

    def __init__(self, decoder: LlamaModel, layers: Iterable[int] = GUIDED_LAYERS):
        self.weights: dict[int, Tensor] = {}
        self.hooks = [decoder.layers[i].self_attn.register_forward_hook(self._keep(i)) for i in layers]

    def close(self) -> None:
        """Stop watching."""
        for hook in self.hooks:
            hook.remove()

    def _keep(self, layer: int):
        def hook(_module: nn.Module, _args: tuple, output: tuple) -> None:
            self.weights[layer] = output[1]

        return hook


def decode(
    decoder: LlamaModel, visual: Tensor, packed: PackedLesson, depth: int, cut: int
) -> tuple[Tensor, list[Tensor]]:
    """Run the packed sequence.

    Parameters
    ----------
    visual : Tensor (B, K, WIDTH)
    depth : int
        How many layers run.
    cut : int
        First layer that uses ``packed.late_mask``.

    Returns
    -------
    last : Tensor (B, T, WIDTH)
        Normalised states of the text rows.
    states : list of Tensor (B, T, WIDTH)
        Text rows after every layer.
    """
    b, k = visual.shape[:2]
    start = torch.tensor([[TOKEN["<s>"], TOKEN["USER:"]]]).expand(b, -1)
    hidden = torch.cat([decoder.embed_tokens(start), visual, decoder.embed_tokens(packed.ids)], 1)
    rotary, states = decoder.rotary_emb(hidden, packed.positions), []
    for i, layer in enumerate(decoder.layers[:depth]):
        hidden = layer(hidden, attention_mask=packed.mask if i < cut else packed.late_mask, position_embeddings=rotary)
        states.append(hidden[:, PREFIX + k :])
    return decoder.norm(hidden)[:, PREFIX + k :], states


def answer_logits(decoder: LlamaModel, last: Tensor, rows: Tensor) -> Tensor:
    """(B, Q, vocabulary) at the given rows (B, Q)."""
    return last.gather(1, rows[..., None].expand(-1, -1, WIDTH)).float() @ decoder.embed_tokens.weight.T


def answer_loss(decoder: LlamaModel, last: Tensor, packed: PackedLesson) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the answers (and a little of ``</s>``), and the hits (B, Q) bool."""
    logits = answer_logits(decoder, last, packed.answer_rows)
    loss = F.cross_entropy(logits.flatten(0, 1), packed.answers.flatten())
    ends = answer_logits(decoder, last, packed.answer_rows + 1).flatten(0, 1)
    loss = loss + 0.1 * F.cross_entropy(ends, torch.full((len(ends),), TOKEN["</s>"]))
    return loss, logits.argmax(-1) == packed.answers


def _miss(attention: Tensor, sees: Tensor) -> Tensor:
    """Mean of -log of the share of visual attention (..., K) on ``sees`` (..., K); rows with nothing to see do not
    count."""
    attention = attention.float()
    share = (attention * sees).sum(-1) / (attention.sum(-1) + 1e-6)
    counts = sees.any(-1).float()
    return -(torch.log(share + 1e-3) * counts).sum() / counts.sum().clamp(min=1)


def attention_loss(watch: AttentionWatch, packed: PackedLesson, depth: int) -> tuple[Tensor, Tensor]:
    """Loss of the look-up layers (heads 0 and 1) and of the shared layers (mean over heads)."""
    k = packed.patches.shape[1]
    picture, row = packed.mention_rows.T
    batch = torch.arange(len(packed.ids))[:, None]
    visual = slice(PREFIX, PREFIX + k)

    def mentions(layer: int) -> Tensor:  # (M, heads, K)
        return watch.weights[layer][picture, :, PREFIX + k + row, visual]

    def answers(layer: int) -> Tensor:  # (B, Q, heads, K)
        return watch.weights[layer][batch, :, PREFIX + k + packed.answer_rows, visual]

    lookup = sum(_miss(mentions(i)[:, :2], packed.mention_sees[:, None].expand(-1, 2, -1)) for i in MENTION_LAYERS)
    lookup = lookup + sum(_miss(answers(i)[:, :, :2], packed.answer_sees) for i in ANSWER_LAYERS)
    shared = [i for i in SHARED_LAYERS if i < depth]
    rest = sum(
        _miss(mentions(i).mean(1), packed.mention_sees) + _miss(answers(i).mean(2), packed.answer_sees.any(2))
        for i in shared
    )
    return lookup / 4, rest / (2 * len(shared))


def count_loss(watch: AttentionWatch, packed: PackedLesson) -> Tensor:
    """Teach one head to count whatever the number of visual tokens is.

    The plural gives the same attention, 1 / (n + 1), to each of the n centres and to all text together: the share of
    the text then tells n. Cross-entropy with that distribution.
    """
    k = packed.patches.shape[1]
    picture, row = packed.count_rows.T
    loss, each = torch.zeros(()), 1 / (packed.count_sees.sum(-1) + 1)
    for layer in COUNT_LAYERS:
        visual = watch.weights[layer][picture, COUNT_HEAD, PREFIX + k + row, PREFIX : PREFIX + k].float()
        text = (1 - visual.sum(-1)).clamp(min=0)
        logs = (torch.log(visual + 1e-4) * packed.count_sees).sum(-1) + torch.log(text + 1e-4)
        loss = loss - (each * logs).sum() / max(1, len(each))
    return loss / len(COUNT_LAYERS)


def probe_loss(probes: FactProbes, states: list[Tensor], packed: PackedLesson) -> Tensor:
    """Facts of the thing at its naming word; differences of two things at ``ASSISTANT:``."""
    picture, row = packed.mention_rows.T
    said = probes.facts(states[FACT_LAYER].float()[picture, row])
    loss = said.new_zeros(())
    for i, part in enumerate(said[:, :-2].split(FACTS, -1)):
        loss = loss + F.cross_entropy(part, packed.mention_facts[:, i].long())
    where = packed.mention_facts[:, 5:]
    known = ~where.isnan()
    loss = loss + F.smooth_l1_loss(said[:, -2:][known], where[known] / 4)
    rows = packed.answer_rows[..., None].expand(-1, -1, WIDTH)
    pairs = probes.pairs(states[PAIR_LAYER].float().gather(1, rows))
    known = ~packed.pair_facts[..., 0].isnan()
    if known.any():
        loss = loss + 2 * F.smooth_l1_loss(pairs[known], packed.pair_facts[known])
    return loss


def accuracy_by_kind(hits: list[Tensor], lessons: list[Lesson]) -> dict[str, float]:
    """Share of right answers per kind and the mean of the kinds; ``hits`` are rows (Q,) in the order of ``lessons``."""
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for row, item in zip(hits, lessons, strict=True):
        for hit, asked in zip(row.tolist(), item.questions, strict=True):
            found[asked.kind].append(hit)
    out = {kind: round(float(np.mean(v)), 3) for kind, v in found.items() if v}
    return {"all": round(float(np.mean(list(out.values()))), 3), **out}
