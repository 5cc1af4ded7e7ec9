"""Many questions about one picture, or about two, in one sequence, and the decoder's pass over it.

``<s> USER:`` and the visual tokens come first. Every question with its answer follows; it sees these and itself, and
its position numbers start again. That is the single-turn computation at a fraction of the cost; there is nothing else
in it than tokens and answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from duet_vlm.evaluation.tiny.questions import split_words
from duet_vlm_lab.networks.chain_network import CHAIN_TOKEN

PREFIX = 2  # <s> USER:


class PackedQuestion(Protocol):
    """Any question."""

    text: str
    answer: str
    kind: str


@dataclass(frozen=True)
class PackedChains:
    """A batch of B prompts, K visual tokens each, Q questions each, T text rows; N = PREFIX + K + T rows.

    Attributes
    ----------
    ids : (B, T) tokens of the packed questions
    positions : (B, N)
    mask : (B, 1, T, N) bool, what a text row may see
    answer_rows, answers : (B, Q) text row of ``ASSISTANT:`` and the token to be said there
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor
    answer_rows: Tensor
    answers: Tensor


def pack(
    asked: Sequence[Sequence[PackedQuestion]], patches: np.ndarray, total: int, tokens: Mapping[str, int] = CHAIN_TOKEN
) -> PackedChains:
    """Pack a batch.

    Parameters
    ----------
    asked : list of lists of questions
        The same number for each prompt.
    patches : ndarray (B, K)
        Which of the ``total`` visual tokens are handed over; they keep their position numbers.
    tokens : mapping
        Numbers of the words; the first ones are the same in all of the tiny models.
    """
    b, k = patches.shape
    rows = [
        [[tokens[w] for w in (*split_words(q.text), "ASSISTANT:", q.answer)] for q in questions] for questions in asked
    ]
    length = max(sum(map(len, row)) for row in rows)
    ids, places, owners = (np.full((b, length), fill) for fill in (CHAIN_TOKEN["<pad>"], 0, -1))
    ends = np.array([np.cumsum([len(q) for q in row]) for row in rows])
    for i, row in enumerate(rows):
        n = ends[i, -1]
        ids[i, :n] = np.concatenate(row)
        places[i, :n] = np.concatenate([np.arange(len(q)) for q in row])
        owners[i, :n] = np.repeat(np.arange(len(row)), [len(q) for q in row])
    own = (owners[:, :, None] == owners[:, None]) & np.tri(length, dtype=bool)
    mask = np.concatenate([np.ones((b, length, PREFIX + k), bool), own], 2)[:, None]
    positions = np.concatenate([np.tile(np.arange(PREFIX), (b, 1)), patches + PREFIX, places + PREFIX + total], 1)
    answers = np.array([[q[-1] for q in row] for row in rows])
    return PackedChains(*(torch.from_numpy(x) for x in (ids, positions, mask, ends - 2, answers)))


def decode(decoder: LlamaModel, visual: Tensor, packed: PackedChains, turns: int = 1) -> Tensor:
    """Normalised states of the text rows, (B, T, WIDTH), from visual tokens (B, K, WIDTH), through all layers so many
    ``turns``.

    The stock layers, with their attention in two parts: the prefix is causal and never sees text, so no mask of N x N
    rows is needed.
    """
    b, front = len(visual), PREFIX + visual.shape[1]
    start = torch.tensor([[CHAIN_TOKEN["<s>"], CHAIN_TOKEN["USER:"]]]).expand(b, -1)
    hidden = torch.cat([decoder.embed_tokens(start), visual, decoder.embed_tokens(packed.ids)], 1)
    cos, sin = decoder.rotary_emb(hidden, packed.positions)
    for layer in [*decoder.layers] * turns:
        own, normed = layer.self_attn, layer.input_layernorm(hidden)
        shape = (b, hidden.shape[1], -1, own.head_dim)
        query, key, value = (p(normed).view(shape).transpose(1, 2) for p in (own.q_proj, own.k_proj, own.v_proj))
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        seen = F.scaled_dot_product_attention(
            query[:, :, :front], key[:, :, :front], value[:, :, :front], is_causal=True
        )
        read = F.scaled_dot_product_attention(query[:, :, front:], key, value, attn_mask=packed.mask)
        hidden = hidden + own.o_proj(torch.cat([seen, read], 2).transpose(1, 2).flatten(2))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return decoder.norm(hidden[:, front:])


def answer_loss(decoder: LlamaModel, last: Tensor, packed: PackedChains) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the answers (and a little of ``</s>``), and the hits (B, Q) bool."""

    def logits(rows: Tensor) -> Tensor:
        return last.gather(1, rows[..., None].expand(-1, -1, last.shape[-1])).float() @ decoder.embed_tokens.weight.T

    said = logits(packed.answer_rows)
    ends = logits(packed.answer_rows + 1).flatten(0, 1)
    loss = F.cross_entropy(said.flatten(0, 1), packed.answers.flatten())
    loss = loss + 0.1 * F.cross_entropy(ends, torch.full((len(ends),), CHAIN_TOKEN["</s>"]))
    return loss, said.argmax(-1) == packed.answers
