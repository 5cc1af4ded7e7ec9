"""The model ``tiny-chain``: the network of the tiny model with a few more words, and a shorter decoder, whose layers
are two in turn."""

from __future__ import annotations

import torch
from transformers import LlamaModel

from duet_vlm.evaluation.tiny.network import HEAD_SIZE, HEADS, WIDTH, decoder_config
from duet_vlm.evaluation.tiny.questions import PLURALS
from duet_vlm.evaluation.tiny.scenes import SHAPES
from duet_vlm.evaluation.tiny.text import TOKEN
from duet_vlm_lab.generators.chain_scenes import CELLS

NEW_WORDS = (",", ":", "both", "in", "pictures", "tag", "cell", *CELLS)
CHAIN_TOKEN = {**TOKEN, **{word: len(TOKEN) + i for i, word in enumerate(NEW_WORDS)}}
EMBEDDINGS = 128  # rows of the embedding table
# the decoder is so many layers, so often: a look that one question needs early another can use late
DISTINCT, TURNS = 2, 3
LAYERS = DISTINCT * TURNS
MATCH, VALUE, OUTPUT = 1.0, 0.5, 0.3  # how strong a layer starts: queries and keys, values, outputs
WORDNESS = 1.2  # length of what all words have in common; a word's own part is 1.7 long
SMALL = 0.02  # noise on every matrix


@torch.no_grad()
def start_alike(decoder: LlamaModel, rng: torch.Generator) -> None:
    """Set the start of the decoder in place: the same weak one in every layer.

    In half of the heads query and key are one projection, strong on the slowly turning rotary pairs: "look at what
    resembles me". In the other half both read what all words have in common: "look at the words", or whatever else
    there is. Values and outputs begin as a weak copy. No layer is told to do anything else than its neighbours.
    """
    words = decoder.embed_tokens.weight
    words.normal_(std=0.15, generator=rng)
    for one, many in zip(SHAPES, PLURALS, strict=True):
        words[TOKEN[many]] = 0.8 * words[TOKEN[one]] + 0.3 * words[TOKEN[many]]
    common = torch.randn(WIDTH, generator=rng, device="cpu")
    common /= common.norm()
    words += WORDNESS * common
    pairs = torch.full((HEAD_SIZE,), 0.3, device="cpu")
    pairs[HEAD_SIZE // 4 - 1 : HEAD_SIZE // 2] = 1
    pairs[3 * HEAD_SIZE // 4 - 1 :] = 1
    at_words = torch.zeros(HEAD_SIZE, WIDTH, device="cpu")
    at_words[HEAD_SIZE // 2 - 1] = 0.63 * common  # the slowest pair: everywhere alike
    for layer in decoder.layers:
        match = (
            MATCH
            * torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=rng, device="cpu"))[0]
            * pairs.repeat(HEADS)[:, None]
        )
        match -= (match @ common)[:, None] * common
        for head in match.split(HEAD_SIZE)[HEADS // 2 :]:
            head.mul_(0.05).add_(at_words)
        alike = torch.eye(WIDTH, device="cpu")
        starts = {"q_proj": match, "k_proj": match, "v_proj": VALUE * alike, "o_proj": OUTPUT * alike}
        for name, weight in starts.items():
            getattr(layer.self_attn, name).weight.copy_(
                weight + SMALL * torch.randn(WIDTH, WIDTH, generator=rng, device="cpu")
            )


def build_decoder(seed: int) -> LlamaModel:
    """The ``DISTINCT`` layers at their start."""
    torch.manual_seed(seed)
    decoder = LlamaModel(decoder_config(EMBEDDINGS, DISTINCT))
    start_alike(decoder, torch.Generator().manual_seed(seed))
    return decoder
