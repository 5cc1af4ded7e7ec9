"""What a prompt consists of: real rows, visual rows and whose they are, rows that predict, rows that ask. Read from the device once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from duet_vlm.ops.ragged import after_last_true, last_true, upload
from duet_vlm.planning.tokens import Span
from duet_vlm.reducers.base import Reducer
from duet_vlm.runtime.context import EncodedFeatures, ForwardContext, ReceivedFeatures
from duet_vlm.runtime.decode.cache import ProtectedCount
from duet_vlm.runtime.encode.encoder import is_marked
from duet_vlm.runtime.validation import not_finite, raise_if_invalid

Source = tuple[EncodedFeatures, int]  # an encoder call and the number of a span in it


@dataclass(frozen=True)
class PromptLayout:
    """A prompt on the host. Per sample: ``lengths`` real rows, ``asking`` query rows, whether it has a label (``answered``), visual rows that
    ``stay``, rows ``after`` the last visual one; ``visual`` placeholders by stream, those that the mask hides (``hidden``) among them."""

    lengths: tuple[int, ...]
    num_queries: tuple[int, ...]
    has_labels: tuple[bool, ...]
    protected: tuple[ProtectedCount, ...]
    num_text_after_image: tuple[int, ...]
    num_visual: dict[str, tuple[int, ...]]
    num_masked: dict[str, tuple[int, ...]]


def predicting_rows(valid: Tensor, visual: Tensor, labels: Tensor | None, drafts: int) -> Tensor:
    """Visual rows [B, S] bool whose logits are somebody's answer: the last real row of a sample (in front of ``drafts`` too), and with
    labels each one in front of a supervised text row."""
    rows = last_true(valid)
    if drafts:
        rows[:, :-drafts] |= last_true(valid[:, :-drafts])
    if labels is not None:
        supervised = (labels.to(valid.device) != -100) & ~visual
        rows[:, :-1] |= supervised[:, 1:]
    return rows & visual & valid


def span_ends(arrived: ReceivedFeatures, places: Tensor) -> Tensor:
    """[B, S] long: the number (in the order of the features) of the span whose last row stands there, -1 elsewhere."""
    rank = (places.flatten().cumsum(0) - 1).view_as(places)
    ends = upload([len(rows) for rows in arrived.features], places.device).cumsum(0) - 1
    number = torch.searchsorted(ends, rank).clamp(max=len(ends) - 1)
    return torch.where(places & (ends[number] == rank), number, -1)


def rows_that_stay(call: ForwardContext, rows: Tensor, places: dict[str, Tensor], embeds: Tensor) -> tuple[Tensor, Tensor]:
    """Those of the ``rows`` [B, S] bool that predict which can be had, and those of them that V2V has left out."""
    left_out = rows & is_marked(embeds).to(rows.device)
    there = rows & ~left_out
    for name, arrived in call.received.items():
        if arrived.decisions is not None and arrived.decisions.last_rows is not None:
            there = there | (rows & (span_ends(arrived, places[name]) >= 0))
    return there, left_out & there


def read_layout(
    call: ForwardContext, reducer: Reducer, places: dict[str, Tensor], valid: Tensor, queries: Tensor, stays: Tensor, left_out: Tensor, begins: Tensor
) -> PromptLayout:
    """The one device-to-host read of a prefill; what could not be checked before without a read of its own is checked here."""
    answered = torch.zeros_like(valid) if call.labels is None else (call.labels.to(valid.device) != -100)
    finite, wrong = torch.ones((), dtype=torch.bool, device=valid.device), torch.zeros((), dtype=torch.long, device=valid.device)
    for arrived in call.received.values():
        if arrived.decisions is not None and arrived.decisions.finite is not None:
            finite = finite & arrived.decisions.finite.to(valid.device)
        if arrived.decisions is not None and arrived.decisions.invalid_code is not None:
            wrong = torch.maximum(wrong, arrived.decisions.invalid_code.to(valid.device))
    visual = torch.stack(list(places.values())).any(0)
    after = valid & after_last_true(visual)
    masks = (valid, queries, answered, stays, left_out, after, begins, *places.values(), *(rows & ~valid for rows in places.values()))
    table = torch.stack([*(rows.sum(1) for rows in masks), finite.long().expand(len(valid)), wrong.expand(len(valid))]).tolist()
    *table, (whole, *_), (code, *_) = table
    if not whole:
        raise not_finite("the image features")
    raise_if_invalid(code, reducer)
    lengths, asking, answers, stay, added, text, documents, *rest = (tuple(column) for column in table)
    if call.received and max(documents) > 1:
        raise ValueError(
            f"sample {documents.index(max(documents))} packs {max(documents)} documents in one row (by its attention mask or position_ids): the "
            "visual tokens of one cannot be ranked by the text of all. Give each document a row of its own (a collator that pads), or use "
            "handle.paused()"
        )
    streams = len(places)
    return PromptLayout(
        lengths, asking, tuple(map(bool, answers)), tuple(map(ProtectedCount, stay, added)), text,
        dict(zip(places, rest[:streams], strict=True)), dict(zip(places, rest[streams:], strict=True)),
    )  # fmt: skip


def check_pictures(call: ForwardContext, layout: PromptLayout) -> None:
    """Refuse placeholders of a stream of which nothing was passed."""
    for name in layout.num_visual.keys() - call.received.keys():
        if any(layout.num_visual[name]):
            row = next(i for i, count in enumerate(layout.num_visual[name]) if count)
            raise ValueError(
                f"sample {row} has {layout.num_visual[name][row]} {name} placeholders in its text, but no {name} was passed: pass {name}s to the "
                "processor (pixel_values), or remove the placeholders"
            )


SpansBySample = dict[str, list[list[tuple[Source, int]]]]  # per stream and sample, the spans and their sizes in the order of the features


def assign_spans(call: ForwardContext, layout: PromptLayout) -> SpansBySample:
    """Which span belongs to which sample."""
    return {name: _dealt(name, arrived, layout.num_visual[name]) for name, arrived in call.received.items()}


def spans_of(
    found: SpansBySample, layout: PromptLayout, places: dict[str, Tensor], valid: Tensor
) -> tuple[tuple[tuple[Span, ...], ...], tuple[tuple[Source, ...], ...]]:
    """The spans of each sample in the order of its prompt; those that the caller's mask hides are left out."""
    if any(any(counts) for counts in layout.num_masked.values()):  # one more read, for masks that hide pictures
        found = {name: _shown(name, rows, layout, places[name], valid) for name, rows in found.items()}
        places = {name: rows & valid for name, rows in places.items()}
    if len(found) > 1:  # in which order a prompt shows images and clips: one more read
        places = dict(zip(places, torch.stack(list(places.values())).cpu(), strict=True))
    spans: list[tuple[Span, ...]] = []
    sources: list[tuple[Source, ...]] = []
    for sample in range(len(layout.lengths)):
        queues = {name: rows[sample] for name, rows in found.items() if rows[sample]}
        order = _order(sample, queues, places)
        offsets = [sum(size for _, size in order[:i]) for i in range(len(order))]
        grids = [encoded.grids[number] if encoded.grids else None for (encoded, number), _ in order]
        spans.append(tuple(Span(sample, offset, size, grid) for offset, (_, size), grid in zip(offsets, order, grids, strict=True)))
        sources.append(tuple(source for source, _ in order))
    return tuple(spans), tuple(sources)


def _dealt(name: str, arrived: ReceivedFeatures, visual: tuple[int, ...]) -> list[list[tuple[Source, int]]]:
    """One stream's spans (with their sizes) by sample: they fill placeholders in order, so cumulated counts must meet at sample borders."""
    assert arrived.decisions is not None
    sizes, known = [len(rows) for rows in arrived.features], max(1, len(arrived.decisions.rows))
    times = 1 if len(sizes) % known else len(sizes) // known  # beams repeat the spans of each sample
    out: list[list[tuple[Source, int]]] = []
    done = 0
    for sample, wanted in enumerate(visual):
        count = 0
        while sum(sizes[done : done + count]) < wanted and done + count < len(sizes):
            count += 1
        made = sum(sizes[done : done + count])
        if made != wanted:
            raise ValueError(
                f"sample {sample} has {wanted} {name} placeholders, but its {name}s make {made} visual tokens ({name}s: {sizes}); "
                "make input_ids and pixel_values with one processor call, and do not truncate or split the prompt (no prefill_chunk_size)"
            )
        first = (done - sample % times * count) // times
        numbers = [arrived.decisions.number_of(arrived.features[done + i], first + i, len(sizes) // times) for i in range(count)]
        out.append([((arrived.decisions, number), sizes[done + i]) for i, number in enumerate(numbers)])
        done += count
    if done != len(sizes):
        raise ValueError(f"{len(sizes)} {name}s were passed, but the text has placeholders for {done}")
    return out


def _shown(
    name: str, dealt: list[list[tuple[Source, int]]], layout: PromptLayout, places: Tensor, valid: Tensor
) -> list[list[tuple[Source, int]]]:
    """The spans that a sample's mask does not hide; one that is hidden in part is refused."""
    shown = []
    for sample, queue in enumerate(dealt):
        if layout.num_masked[name][sample]:
            seen = valid[sample][places[sample]].tolist()
            ends = [sum(size for _, size in queue[: i + 1]) for i in range(len(queue))]
            counts = [sum(seen[end - size : end]) for end, (_, size) in zip(ends, queue, strict=True)]
            for number, (count, (_, size)) in enumerate(zip(counts, queue, strict=True)):
                if 0 < count < size:
                    raise ValueError(
                        f"attention_mask hides {size - count} of the {size} placeholders of {name} {number} of sample {sample}: hide all of "
                        "them (the picture is then left out), or none"
                    )
            queue = [entry for entry, count in zip(queue, counts, strict=True) if count]
        shown.append(queue)
    return shown


def _order(sample: int, queues: dict[str, list[tuple[Source, int]]], places: dict[str, Tensor]) -> list[tuple[Source, int]]:
    """The spans of a sample as its prompt shows them; only samples that mix streams need to look."""
    if len(queues) < 2:
        return [entry for queue in queues.values() for entry in queue]
    begins = []
    for name, queue in queues.items():
        slots, done = places[name][sample].nonzero()[:, 0].tolist(), 0
        for entry in queue:
            begins.append((slots[done], entry))
            done += entry[1]
    return [entry for _, entry in sorted(begins, key=lambda begin: begin[0])]
