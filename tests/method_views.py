"""Views of random tokens, and readings of a selection, for the tests of one method."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import reference_ops
import torch
from families import FAMILIES, MIXED, Inputs, pictures_of, shared
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor, nn

import duet_vlm
from duet_vlm import DecoderView, EncoderView, SpanPlan
from duet_vlm.methods.decoder.pio import Pio
from duet_vlm.methods.video.video_base import VideoReducer
from duet_vlm.ops.merge import merged_rows
from duet_vlm.planning.tokens import Selection
from duet_vlm.reducers.encoder import EncoderReducer
from duet_vlm.reducers.encoder_view import LayerView, QuestionView


def decoder_view(there: list[int], stay: list[int], seed: int, heads: int = 3, **more: Tensor) -> DecoderView:
    """Random rows and scores of as many tokens as each sample has."""
    draw = torch.Generator().manual_seed(seed)
    most = max(there)
    valid = torch.arange(most) < torch.tensor(there)[:, None]
    return DecoderView(
        valid, torch.tensor(stay), host_counts=tuple(zip(there, stay, strict=True)), scores=torch.rand(len(there), most, heads, generator=draw),
        hidden_states=torch.randn(len(there), most, 8, generator=draw), **more,
    )  # fmt: skip


many = settings(max_examples=40, deadline=None, derandomize=True)

seeds = st.integers(0, 10_000)

EXACT = [
    [1.0, 0, 0, 0],
    [0, 1.0, 0, 0],
    [0, 0, -1.0, 0],
    [1.0, 1, 1, 1],
    [1.0, -1, 1, 1],
    [-1.0, 1, 1, -1],
    [0.0, 0, 0, 0],
]


@st.composite
def sample_spans(draw: Any, largest: int = 12) -> list[tuple[int, int]]:
    """(tokens, how many to choose) of up to three samples, all of them included."""
    sizes = draw(st.lists(st.integers(1, largest), min_size=1, max_size=3))
    return [(n, draw(st.integers(1, n))) for n in sizes]


def drawn(samples: list[tuple[int, int]], seed: int, exact: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows, scores, valid and counts, padded on the right with what must not matter."""
    draw, width = torch.Generator().manual_seed(seed), max(n for n, _ in samples)
    shape = (len(samples), width)
    rows = (
        torch.tensor(EXACT)[torch.randint(len(EXACT), shape, generator=draw)]
        if exact
        else torch.randn(*shape, 5, generator=draw)
    )
    score = torch.randint(1, 4, shape, generator=draw) / 4 if exact else torch.rand(shape, generator=draw)
    valid = torch.arange(width) < torch.tensor([n for n, _ in samples])[:, None]
    return rows, score, valid, torch.tensor([count for _, count in samples])


def seen_by(model: nn.Module, inputs: Inputs, **changes: Any) -> list[Any]:
    """The views that ``pio`` decides on in one forward."""
    seen: list[Any] = []

    class Spy(Pio):
        def prune_tokens(self, view: Any) -> Tensor:
            seen.append(view)
            return super().prune_tokens(view)

    with torch.no_grad(), duet_vlm.attach(model, Spy(**{"schedule": ((2, 0.5),)} | changes)):
        model(**inputs)
    return seen


def shown_view(rows: Tensor, valid: Tensor, count: Tensor) -> DecoderView:
    counts = tuple(zip(valid.sum(1).tolist(), count.tolist(), strict=True))
    return DecoderView(valid, count, host_counts=counts, hidden_states=rows)


def square_images(images: list[tuple[int, int]], seed: int = 0, width: int = 6) -> EncoderView:
    """Square pictures of (tokens a side, how many to keep), padded on the right; padding holds numbers that would win."""
    draw, sizes = torch.Generator().manual_seed(seed), [side**2 for side, _ in images]
    most, batch = max(sizes), len(images)
    valid = torch.arange(most) < torch.tensor(sizes)[:, None]
    layers = tuple(LayerView(torch.rand(batch, most, generator=draw).masked_fill(~valid, 9.0)) for _ in range(2))
    features = torch.randn(batch, most, width, generator=draw).masked_fill(~valid[..., None], 9.0)
    token, side = torch.arange(most).expand(batch, -1), torch.tensor([[side] for side, _ in images])
    count = torch.tensor([n for _, n in images])
    plans = tuple(SpanPlan(size, n, 0, (n,)) for size, (_, n) in zip(sizes, images, strict=True))
    return EncoderView(
        valid, count, count * 0, plans, layers[0].importance, None, features, torch.where(valid, 0, -1), layers=layers,
        coords=torch.stack([token // side, token % side], 2).masked_fill(~valid[..., None], -1), grid_size=side.expand(-1, 2),
        crop_grid=torch.zeros(batch, 2).long(),
    )  # fmt: skip


def kept_tokens(method: EncoderReducer, view: EncoderView) -> list[list[int]]:
    selection = method.select_tokens(view)
    return [sorted(index[valid].tolist()) for index, valid in zip(selection.index, selection.valid, strict=True)]


def best_tokens(scores: Any, tokens: Any, count: int) -> list[int]:
    return sorted(tokens, key=lambda i: (-float(scores[i]), i))[:count]


IMAGES = [(6, 14), (4, 16), (5, 3), (3, 1)]


MOVING = [name for name in ("qwen2_vl", "qwen2_5_vl") if name in FAMILIES]

Clip = tuple[int, int]  # steps, rows per step


def kept_of_clip(features: list[list[float]], steps: int, count: int) -> list[int]:
    """Evenly spaced rows of the first step; if all of them fit, the later rows whose cosine with the row one step
    before is smallest."""
    size = len(features) // steps
    first = min(count, size)
    kept = reference_ops.spaced([True] * size, first)
    later = range(size, len(features))
    return sorted(
        kept + sorted(later, key=lambda i: (reference_ops.cosine(features[i], features[i - size]), i))[: count - first]
    )


def frames_view(
    clips: list[Clip], counts: list[int], seed: int = 0, stream: str = "video", shift: int = 0
) -> EncoderView:
    """Random rows of several clips, ``shift`` unused rows in front of each, as the flow would hand them over."""
    width = shift + max(steps * size for steps, size in clips)
    features = torch.randn(len(clips), width, 6, generator=torch.Generator().manual_seed(seed))
    parts = torch.full((len(clips), width), -1)
    for row, (steps, size) in enumerate(clips):
        parts[row, shift : shift + steps * size] = torch.arange(steps).repeat_interleave(size)
    plans = tuple(
        SpanPlan(steps * size, count, 0, (count,) * 4) for (steps, size), count in zip(clips, counts, strict=True)
    )
    kept = torch.tensor(counts)
    return EncoderView(parts >= 0, kept, torch.zeros_like(kept), plans, features=features, parts=parts, modality=stream)


VIDEO_METHODS: dict[str, dict[str, Any]] = {
    "dycoke": {},
    "fastvid": {"every": 2, "segments": 2},
    "holitom": {"threshold": 0.2, "neighbours": 2},
    "metok": {"deviations": 0.5, "threshold": 0.6},
    "prunevid": {"threshold": 0.2, "windows": 0.5},
    "vidcom2": {"temperature": 0.1},
}


def video_method(method: str, **changes: Any) -> VideoReducer:
    return duet_vlm.make_method(method, **{"keep": 0.5} | VIDEO_METHODS[method] | changes)


def video_view(
    reducer: VideoReducer,
    clips: list[Clip],
    counts: list[int],
    seed: int = 0,
    stream: str = "video",
    still: float = 0.5,
    most: bool = True,
) -> EncoderView:
    """Clips whose frames share a part ``still`` of what they are, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    width = max(steps * size for steps, size in clips)
    features, parts = torch.zeros(len(clips), width, 6), torch.full((len(clips), width), -1)
    for row, (steps, size) in enumerate(clips):
        base = torch.randn(1, size, 6, generator=generator)
        rows = still * base + (1 - still) * torch.randn(steps, size, 6, generator=generator)
        features[row, : steps * size] = rows.flatten(0, 1)
        parts[row, : steps * size] = torch.arange(steps).repeat_interleave(size)
    plans = tuple(
        replace(reducer, keep=count).plan(steps * size, 4, None)
        for (steps, size), count in zip(clips, counts, strict=True)
    )
    dominant, contextual = (
        torch.tensor([getattr(plan, name) for plan in plans]) for name in ("dominant", "contextual")
    )
    return EncoderView(
        parts >= 0, dominant, contextual, plans, torch.rand(len(clips), width, generator=generator), None, features, parts, stream,
        question=random_questions(len(clips), generator), max_parts=(max(t for t, _ in clips), max(n for _, n in clips)) if most else None,
    )  # fmt: skip


def random_questions(spans: int, generator: torch.Generator) -> QuestionView:
    """Questions of one to four words."""
    return QuestionView(
        torch.randn(spans, 4, 6, generator=generator),
        torch.arange(4) < torch.randint(1, 5, (spans, 1), generator=generator),
    )


def rows_of_selection(selection: Selection, row: int) -> list[tuple[int, list[tuple[int, float]]]]:
    """Per row the token it stands at, and what it is made of with which weight."""
    assert selection.weights is not None
    found = []
    for number, (token, real) in enumerate(
        zip(selection.index[row].tolist(), selection.valid[row].tolist(), strict=True)
    ):
        if real:
            here = (selection.target_row[row] == number).nonzero()[:, 0]
            found.append(
                (
                    token,
                    [(int(selection.source_tokens[row, i]), round(float(selection.weights[row, i]), 5)) for i in here],
                )
            )
    return found


# how to let `keep` rows in and drop none
GREEDY: dict[str, dict[str, Any]] = {"divprune": {}, "duet_plus": {"schedule": ()}, "scope": {}}

CONSTANT = ("divprune", "scope")

PICTURES = pictures_of(MIXED)


def chosen_tokens(handle: duet_vlm.Handle) -> list[list[int]]:
    """Per picture of the batch, the tokens that entered the decoder."""
    return [list(span.stages[0].kept) for row in handle.trace for span in row]


def encoded(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Per picture the rows that the untouched model feeds to its decoder."""
    images = {
        name: value for name, value in inputs.items() if name in ("pixel_values", "image_grid_thw", "image_sizes")
    }
    with torch.no_grad():
        return [rows.double() for rows in model.model.get_image_features(**images).pooler_output]


def tower_rows(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Per picture the rows that V2V reads: of the CLIP feature layer, without CLS; where it runs after the encoder
    call, what enters."""
    if {"image_grid_thw", "image_sizes"} & set(inputs):
        return encoded(model, inputs)
    with torch.no_grad():
        return list(
            model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True)
            .hidden_states[-2][:, 1:]
            .double()
        )


def decoder_spans_view(there: list[int], stay: list[int], seed: int, spans: int = 2) -> DecoderView:
    """Samples of tokens in up to ``spans`` clips each, whose sets are noted in no order."""
    draw = torch.Generator().manual_seed(seed)
    shape = len(there), max(there)
    valid = torch.arange(shape[1]) < torch.tensor(there)[:, None]
    notes = torch.randint(0, 5, shape, generator=draw).float() * 3
    span = torch.randint(0, spans, shape, generator=draw).sort(1).values
    scores, rows = torch.rand(shape, generator=draw), torch.randn(*shape, 6, generator=draw)
    return DecoderView(
        valid,
        torch.tensor(stay),
        host_counts=tuple(zip(there, stay, strict=True)),
        scores=scores,
        hidden_states=rows,
        tags=notes,
        span_index=span,
        token_index=torch.arange(shape[1]).expand(shape),
    )


many_counts = st.lists(
    st.integers(1, 14).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))), min_size=1, max_size=3
)


# ---- released rules

ROWS, WIDTH = 17, 6  # CLS and 16 patches
# dominant, contextual, width
EDGES = [
    (1, 0, 3),
    (1, 16, 1),
    (7, 0, 4),
    (7, 3, 0),
    (7, 1, 1),
    (9, 3, 1),
    (10, 7, 1),
    (2, 15, 4),
    (12, 2, 100),
    (14, 4, 4),
    (16, 3, 2),
]


def released_rows(
    features: Tensor, scores: list[float], keys: Tensor, dominant: int, contextual: int, width: int | None
) -> Tensor:
    """Output rows of one image; ``width`` None is the original VisionZip, which merges every patch that is not
    dominant."""
    keys = keys / keys.norm(dim=-1, keepdim=True)
    best = sorted(range(len(scores)), key=lambda i: -scores[i])
    kept, rest = sorted(best[: dominant - 1]), best[dominant - 1 :]
    if width is None:
        pool = sorted(rest)
        step = max(1, len(pool) // contextual)
    else:
        pool = rest[: max(1, width * contextual)]
        step = max(1, len(pool) // max(1, contextual))
    anchors = pool[::step][:contextual] or pool[:1]
    merged: dict[int, list[int]] = {a: [] for a in anchors}
    for patch in pool:
        if patch not in merged:
            merged[max(anchors, key=lambda a, p=patch: float(keys[p] @ keys[a]))].append(patch)
    patches = features[1:]
    rows = [features[0], *(patches[i] for i in kept)]
    rows += [patches[a] + (patches[members].mean(0) if members else 0) for a, members in merged.items()]
    return torch.stack(rows)


def check_released_choice(reducer: EncoderReducer, dominant: int, contextual: int, width: int | None) -> None:
    """Plan and rows of ``reducer`` are those of ``released_rows``."""
    generator = torch.Generator().manual_seed(dominant * 100 + contextual)
    features = torch.randn(2, ROWS, WIDTH, generator=generator)
    importance, keys = torch.rand(2, ROWS, generator=generator), torch.randn(2, ROWS, WIDTH, generator=generator)
    importance[:, 0] = 9.0  # the CLS row
    expected = [
        released_rows(f, s[1:].tolist(), k[1:], dominant, contextual, width)
        for f, s, k in zip(features, importance, keys, strict=True)
    ]
    rows = len(expected[0])
    if rows <= ROWS - 1:
        assert reducer.plan(ROWS - 1, 1, None).entry == rows
    else:  # CLS and every patch are one row more than an image has placeholders
        with pytest.raises(ValueError, match="do not fit"):
            reducer.plan(ROWS - 1, 1, None)
    plan = SpanPlan(ROWS - 1, dominant, rows - dominant, (rows,))
    counts = torch.tensor([[dominant, rows - dominant]] * 2)
    view = EncoderView(torch.ones(2, ROWS, dtype=torch.bool), counts[:, 0], counts[:, 1], (plan,) * 2, importance, keys)
    torch.testing.assert_close(merged_rows(features, reducer.select_tokens(view)), torch.stack(expected))


def refused(method: str, message: str, **fields: Any) -> None:
    with pytest.raises(ValueError, match=message):
        duet_vlm.attach(shared("llava"), method, **fields)
    assert duet_vlm.handle_of(shared("llava")) is None
