"""What the reduced model should compute, the slow way: every row alone, the full sequence, nothing dropped, nothing
cached, no hooks.

Dropped columns are hidden by an eager mask per layer; merged rows are computed from the tower's own features. Only the
*choice* of tokens is taken from the run under test (test_invariants checks it against attention maps); everything that
follows is computed anew here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from families import FAMILIES, Family, Inputs, Row, shared
from torch import Tensor, nn

from duet_vlm import Handle
from duet_vlm.reducers.inputs import Input

Weights = tuple[float, ...] | None  # of tokens in a row that they join


class CustomRow(NamedTuple):
    """A row that a module of the method's own made; later levels are merged by ``weights``, as no module made any of
    theirs."""

    row: Tensor
    weights: Weights


Made = Weights | CustomRow
Entered = dict[int, tuple[int, tuple[int, ...], Made]]  # token -> (source, tokens merged into it, how)


@dataclass
class Choice:
    """What the run decided for one sample; slots count within the unpadded prompt.

    ``rows`` are the tokens that entered, per span, and ``places`` the slots of all its tokens; ``alive[layer]`` are the
    slots left from that layer on, ``merged[layer]`` the slots of the rows that others joined in front of it, with
    those, what they weigh and how. ``cut``: layers in which what is generated sees only the rows that reached the last
    one. ``sleeps``: rows that a layer leaves out may come back, with the state that they had.
    """

    slots: int
    positions: str
    merge: str
    rows: list[Entered]
    places: list[list[int]]
    images: list[tuple[str, int]]  # which image or clip each span is: stream and number in its encoder call
    alive: dict[int, frozenset[int]]
    cls_token: bool = False
    merged: dict[int, list[tuple[int, tuple[int, ...], tuple[float, ...] | None, str]]] = field(default_factory=dict)
    cut: frozenset[int] = frozenset()
    projected: bool = False  # rows are merged behind the projector
    sleeps: bool = False

    def visible(self, layer: int) -> frozenset[int]:
        return self.alive[max(first for first in self.alive if first <= layer)]


@dataclass
class Walk:
    """Logits [T, V] of one row, and the attention [T, T] (mean over heads) that layers paid on the way."""

    logits: Tensor
    attention: dict[int, Tensor] = field(default_factory=dict)


def choices_of(handle: Handle) -> list[Choice]:
    """The decisions of the last run, read from its token maps and selections."""
    run = handle._prompt_state
    assert run is not None
    choices = []
    number = 0
    for sample, spans in enumerate(run.spans):
        valid = run.prompt.valid[sample]
        place = (valid.long().cumsum(0) - 1).tolist()
        visual = [place[s] for s in run.prompt.visual[sample].nonzero().flatten().tolist()]
        sources = run.sources[number : number + len(spans)]
        images = [(encoded.modality, image) for encoded, image in sources]
        rows = [_entered(run.positions, *source, span.tokens) for source, span in zip(sources, spans, strict=True)]
        places = [visual[span.offset : span.offset + span.tokens] for span in spans]
        number += len(spans)
        # a last token that V2V left out, but whose row predicts
        for span, span_rows, span_places in zip(spans, rows, places, strict=True):
            last = place[int(run.prompt.prompt_index[sample][run.prompt.visual[sample]][span.offset + span.tokens - 1])]
            there = {
                place[s]
                for s in run.layer_groups[0]
                .tokens.prompt_index[sample][run.layer_groups[0].tokens.valid[sample]]
                .tolist()
            }
            if last in there and span_places[-1] == last and span.tokens - 1 not in span_rows:
                span_rows[span.tokens - 1] = (span.tokens - 1, (), None)
        alive = {}
        for group in run.layer_groups:
            slots = group.tokens.prompt_index[sample][group.tokens.valid[sample]].tolist()
            assert slots == sorted(set(slots)), "rows must stay in order, each once"
            alive[group.first_layer] = frozenset(place[s] for s in slots)
        merging = [group for group in run.layer_groups if group.merged_into is not None]
        merged = {group.first_layer: _joined(group.merged_into, sample, place) for group in merging}
        selections = [encoded.selection for encoded, _ in run.sources if encoded.selection is not None]
        merge = selections[0].merge if selections else "mean"
        facts = (
            run.sources[0][0].cls_token,
            merged,
            frozenset(run.record.trimmed_layers),
            Input.PROJECTED_FEATURES in run.config.reducer.requires,
            run.config.reducer.reenters,
        )
        choices.append(Choice(int(valid.sum()), run.positions, merge, rows, places, images, alive, *facts))
    return choices


def _joined(
    selection: Any, sample: int, place: list[int]
) -> list[tuple[int, tuple[int, ...], tuple[float, ...] | None, str]]:
    """The rows of a drop inside the decoder that others joined."""
    into, members = selection.target_row[sample].tolist(), selection.source_tokens[sample].tolist()
    weights = None if selection.weights is None else selection.weights[sample].tolist()
    found = []
    for row, (anchor, real) in enumerate(
        zip(selection.index[sample].tolist(), selection.valid[sample].tolist(), strict=True)
    ):
        here = [number for number, target in enumerate(into) if target == row]
        if real and here:
            weigh = None if weights is None else tuple(weights[n] for n in here)
            found.append((place[anchor], tuple(place[members[n]] for n in here), weigh, selection.merge))
    return found


def _row(row: Tensor, members: Tensor, weigh: Made, merge: str) -> Tensor:
    """A row that others joined, one number after the other."""
    if isinstance(weigh, CustomRow):
        return weigh.row
    if weigh is not None:
        return sum(w * member for w, member in zip(weigh, members, strict=True))  # type: ignore[return-value]
    return torch.cat([row[None], members]).mean(0) if merge == "mean" else row + members.mean(0)


def _entered(positions: str, encoded: Any, number: int, tokens: int) -> Entered:
    selection = encoded.selection
    if selection is None:
        return {slot: (slot, (), None) for slot in range(tokens)}
    into = selection.target_row[number].tolist()
    members = selection.source_tokens[number].tolist()
    weights = None if selection.weights is None else selection.weights[number].tolist()
    entered = {}
    for row, (source, real) in enumerate(
        zip(selection.index[number].tolist(), selection.valid[number].tolist(), strict=True)
    ):
        if real:
            here = [place for place, target in enumerate(into) if target == row]
            joined: tuple[int, ...] = tuple(members[p] for p in here)
            weigh: Made = None if weights is None else tuple(weights[p] for p in here)
            if selection.custom_rows is not None and row < selection.custom_rows.shape[1]:
                weigh = CustomRow(selection.custom_rows[number, row].detach(), weigh)
            entered[len(entered) if positions == "compact" else source] = (source, joined, weigh)
    return entered


def family_of(model: nn.Module) -> Family:
    """The family of a tiny model: those of a group share what the oracle needs."""
    # those that share a class come last
    return next(family for family in reversed(FAMILIES.values()) if family.answers(model))


def entry_rows(
    model: nn.Module, features: Tensor, rows: Entered, choice: Choice, later: bool = False
) -> dict[int, Tensor]:
    """The embedding of each slot that entered, or what is added to it ``later``."""
    family, merge = family_of(model), choice.merge
    pointwise = family.pointwise(model)
    shift = 0 if choice.cls_token else family.skip()
    if choice.projected and pointwise is not None:
        features, pointwise = pointwise(features), None
    entered = {}
    for slot, (source, joined, weigh) in rows.items():
        row, weigh = features[source + shift], weigh.weights if later and isinstance(weigh, CustomRow) else weigh
        if joined:
            members = torch.stack([features[m + shift] for m in joined])
            row = _row(row, members, weigh, merge)
        entered[slot] = row if pointwise is None else pointwise(row[None])[0]
    return entered


def walk(
    model: nn.Module,
    ids: Tensor,
    images: Sequence[Tensor],
    deeper: Sequence[Sequence[Tensor]],
    grids: dict[str, Tensor],
    choice: Choice,
    watch: Sequence[int] = (),
) -> Walk:
    """One unpadded row: prompt and generated ids [T] through the eager decoder; ``images`` are its pictures' tower
    features, ``deeper`` the rows of each picture that are added behind the first layers."""
    family = family_of(model)
    hidden = model.get_input_embeddings()(ids)[None].clone()
    hidden_slots = set(range(choice.slots))
    for places, rows, features in zip(choice.places, choice.rows, images, strict=True):
        for token, row in entry_rows(model, features, rows, choice).items():
            hidden[0, places[token]] = row
    hidden = family.enter(model, hidden)
    total = len(ids)
    positions = family.positions(model, ids[: choice.slots], grids, total)
    result = Walk(hidden)
    for index in range(len(family.text(model).layers)):
        if index in choice.merged:
            before, hidden = hidden, hidden.clone()
            for anchor, joined, weigh, how in choice.merged[index]:
                hidden[0, anchor] = _row(before[0, anchor], before[0, list(joined)], weigh, how)
        seen = torch.ones(total, dtype=torch.bool)
        for slot in hidden_slots - choice.visible(index):
            seen[slot] = False
        if choice.positions == "compact":
            positions = (seen.long().cumsum(0) - 1).clamp(min=0)[None]
        allowed = (family.sees(model, ids, choice.slots, index) & seen[None]) | torch.eye(total, dtype=torch.bool)
        if index in choice.cut:
            allowed[choice.slots :, sorted(hidden_slots - choice.visible(len(family.text(model).layers)))] = False
        mask = torch.zeros(1, 1, total, total).masked_fill(~allowed, torch.finfo(torch.float32).min)
        rotary = family.rotary(model, hidden, positions, index)
        if index in watch:  # who is ranked in front of this layer has not left yet
            there = torch.ones(total, dtype=torch.bool)
            candidates = choice.visible(0 if choice.sleeps else max(0, index - 1))
            there[sorted(hidden_slots - candidates)] = False
            ranking = (family.ranks(model, ids, choice.slots, index) & there[None]) | torch.eye(total, dtype=torch.bool)
            shown = torch.zeros(1, 1, total, total).masked_fill(~ranking, torch.finfo(torch.float32).min)
            numbered = (there.long().cumsum(0) - 1).clamp(min=0)[None] if choice.positions == "compact" else positions
            turned = family.rotary(model, hidden, numbered, index)
            result.attention[index] = family.attended(
                model, index, hidden, position_embeddings=turned, attention_mask=shown
            )
        before = hidden
        hidden = family.run(model, index, hidden, seen, attention_mask=mask, position_embeddings=rotary)
        if choice.sleeps:
            hidden = torch.where(seen[None, :, None], hidden, before)
        for places, rows, levels in zip(choice.places, choice.rows, deeper, strict=True):
            if index < len(levels):  # rows that the encoder adds behind the first layers
                hidden = hidden.clone()
                for token, row in entry_rows(model, levels[index], rows, choice, later=True).items():
                    hidden[0, places[token]] += row
    result.logits = family.head(model, hidden)[0]
    return result


def walk_batch(
    model: nn.Module,
    inputs: Inputs,
    choices: Sequence[Choice],
    generated: Tensor | None = None,
    watch: Sequence[int] = (),
    differentiate: bool = False,
) -> list[Walk]:
    """Every sample of a batch through ``walk``, padding taken off; ``generated`` [len(choices), G] follow the prompts.
    With beams or several samples per prompt there are more choices than prompts."""
    with torch.set_grad_enabled(differentiate):
        return _walk_batch(model, inputs, choices, generated, watch)


def walks_of(family: str, rows: tuple[Row, ...], choices: Sequence[Choice]) -> list[Walk]:
    """``walk_batch`` over the rows of a shared model, once for runs in a row that decided the same (with a cache or
    not, padded left or right)."""
    key = family, rows, same(choices)
    if key not in LAST:
        if len(LAST) == 2:
            LAST.clear()
        LAST[key] = walk_batch(shared(family, "eager"), FAMILIES[family].inputs(rows), choices)
    return LAST[key]


LAST: dict[Any, list[Walk]] = {}


def same(decided: Any) -> Any:
    """A key that is equal where what was decided is, to the bit."""
    if isinstance(decided, Choice):
        return same(vars(decided))
    if isinstance(decided, Tensor):
        return tuple(decided.shape), decided.detach().numpy().tobytes()
    if isinstance(decided, dict):
        return tuple((name, same(value)) for name, value in decided.items())
    return tuple(map(same, decided)) if isinstance(decided, (list, tuple)) else decided


def _walk_batch(
    model: nn.Module, inputs: Inputs, choices: Sequence[Choice], generated: Tensor | None, watch: Sequence[int]
) -> list[Walk]:
    family = family_of(model)
    pictured = {"pixel_values", "pixel_values_videos", "pixel_values_images"} & set(inputs)
    features = family.features(model, inputs) if pictured else {}
    deeper = family.deeper(model, inputs) if pictured else {}
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
        levels = [deeper[name][number] if name in deeper else () for name, number in choice.images]
        walks.append(
            walk(model, ids, [features[name][number] for name, number in choice.images], levels, grids, choice, watch)
        )
    return walks


def step_logits(walks: Sequence[Walk], choices: Sequence[Choice], steps: int) -> list[Tensor]:
    """Per generated token the logits [B, V] that precede it."""
    return [
        torch.stack([w.logits[c.slots - 1 + step] for w, c in zip(walks, choices, strict=True)])
        for step in range(steps)
    ]
