"""Trace of a finished prompt: tokens kept, merged and dropped, and the token counts of each layer.

Copies from the device on demand.
"""

from __future__ import annotations

from torch import Tensor

from duet_vlm.planning.tokens import SpanTrace, StageTrace
from duet_vlm.runtime.context import EncodedFeatures
from duet_vlm.runtime.prompt import LayerGroup, PromptState


def rows_per_layer(prompt_state: PromptState) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Per sample: (visual tokens, all tokens) at the input of each layer, counted on the token maps that the layers
    used."""
    counts = [
        (group.tokens.visual.sum(1).tolist(), group.tokens.valid.sum(1).tolist()) for group in prompt_state.layer_groups
    ]
    used = [
        counts[prompt_state.layer_groups.index(prompt_state.layer_group(layer))] for layer in range(prompt_state.depth)
    ]
    return [
        (tuple(visual[sample] for visual, _ in used), tuple(rows[sample] for _, rows in used))
        for sample in range(len(prompt_state.spans))
    ]


def trace_of(prompt_state: PromptState) -> list[list[SpanTrace]]:
    """The history of every span, token numbers counted within the span (without the CLS row of official presets).

    A token that the encoder stage dropped or merged, and that was restored since it predicts, counts as kept.
    """
    rank = prompt_state.prompt.visual.cumsum(1) - 1
    ranks = rank.tolist()
    protected_ranks = [
        {ranks[b][s] for s in slots}
        for b, slots in enumerate(_selected_positions(prompt_state.prompt.prompt_index, prompt_state.prompt.protected))
    ]
    kept_ranks = []  # per layer group: the visual ranks of each sample that are kept
    for group in prompt_state.layer_groups:
        kept_ranks.append(
            [
                {ranks[b][s] for s in slots}
                for b, slots in enumerate(_selected_positions(group.tokens.prompt_index, group.tokens.visual))
            ]
        )
    history: list[list[SpanTrace]] = []
    number = 0
    for sample, spans in enumerate(prompt_state.spans):
        row: list[SpanTrace] = []
        for span in spans:
            source = prompt_state.sources[number]
            token_at, merged = _after_encoder(*source, span.tokens)
            number += 1
            restored = {
                r - span.offset
                for r in protected_ranks[sample]
                if 0 <= r - span.offset < span.tokens and token_at[r - span.offset] < 0
            }
            for token in restored:
                token_at[token] = token
            merged = {anchor: tuple(m for m in members if m not in restored) for anchor, members in merged.items()}
            merged = {anchor: members for anchor, members in merged.items() if members}
            tower = _tower_trace(*source, span.tokens)
            before = set(range(span.tokens) if tower is None else tower.kept) - {
                m for members in merged.values() for m in members
            }
            stages: list[StageTrace] = []
            for group, group_ranks in zip(prompt_state.layer_groups, kept_ranks, strict=True):
                current = {
                    token_at[r - span.offset]
                    for r in group_ranks[sample]
                    if span.offset <= r < span.offset + span.tokens
                }
                kept = {token for token in current if token >= 0}
                into = {}
                for anchor, members in _merged_before(group, sample, ranks[sample]).items():
                    # tokens of other images count as dropped there
                    own_members = [m - span.offset for m in members if 0 <= m - span.offset < span.tokens]
                    if 0 <= anchor - span.offset < span.tokens and own_members:
                        into[token_at[anchor - span.offset]] = tuple(sorted(token_at[m] for m in own_members))
                left = tuple(sorted(before - kept - {m for members in into.values() for m in members}))
                if stages and prompt_state.config.reducer.reenters:  # asleep of all that entered
                    stages.append(StageTrace(group.first_layer, tuple(sorted(kept)), (), into, left))
                    continue
                stages.append(StageTrace(group.first_layer, tuple(sorted(kept)), left, into))
                before = kept
            row.append(SpanTrace(span, merged, tuple(stages), tower))
        history.append(row)
    return history


def _selected_positions(positions: Tensor, mask: Tensor) -> list[list[int]]:
    """Per sample the prompt positions [B, T] where ``mask`` [B, T] is True."""
    selected = []
    for row, flags in zip(positions.tolist(), mask.tolist(), strict=True):
        selected.append([position for position, flag in zip(row, flags, strict=True) if flag])
    return selected


def _merged_before(group: LayerGroup, sample: int, ranks: list[int]) -> dict[int, tuple[int, ...]]:
    """Merged tokens before a group's first layer: anchor -> members, by visual rank in the prompt.

    A token may have several anchors.
    """
    merged: dict[int, tuple[int, ...]] = {}
    selection = group.merged_into
    if selection is not None:
        index = selection.index[sample].tolist()
        members = selection.source_tokens[sample].tolist()
        into = selection.target_row[sample].tolist()
        for member, row in zip(members, into, strict=True):
            if row >= 0 and member != index[row]:
                anchor = ranks[index[row]]
                merged[anchor] = (*merged.get(anchor, ()), ranks[member])
    return merged


def _tower_trace(encoded: EncodedFeatures, number: int, tokens: int) -> StageTrace | None:
    """The tokens of a span that went through a reduced tower."""
    if encoded.accounting.tower_survivors is None:
        return None
    survivors = encoded.accounting.tower_survivors[number, int(encoded.cls_token) :][:tokens].tolist()
    kept = tuple(token for token, flag in enumerate(survivors) if flag)
    return (
        None
        if len(kept) == tokens
        else StageTrace(-1, kept, tuple(token for token, flag in enumerate(survivors) if not flag))
    )


def _after_encoder(encoded: EncodedFeatures, number: int, tokens: int) -> tuple[list[int], dict[int, tuple[int, ...]]]:
    """The token at each position of a span after the encoder stage, and the merged ones: anchor -> members."""
    selection = encoded.selection
    slots = encoded.slots
    if selection is None or slots is None:
        return list(range(tokens)), {}
    shift = int(encoded.cls_token)
    index = selection.index[number].tolist()
    valid = selection.valid[number].tolist()
    token_at = [-1] * tokens
    for source, slot, is_valid in zip(index, slots[number].tolist(), valid, strict=True):
        if is_valid:
            token_at[slot] = source - shift
    merged: dict[int, tuple[int, ...]] = {}
    for member, into in zip(
        selection.source_tokens[number].tolist(), selection.target_row[number].tolist(), strict=True
    ):
        if into >= 0 and member != index[into]:
            anchor = index[into] - shift
            merged[anchor] = (*merged.get(anchor, ()), member - shift)
    return token_at, merged
