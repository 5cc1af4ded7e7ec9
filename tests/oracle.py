"""What the reduced model should compute, the slow way: every row alone, the full sequence, nothing dropped, nothing cached, no hooks.

Dropped columns are hidden by an eager mask per layer; merged rows are computed from the tower's own features. Only the *choice* of
tokens is taken from the run under test (test_invariants checks it against attention maps); everything that follows is computed anew here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from families import IMAGE, VIDEO, Inputs
from torch import Tensor, nn

from duet_vlm import Handle

Entered = dict[int, tuple[int, tuple[int, ...]]]  # slot -> (source token, tokens merged into it)


@dataclass
class Choice:
    """What the run decided for one sample; slots count within the unpadded prompt.

    ``rows`` are the image slots that entered, per span; ``alive[layer]`` are the slots left from that layer on.
    """

    slots: int
    positions: str
    merge: str
    rows: list[Entered]
    starts: list[int]
    images: list[tuple[str, int]]  # which image or clip each span is: stream and number in its encoder call
    alive: dict[int, frozenset[int]]
    cls_token: bool = False

    def visible(self, layer: int) -> frozenset[int]:
        return self.alive[max(first for first in self.alive if first <= layer)]


IMAGE_SIZES = ("image_grid_thw", "image_sizes")


@dataclass
class Walk:
    """Logits [T, V] of one row, and the attention [T, T] (mean over heads) that layers paid on the way."""

    logits: Tensor
    attention: dict[int, Tensor] = field(default_factory=dict)


def choices_of(handle: Handle) -> list[Choice]:
    """The decisions of the last run, read from its token maps and selections."""
    run = handle._run
    assert run is not None
    choices = []
    number = 0
    for sample, spans in enumerate(run.spans):
        valid = run.prompt.valid[sample]
        place = (valid.long().cumsum(0) - 1).tolist()
        visual = [place[s] for s in run.prompt.visual[sample].nonzero().flatten().tolist()]
        sources = run.sources[number : number + len(spans)]
        images = [(encoded.stream, image) for encoded, image in sources]
        rows = [_entered(run.positions, *source, span.tokens) for source, span in zip(sources, spans, strict=True)]
        starts = [visual[span.offset] for span in spans]
        number += len(spans)
        alive = {}
        for group in run.groups:
            slots = group.tokens.slot[sample][group.tokens.valid[sample]].tolist()
            assert slots == sorted(set(slots)), "rows must stay in order, each once"
            alive[group.first_layer] = frozenset(place[s] for s in slots)
        selections = [encoded.selection for encoded, _ in run.sources if encoded.selection is not None]
        merge = selections[0].merge if selections else "mean"
        choices.append(Choice(int(valid.sum()), run.positions, merge, rows, starts, images, alive, run.sources[0][0].cls_token))
    return choices


def _entered(positions: str, encoded: Any, number: int, tokens: int) -> Entered:
    selection = encoded.selection
    if selection is None:
        return {slot: (slot, ()) for slot in range(tokens)}
    into = selection.into[number].tolist()
    members = selection.members[number].tolist()
    entered = {}
    for row, (source, real) in enumerate(zip(selection.index[number].tolist(), selection.valid[number].tolist(), strict=True)):
        if real:
            joined = tuple(m for m, target in zip(members, into, strict=True) if target == row)
            entered[len(entered) if positions == "compact" else source] = (source, joined)
    return entered


def tower_features(model: nn.Module, inputs: Inputs) -> dict[str, list[Tensor]]:
    """Per image and clip the features that V2V merges: before the projector (LLaVA, CLS row first) or after the merger (Qwen)."""
    features = {}
    if model.config.model_type == "llava":
        states = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
        return {"image": list(states[model.config.vision_feature_layer])}
    for stream, pixels, sizes in (("image", "pixel_values", IMAGE_SIZES), ("video", "pixel_values_videos", ("video_grid_thw",))):
        if pixels in inputs:
            encode = getattr(model.model, f"get_{stream}_features")
            features[stream] = list(encode(inputs[pixels], **{key: inputs[key] for key in sizes if key in inputs}).pooler_output)
    return features


def entry_rows(model: nn.Module, features: Tensor, rows: Entered, merge: str, cls_token: bool) -> dict[int, Tensor]:
    """The embedding of each slot that entered."""
    pointwise = model.model.multi_modal_projector if model.config.model_type == "llava" else None
    shift = 1 if pointwise is not None and not cls_token else 0  # the tower's CLS row is not a token
    entered = {}
    for slot, (source, joined) in rows.items():
        row = features[source + shift]
        if joined:
            members = torch.stack([features[m + shift] for m in joined])
            row = torch.cat([row[None], members]).mean(0) if merge == "mean" else row + members.mean(0)
        entered[slot] = row if pointwise is None else pointwise(row[None])[0]
    return entered


def walk(model: nn.Module, ids: Tensor, images: Sequence[Tensor], grids: dict[str, Tensor], choice: Choice, watch: Sequence[int] = ()) -> Walk:
    """One unpadded row: prompt and generated ids [T] through the eager decoder; ``images`` are its pictures' tower features."""
    text = model.model.language_model
    hidden = model.get_input_embeddings()(ids)[None].clone()
    hidden_slots = set(range(choice.slots))
    for start, rows, features in zip(choice.starts, choice.rows, images, strict=True):
        for slot, row in entry_rows(model, features, rows, choice.merge, choice.cls_token).items():
            hidden[0, start + slot] = row
    total = len(ids)
    positions = original_positions(model, ids[: choice.slots], grids, total)
    result = Walk(hidden)
    for index, layer in enumerate(text.layers):
        seen = torch.ones(total, dtype=torch.bool)
        for slot in hidden_slots - choice.visible(index):
            seen[slot] = False
        if choice.positions == "compact":
            positions = (seen.long().cumsum(0) - 1).clamp(min=0)[None]
        allowed = (torch.ones(total, total, dtype=torch.bool).tril() & seen[None]) | torch.eye(total, dtype=torch.bool)
        mask = torch.zeros(1, 1, total, total).masked_fill(~allowed, torch.finfo(torch.float32).min)
        rotary = text.rotary_emb(hidden, positions)
        if index in watch:
            _, weights = layer.self_attn(
                hidden_states=layer.input_layernorm(hidden), position_embeddings=rotary, attention_mask=mask, past_key_values=None
            )
            result.attention[index] = weights[0].mean(0)
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary, position_ids=None, past_key_values=None)
    result.logits = model.lm_head(text.norm(hidden))[0]
    return result


def original_positions(model: nn.Module, prompt: Tensor, grids: dict[str, Tensor], total: int) -> Tensor:
    """0..T-1, or the M-RoPE positions of the prompt continued by one per token."""
    if not hasattr(model.model, "get_rope_index"):
        return torch.arange(total)[None]
    positions = torch.arange(len(prompt)).expand(3, 1, -1)
    if grids:
        kinds = (prompt == IMAGE).int() + 2 * (prompt == VIDEO).int()
        positions, _ = model.model.get_rope_index(prompt[None], kinds[None], **grids)
    later = torch.arange(total - len(prompt)) + positions.max() + 1
    return torch.cat([positions, later.expand(3, 1, -1)], -1)


def walk_batch(
    model: nn.Module,
    inputs: Inputs,
    choices: Sequence[Choice],
    generated: Tensor | None = None,
    watch: Sequence[int] = (),
    differentiate: bool = False,
) -> list[Walk]:
    """Every sample of a batch through ``walk``, padding taken off; ``generated`` [len(choices), G] follow the prompts. With beams or
    several samples per prompt there are more choices than prompts."""
    with torch.set_grad_enabled(differentiate):
        return _walk_batch(model, inputs, choices, generated, watch)


def _walk_batch(model: nn.Module, inputs: Inputs, choices: Sequence[Choice], generated: Tensor | None, watch: Sequence[int]) -> list[Walk]:
    features = tower_features(model, inputs) if {"pixel_values", "pixel_values_videos"} & set(inputs) else {}
    repeat = len(choices) // len(inputs["input_ids"])
    walks = []
    for sample, choice in enumerate(choices):
        row = sample // repeat
        ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
        if generated is not None:
            ids = torch.cat([ids, generated[sample]])
        grids = {
            key: inputs[key][numbers]
            for stream, key in (("image", "image_grid_thw"), ("video", "video_grid_thw"))
            if key in inputs and (numbers := [number for name, number in choice.images if name == stream])
        }
        walks.append(walk(model, ids, [features[name][number] for name, number in choice.images], grids, choice, watch))
    return walks


def step_logits(walks: Sequence[Walk], choices: Sequence[Choice], steps: int) -> list[Tensor]:
    """Per generated token the logits [B, V] that precede it."""
    return [torch.stack([w.logits[c.slots - 1 + step] for w, c in zip(walks, choices, strict=True)]) for step in range(steps)]
