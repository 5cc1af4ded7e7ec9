"""Reading a finished run: who was kept, merged and dropped, and how many rows each layer saw. Device reads happen here, on demand."""

from __future__ import annotations

from torch import Tensor

from duet_vlm.planning.tokens import SpanTrace, StageTrace
from duet_vlm.runtime.context import EncodedFeatures
from duet_vlm.runtime.decode.cache import LayerGroup, PromptState


def rows_per_layer(run: PromptState) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Per sample: (visual rows, all rows) at the input of each layer, counted on the maps that the layers really used."""
    counts = [(g.tokens.visual.sum(1).tolist(), g.tokens.valid.sum(1).tolist()) for g in run.layer_groups]
    used = [counts[run.layer_groups.index(run.layer_group(layer))] for layer in range(run.depth)]
    return [(tuple(visual[b] for visual, _ in used), tuple(rows[b] for _, rows in used)) for b in range(len(run.spans))]


def trace_of(run: PromptState) -> list[list[SpanTrace]]:
    """The history of every span, token numbers counted within the span (a fed CLS row of official presets is left out).

    A token that V2V left out, or merged, and that came back since its row predicts, is one that is kept.
    """
    rank = run.prompt.visual.cumsum(1) - 1
    ranks = rank.tolist()
    back = [{ranks[b][s] for s in slots} for b, slots in enumerate(_slots(run.prompt.prompt_index, run.prompt.protected))]
    alive = []  # per group: the visual ranks of each sample that are left
    for group in run.layer_groups:
        alive.append([{ranks[b][s] for s in slots} for b, slots in enumerate(_slots(group.tokens.prompt_index, group.tokens.visual))])
    history: list[list[SpanTrace]] = []
    number = 0
    for sample, spans in enumerate(run.spans):
        row: list[SpanTrace] = []
        for span in spans:
            source = run.sources[number]
            token_at, merged = _entry(*source, span.tokens)
            number += 1
            own = {r - span.offset for r in back[sample] if 0 <= r - span.offset < span.tokens and token_at[r - span.offset] < 0}
            for token in own:
                token_at[token] = token
            merged = {anchor: tuple(m for m in members if m not in own) for anchor, members in merged.items()}
            merged = {anchor: members for anchor, members in merged.items() if members}
            tower = _in_tower(*source, span.tokens)
            before = set(range(span.tokens) if tower is None else tower.kept) - {m for members in merged.values() for m in members}
            stages = []
            for group, left in zip(run.layer_groups, alive, strict=True):
                here = {token_at[r - span.offset] for r in left[sample] if span.offset <= r < span.offset + span.tokens}
                kept = {token for token in here if token >= 0}
                into = {}
                for anchor, members in _merged(group, sample, ranks[sample]).items():
                    own_members = [m - span.offset for m in members if 0 <= m - span.offset < span.tokens]  # of other images: dropped there
                    if 0 <= anchor - span.offset < span.tokens and own_members:
                        into[token_at[anchor - span.offset]] = tuple(sorted(token_at[m] for m in own_members))
                gone = before - kept - {m for members in into.values() for m in members}
                stages.append(StageTrace(group.first_layer, tuple(sorted(kept)), tuple(sorted(gone)), into))
                before = kept
            row.append(SpanTrace(span, merged, tuple(stages), tower))
        history.append(row)
    return history


def _slots(slot: Tensor, mask: Tensor) -> list[list[int]]:
    """Per sample the slots [B, T] where ``mask`` [B, T] is true."""
    return [[s for s, there in zip(*row, strict=True) if there] for row in zip(slot.tolist(), mask.tolist(), strict=True)]


def _merged(group: LayerGroup, sample: int, ranks: list[int]) -> dict[int, tuple[int, ...]]:
    """Who was merged into whom in front of a group's first layer, by visual rank in the prompt; a token may join several."""
    found: dict[int, tuple[int, ...]] = {}
    selection = group.merged_into
    if selection is not None:
        index, members, into = (x[sample].tolist() for x in (selection.index, selection.source_tokens, selection.target_row))
        for member, row in zip(members, into, strict=True):
            if row >= 0 and member != index[row]:
                anchor = ranks[index[row]]
                found[anchor] = (*found.get(anchor, ()), ranks[member])
    return found


def _in_tower(encoded: EncodedFeatures, number: int, tokens: int) -> StageTrace | None:
    """The tokens of a span that went through a reduced tower."""
    if encoded.tower_survivors is None:
        return None
    left = encoded.tower_survivors[number, int(encoded.cls_token) :][:tokens].tolist()
    kept = tuple(token for token, there in enumerate(left) if there)
    return None if len(kept) == tokens else StageTrace(-1, kept, tuple(token for token, there in enumerate(left) if not there))


def _entry(encoded: EncodedFeatures, number: int, tokens: int) -> tuple[list[int], dict[int, tuple[int, ...]]]:
    """Which token sits in each slot of a span after V2V, and who was merged into whom."""
    selection, slots = encoded.selection, encoded.slots
    if selection is None or slots is None:
        return list(range(tokens)), {}
    shift = int(encoded.cls_token)
    index, valid = selection.index[number].tolist(), selection.valid[number].tolist()
    token_at = [-1] * tokens
    for source, slot, real in zip(index, slots[number].tolist(), valid, strict=True):
        if real:
            token_at[slot] = source - shift
    merged: dict[int, tuple[int, ...]] = {}
    for member, into in zip(selection.source_tokens[number].tolist(), selection.target_row[number].tolist(), strict=True):
        if into >= 0 and member != index[into]:
            anchor = index[into] - shift
            merged[anchor] = (*merged.get(anchor, ()), member - shift)
    return token_at, merged
