"""The layout of a prompt: valid, visual, predicting and query tokens, and the spans of each sample.

Copied from the device once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from duet_vlm.ops.ragged import after_last_true, last_true, upload
from duet_vlm.planning.tokens import Span
from duet_vlm.reducers.base import Reducer
from duet_vlm.runtime.context import EncodedFeatures, ForwardContext, ReceivedFeatures
from duet_vlm.runtime.marks import is_marked
from duet_vlm.runtime.prompt import ProtectedCount
from duet_vlm.runtime.validation import not_finite, raise_if_invalid

Source = tuple[EncodedFeatures, int]  # an encoder call and the number of a span in it


@dataclass(frozen=True)
class PromptLayout:
    """Counts of a prompt on the host, one entry per sample.

    Attributes
    ----------
    lengths : tuple of int
        Valid tokens.
    num_queries : tuple of int
        Text queries.
    has_labels : tuple of bool
        Any token is supervised.
    protected : tuple of ProtectedCount
        Visual tokens that are always kept.
    num_text_after_image : tuple of int
        Valid tokens after the last visual one.
    num_visual : dict
        Modality -> placeholders.
    num_masked : dict
        Modality -> placeholders that the attention mask hides.
    """

    lengths: tuple[int, ...]
    num_queries: tuple[int, ...]
    has_labels: tuple[bool, ...]
    protected: tuple[ProtectedCount, ...]
    num_text_after_image: tuple[int, ...]
    num_visual: dict[str, tuple[int, ...]]
    num_masked: dict[str, tuple[int, ...]]


def predicting_rows(valid: Tensor, visual: Tensor, labels: Tensor | None, num_drafts: int) -> Tensor:
    """Visual tokens whose logits predict a token: [B, S] bool.

    These are the last valid token of a sample (also the last one before ``num_drafts`` draft tokens), and with labels
    each one before a supervised text token.
    """
    predicting = last_true(valid)
    if num_drafts:
        predicting[:, :-num_drafts] |= last_true(valid[:, :-num_drafts])
    if labels is not None:
        supervised = (labels.to(valid.device) != -100) & ~visual
        predicting[:, :-1] |= supervised[:, 1:]
    return predicting & visual & valid


def span_ends(received: ReceivedFeatures, placeholders: Tensor) -> Tensor:
    """[B, S] long: at the last token of each span its number (in the order of the features), -1 elsewhere."""
    rank = (placeholders.flatten().cumsum(0) - 1).view_as(placeholders)
    ends = upload([len(rows) for rows in received.features], placeholders.device).cumsum(0) - 1
    number = torch.searchsorted(ends, rank).clamp(max=len(ends) - 1)
    return torch.where(placeholders & (ends[number] == rank), number, -1)


def rows_that_stay(
    context: ForwardContext, predicting: Tensor, placeholders: dict[str, Tensor], embeds: Tensor
) -> tuple[Tensor, Tensor]:
    """The predicting tokens [B, S] bool whose features are available, and those of them that the encoder stage dropped."""
    dropped = predicting & is_marked(embeds).to(predicting.device)
    available = predicting & ~dropped
    for name, received in context.received.items():
        if received.decisions is not None and received.decisions.last is not None:
            available = available | (predicting & (span_ends(received, placeholders[name]) >= 0))
    return available, dropped & available


def read_layout(
    context: ForwardContext,
    reducer: Reducer,
    placeholders: dict[str, Tensor],
    valid: Tensor,
    queries: Tensor,
    protected: Tensor,
    dropped_protected: Tensor,
    document_starts: Tensor,
) -> PromptLayout:
    """The one device-to-host copy of a prefill; checks that would need a copy of their own are made here, too."""
    supervised = (
        torch.zeros_like(valid) if context.call.labels is None else (context.call.labels.to(valid.device) != -100)
    )
    finite = torch.ones((), dtype=torch.bool, device=valid.device)
    invalid_code = torch.zeros((), dtype=torch.long, device=valid.device)
    for received in context.received.values():
        if received.decisions is not None and received.decisions.checks.finite is not None:
            finite = finite & received.decisions.checks.finite.to(valid.device)
        if received.decisions is not None and received.decisions.checks.invalid_code is not None:
            invalid_code = torch.maximum(invalid_code, received.decisions.checks.invalid_code.to(valid.device))
    visual = torch.stack(list(placeholders.values())).any(0)
    text_after = valid & after_last_true(visual)
    masked = [positions & ~valid for positions in placeholders.values()]
    masks = (
        valid,
        queries,
        supervised,
        protected,
        dropped_protected,
        text_after,
        document_starts,
        *placeholders.values(),
        *masked,
    )
    table = torch.stack(
        [*(positions.sum(1) for positions in masks), finite.long().expand(len(valid)), invalid_code.expand(len(valid))]
    ).tolist()
    *table, (all_finite, *_), (code, *_) = table
    if not all_finite:
        raise not_finite("the image features")
    raise_if_invalid(code, reducer)
    columns = [tuple(column) for column in table]
    lengths, num_queries, num_supervised, num_protected, num_dropped, num_text_after, num_documents, *rest = columns
    if context.received and max(num_documents) > 1:
        raise ValueError(
            f"sample {num_documents.index(max(num_documents))} packs {max(num_documents)} documents in one row (by its attention mask or position_ids): the "
            "visual tokens of one cannot be ranked by the text of all. Give each document a row of its own (a collator that pads), or use "
            "handle.paused()"
        )
    num_modalities = len(placeholders)
    return PromptLayout(
        lengths=lengths,
        num_queries=num_queries,
        has_labels=tuple(map(bool, num_supervised)),
        protected=tuple(map(ProtectedCount, num_protected, num_dropped)),
        num_text_after_image=num_text_after,
        num_visual=dict(zip(placeholders, rest[:num_modalities], strict=True)),
        num_masked=dict(zip(placeholders, rest[num_modalities:], strict=True)),
    )


def check_pictures(context: ForwardContext, layout: PromptLayout) -> None:
    """Refuse placeholders of a modality of which nothing was passed."""
    for name in layout.num_visual.keys() - context.received.keys():
        if any(layout.num_visual[name]):
            row = next(i for i, count in enumerate(layout.num_visual[name]) if count)
            raise ValueError(
                f"sample {row} has {layout.num_visual[name][row]} {name} placeholders in its text, but no {name} was passed: pass {name}s to the "
                "processor (pixel_values), or remove the placeholders"
            )


# modality -> per sample, the spans and their sizes in the order of the features
SpansBySample = dict[str, list[list[tuple[Source, int]]]]


def assign_spans(context: ForwardContext, layout: PromptLayout) -> SpansBySample:
    """Assign the spans of each modality to the samples."""
    return {name: _assign(name, received, layout.num_visual[name]) for name, received in context.received.items()}


def spans_of(
    spans_by_sample: SpansBySample, layout: PromptLayout, placeholders: dict[str, Tensor], valid: Tensor
) -> tuple[tuple[tuple[Span, ...], ...], tuple[tuple[Source, ...], ...]]:
    """The spans of each sample in the order of its prompt, without those that the caller's mask hides."""
    if any(any(counts) for counts in layout.num_masked.values()):  # one more device read, for masks that hide images
        spans_by_sample = {
            name: _visible_spans(name, by_sample, layout, placeholders[name], valid)
            for name, by_sample in spans_by_sample.items()
        }
        placeholders = {name: by_sample & valid for name, by_sample in placeholders.items()}
    if len(spans_by_sample) > 1:  # one more device read, for the order of images and videos
        placeholders = dict(zip(placeholders, torch.stack(list(placeholders.values())).cpu(), strict=True))
    spans: list[tuple[Span, ...]] = []
    sources: list[tuple[Source, ...]] = []
    for sample in range(len(layout.lengths)):
        queues = {name: by_sample[sample] for name, by_sample in spans_by_sample.items() if by_sample[sample]}
        order = _prompt_order(sample, queues, placeholders)
        offsets = [sum(size for _, size in order[:i]) for i in range(len(order))]
        grids = [encoded.grids[number] if encoded.grids else None for (encoded, number), _ in order]
        spans.append(
            tuple(
                Span(sample, offset, size, grid) for offset, (_, size), grid in zip(offsets, order, grids, strict=True)
            )
        )
        sources.append(tuple(source for source, _ in order))
    return tuple(spans), tuple(sources)


def _assign(name: str, received: ReceivedFeatures, num_visual: tuple[int, ...]) -> list[list[tuple[Source, int]]]:
    """One modality's spans (with sizes) by sample.

    They fill placeholders in order, so cumulated counts must meet at sample borders.
    """
    assert received.decisions is not None
    sizes = [len(rows) for rows in received.features]
    num_encoded = max(1, len(received.decisions.rows))
    num_beams = 1 if len(sizes) % num_encoded else len(sizes) // num_encoded  # beams repeat the spans of each sample
    by_sample: list[list[tuple[Source, int]]] = []
    num_assigned = 0
    for sample, expected in enumerate(num_visual):
        count = 0
        while sum(sizes[num_assigned : num_assigned + count]) < expected and num_assigned + count < len(sizes):
            count += 1
        num_tokens = sum(sizes[num_assigned : num_assigned + count])
        if num_tokens != expected:
            raise ValueError(
                f"sample {sample} has {expected} {name} placeholders, but its {name}s make {num_tokens} visual tokens ({name}s: {sizes}); "
                "make input_ids and pixel_values with one processor call, and do not truncate or split the prompt (no prefill_chunk_size)"
            )
        first = (num_assigned - sample % num_beams * count) // num_beams
        numbers = [
            received.decisions.span_number(received.features[num_assigned + i], first + i, len(sizes) // num_beams)
            for i in range(count)
        ]
        by_sample.append([((received.decisions, number), sizes[num_assigned + i]) for i, number in enumerate(numbers)])
        num_assigned += count
    if num_assigned != len(sizes):
        raise ValueError(f"{len(sizes)} {name}s were passed, but the text has placeholders for {num_assigned}")
    return by_sample


def _visible_spans(
    name: str, by_sample: list[list[tuple[Source, int]]], layout: PromptLayout, placeholders: Tensor, valid: Tensor
) -> list[list[tuple[Source, int]]]:
    """The spans that a sample's mask does not hide; a partly hidden span is refused."""
    visible = []
    for sample, queue in enumerate(by_sample):
        if layout.num_masked[name][sample]:
            valid_placeholders = valid[sample][placeholders[sample]].tolist()
            ends = [sum(size for _, size in queue[: i + 1]) for i in range(len(queue))]
            counts = [sum(valid_placeholders[end - size : end]) for end, (_, size) in zip(ends, queue, strict=True)]
            for number, (count, (_, size)) in enumerate(zip(counts, queue, strict=True)):
                if 0 < count < size:
                    raise ValueError(
                        f"attention_mask hides {size - count} of the {size} placeholders of {name} {number} of sample {sample}: hide all of "
                        "them (the image is then left out), or none"
                    )
            queue = [entry for entry, count in zip(queue, counts, strict=True) if count]
        visible.append(queue)
    return visible


def _prompt_order(
    sample: int, queues: dict[str, list[tuple[Source, int]]], placeholders: dict[str, Tensor]
) -> list[tuple[Source, int]]:
    """The spans of a sample in the order of its prompt; only samples with several modalities need their positions."""
    if len(queues) < 2:
        return [entry for queue in queues.values() for entry in queue]
    starts = []
    for name, queue in queues.items():
        positions = placeholders[name][sample].nonzero()[:, 0].tolist()
        num_placed = 0
        for entry in queue:
            starts.append((positions[num_placed], entry))
            num_placed += entry[1]
    return [entry for _, entry in sorted(starts, key=lambda start: start[0])]
