"""What methods return is checked: every method of the package passes wherever it runs, every way of being wrong has its
own message."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, MIXED, clips_for, forward, shared
from hypothesis import given, settings
from hypothesis import strategies as st
from method_matrix import KEEP_ALL, OFFICIAL, REDUCING, TOO_EARLY, pairs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import duet_vlm
from duet_vlm import DecoderView, EncoderView, SpanPlan
from duet_vlm.methods.encoder.visionzip import VisionZip
from duet_vlm.methods.two_stage.duet import Duet
from duet_vlm.methods.video.frames import Frames
from duet_vlm.ops.merge import merged_rows
from duet_vlm.ops.ragged import pack_right
from duet_vlm.ops.select import spaced_picks
from duet_vlm.planning.budget import layer_counts
from duet_vlm.planning.tokens import Selection
from duet_vlm.reducers.base import Reducer
from duet_vlm.reducers.decoder import DecoderReducer
from duet_vlm.reducers.encoder import EncoderReducer
from duet_vlm.reducers.inputs import Input
from duet_vlm.reducers.options import TokenOptions
from duet_vlm.runtime import validation
from duet_vlm.runtime.validation import (
    MESSAGES,
    InvalidSelection,
    check_mask,
    check_plan,
    check_rows,
    check_selection,
    raise_if_invalid,
)
from duet_vlm.utils.field_types import merged

quick = settings(max_examples=60, deadline=None, derandomize=True)


def checked(reducer: Reducer, seen: list[str]) -> Reducer:
    """The same method; what it returns is checked, and must be handed back as it is. ``seen`` notes who was asked."""

    def plan(self: Any, tokens: int, depth: int, budget: Any) -> SpanPlan:
        made = type(reducer).plan(self, tokens, depth, budget)
        found = check_plan(self, made, tokens, depth)
        assert found == made
        return found

    def select_tokens(self: Any, view: EncoderView) -> Selection:
        made = type(reducer).select_tokens(self, view)
        found, code = check_selection(self, made, view, view.plans)
        assert int(code) == 0 and found.merge == made.merge and found.weights is made.weights
        assert torch.equal(found.valid, made.valid) and torch.equal(found.target_row, made.target_row)
        assert torch.equal(found.index[found.valid], made.index[made.valid])
        assert torch.equal(found.source_tokens[found.target_row >= 0], made.source_tokens[made.target_row >= 0])
        seen.append("select_tokens")
        return found

    def prune_tokens(self: Any, view: DecoderView) -> Any:
        made = type(reducer).prune_tokens(self, view)
        seen.append("prune_tokens")
        if isinstance(made, Selection):
            found, code = check_rows(self, made, view)
            assert (
                torch.equal(found.valid, made.valid)
                and torch.equal(found.target_row, made.target_row)
                and found.weights is made.weights
            )
        else:
            found, code = check_mask(self, made, view.valid, view.num_keep)
            assert torch.equal(found, made)
        assert int(code) == 0
        return found

    stages = {"select_tokens": select_tokens} if isinstance(reducer, EncoderReducer) else {}
    stages |= {"prune_tokens": prune_tokens} if isinstance(reducer, DecoderReducer) else {}
    own = {each.name: getattr(reducer, each.name) for each in dataclasses.fields(reducer)}
    return type("Checked", (type(reducer),), {"plan": plan, **stages})(**own)


# ---- the package's own methods


@pairs(parts=1)
def test_every_method_passes_wherever_it_runs(family: str, method: str) -> None:
    """Images, and clips where the family has them; settings, and budgets with parts one by one or together."""
    made, model = FAMILIES[family], shared(family)
    usual = duet_vlm.make_method(method)
    encodes, drops = isinstance(usual, EncoderReducer), isinstance(usual, DecoderReducer)
    batches = [made.inputs(MIXED), *([made.inputs(clips_for(family))] if made.video else [])]
    parts = (
        (
            {"options": {"crops": "joint"}},
            {"options": {"crops": "per_crop", "newline_tokens": "keep"}} if not usual.compares_frames else {},
        )
        if encodes
        else ({},)
    )
    if family in TOO_EARLY.get(method, ()):
        with (
            pytest.raises(ValueError, match="no attention to rank tokens by"),
            duet_vlm.attach(model, method, budget=0.35),
        ):
            forward(model, batches[0])
        return
    for inputs in batches:
        for more in parts:
            for fields, budget in ((merged(REDUCING[method], more), None), (more, 0.35)):
                seen: list[str] = []
                with duet_vlm.attach(
                    model, checked(duet_vlm.make_method(method, **fields), seen), budget=budget
                ) as handle:
                    forward(model, inputs)
                    plans = [handle.plan(span.span.tokens) for row in handle.trace for span in row]
                # what enters may also stay: an ample budget
                leaves = drops and any(min(plan.counts) < plan.entry for plan in plans)
                assert set(seen) == {*["select_tokens"] * encodes, *["prune_tokens"] * leaves}


@pytest.mark.parametrize("method, fields", KEEP_ALL, ids=str)
def test_keeping_everything_passes(method: str, fields: dict[str, Any]) -> None:
    fields = dict(fields)
    budget = fields.pop("budget", None)
    reducer = checked(duet_vlm.make_method(method, **fields), [])
    with duet_vlm.attach(shared("qwen2_5_vl"), reducer, budget=budget):
        forward(shared("qwen2_5_vl"), FAMILIES["qwen2_5_vl"].inputs(MIXED))


OFFICIAL_LLAVA = {
    **OFFICIAL,
    "no contextual row asked for": Duet.official_llava(9, 0, schedule=((3, 0.5),)),
    "no pool": Duet.official_llava(9, 4, 0, schedule=((3, 0.5),)),
    "all placeholders": Duet.official_llava(17, 3, schedule=()),
    "visionzip keeps no other": VisionZip.official(9, 0),
}
OFFICIAL_QWEN = {
    "counts": Duet.official_qwen25(5, 2, schedule=((3, 0.6), (5, 0.0))),
    "fractions": Duet.official_qwen25(0.65, 0.05, schedule=((3, 0.75),)),
    "no contextual row asked for": Duet.official_qwen25(5, 0, schedule=((3, 0.6),)),
}


@pytest.mark.parametrize("name", OFFICIAL_LLAVA)
def test_official_presets_pass_with_the_cls_row(name: str) -> None:
    seen: list[str] = []
    with duet_vlm.attach(shared("llava"), checked(OFFICIAL_LLAVA[name], seen)):
        forward(shared("llava"), FAMILIES["llava"].inputs(MIXED))
    assert seen


@pytest.mark.parametrize("parts", ["joint", "per_crop"])
@pytest.mark.parametrize("name", OFFICIAL_QWEN)
def test_official_presets_pass_on_clips(name: str, parts: str) -> None:
    seen: list[str] = []
    with duet_vlm.attach(
        shared("qwen2_5_vl"), checked(dataclasses.replace(OFFICIAL_QWEN[name], options=TokenOptions(crops=parts)), seen)
    ):
        forward(shared("qwen2_5_vl"), FAMILIES["qwen2_5_vl"].inputs(clips_for("qwen2_5_vl")))
    assert {"select_tokens", "prune_tokens"} <= set(seen)


# ---- methods that are wrong


@dataclass(frozen=True)
class Mine(EncoderReducer, DecoderReducer):
    """Right in itself: the first half of the tokens stays, one more is an anchor that its neighbour joins. ``spoil``
    changes an answer."""

    name = "mine"
    paper = "-"
    requires = frozenset({Input.FEATURES, Input.SCORES})
    stage: str = ""
    spoil: Callable[..., Any] | None = None

    def _answer(self, stage: str, answer: Any, *view: Any) -> Any:
        return answer if self.spoil is None or self.stage != stage else self.spoil(answer, *view)

    def plan(self, tokens: int, depth: int, budget: Any) -> SpanPlan:
        entry = tokens // 2
        counts = layer_counts(entry, depth, ((3, 0.5), (5, 0.0)))
        return self._answer("plan", SpanPlan(tokens, entry - 1, 1, counts))

    def select_tokens(self, view: EncoderView) -> Selection:
        rows = view.dominant + view.contextual
        first = (view.valid.cumsum(1) <= rows[:, None]) & view.valid
        index, valid = pack_right(first, max(plan.entry for plan in view.plans))
        rest, real = pack_right(view.valid & ~first, 2)
        return self._answer(
            "select_tokens", Selection(index, valid, rest, torch.where(real, rows[:, None] - 1, -1)), view
        )

    def prune_tokens(self, view: DecoderView) -> Tensor:
        return self._answer("prune_tokens", spaced_picks(view.valid, view.num_keep), view)


def plan_with(**fields: Any) -> Callable[[SpanPlan], SpanPlan]:
    return lambda plan: dataclasses.replace(
        plan, **{name: value(plan) if callable(value) else value for name, value in fields.items()}
    )


def selection_with(**fields: Callable[[Selection], Any]) -> Callable[..., Selection]:
    return lambda selection, view: dataclasses.replace(
        selection, **{name: value(selection) for name, value in fields.items()}
    )


def put(x: Tensor, column: int, value: Any) -> Tensor:
    x = x.clone()
    x[-1, column] = value
    return x


def padding_of(selection: Selection, view: EncoderView) -> Selection:
    """A row of padding of the smallest span is chosen."""
    row = int(view.valid.sum(1).argmin())
    index = selection.index.clone()
    index[row, 0] = view.valid.shape[1] - 1
    return dataclasses.replace(selection, index=index)


PLANS: dict[str, tuple[Callable[..., Any], str]] = {
    "none": (lambda plan: None, "returned None: return a duet_vlm.SpanPlan"),
    "a number": (lambda plan: plan.entry, r"returned \d+: return a duet_vlm.SpanPlan"),
    "fractions": (plan_with(dominant=lambda p: p.dominant / 1), r"dominant=\d+\.0.*must be ints"),
    "booleans": (plan_with(contextual=True), "contextual=True.*must be ints"),
    "one count": (plan_with(counts=4), "counts must be a tuple of ints"),
    "text": (plan_with(counts="44442200"), "counts must be ints"),
    "fractions of tokens": (plan_with(counts=lambda p: tuple(c / p.tokens for c in p.counts)), "counts must be ints"),
    "too few layers": (
        plan_with(counts=lambda p: p.counts[:-1]),
        "one number for each of the 8 decoder layers, it has 7",
    ),
    "too many layers": (
        plan_with(counts=lambda p: (*p.counts, 0)),
        "one number for each of the 8 decoder layers, it has 9",
    ),
    "grows": (plan_with(counts=lambda p: (*p.counts[:-1], 1)), "layer 7 cannot read 1 tokens where 0 are left"),
    "more than enter": (
        plan_with(counts=lambda p: (p.entry + 1, *p.counts[1:])),
        r"layer 0 cannot read \d+ tokens where \d+ are left",
    ),
    "negative counts": (plan_with(counts=lambda p: (*p.counts[:-1], -1)), "cannot be negative"),
    "negative rows": (plan_with(contextual=-1), "cannot be negative"),
    "more than there are": (plan_with(dominant=lambda p: p.tokens), "more than the span's"),
    "another span": (plan_with(tokens=lambda p: p.tokens + 1), r"tokens must be the \d+ that were asked for"),
    "structure": (plan_with(structure=1), "structure and parts are filled in later"),
    "parts": (plan_with(parts=((2, 1),)), "structure and parts are filled in later"),
}
SELECTIONS: dict[str, tuple[Callable[..., Any], str]] = {
    "none": (lambda selection, view: None, "returned None: return a duet_vlm.Selection"),
    "a mask": (
        lambda selection, view: view.valid,
        r"returned a tensor \[.*\] of torch.bool on cpu: return a duet_vlm.Selection",
    ),
    "lists": (
        selection_with(index=lambda s: s.index.tolist()),
        r"index = \[\[.*give a tensor \[4, K\] of torch.int64 on cpu",
    ),
    "int32": (
        selection_with(index=lambda s: s.index.int()),
        "index = a tensor .* of torch.int32 on cpu: give a tensor .* of torch.int64",
    ),
    "valid as numbers": (
        selection_with(valid=lambda s: s.valid.long()),
        "valid = a tensor .* of torch.int64 on cpu: give .* torch.bool",
    ),
    "one span less": (
        selection_with(target_row=lambda s: s.target_row[1:]),
        r"target_row = a tensor \[3, 2\] .* give a tensor \[4, P\]",
    ),
    "no spans": (
        selection_with(source_tokens=lambda s: s.source_tokens[0]),
        r"source_tokens = a tensor \[2\] .* give a tensor \[4, P\]",
    ),
    "another device": (selection_with(index=lambda s: s.index.to("meta")), "on meta: give a tensor .* on cpu"),
    "valid of other width": (
        selection_with(valid=lambda s: s.valid[:, 1:]),
        r"index of shape \(4, \d+\) and valid of shape \(4, \d+\)",
    ),
    "into of other width": (
        selection_with(target_row=lambda s: s.target_row[:, 1:]),
        r"source_tokens of shape \(4, 2\) and target_row of shape \(4, 1\)",
    ),
    "merge": (selection_with(merge=lambda s: "sum"), "merge='sum': choose one of 'mean', 'anchor_plus_mean'"),
    "too few columns": (
        selection_with(index=lambda s: s.index[:, 1:], valid=lambda s: s.valid[:, 1:]),
        r"\d+ rows per span: \d+ are planned",
    ),
    "a row less": (
        selection_with(valid=lambda s: put(s.valid, 0, False)),
        r"another number of rows than planned \(span 3: \d+ instead of \d+\)",
    ),
    "past the end": (
        selection_with(index=lambda s: put(s.index, 0, 1000)),
        r"tokens that do not exist \(span 3: 1000\)",
    ),
    "from the end": (selection_with(index=lambda s: put(s.index, 0, -1)), r"tokens that do not exist \(span 3: -1\)"),
    "members past the end": (
        selection_with(source_tokens=lambda s: put(s.source_tokens, 0, 1000)),
        r"tokens that do not exist \(span 3: 1000\)",
    ),
    "twice": (selection_with(index=lambda s: put(s.index, 0, s.index[-1, 1])), r"keeps a token twice \(span 3: 1\)"),
    "no such row": (
        selection_with(target_row=lambda s: put(s.target_row, 0, s.index.shape[1])),
        r"a row that does not exist \(span 3: \d+\)",
    ),
    "a row before the first": (
        selection_with(target_row=lambda s: put(s.target_row, 0, -2)),
        r"a row that does not exist \(span 3: -2\)",
    ),
    "merged twice": (
        selection_with(source_tokens=lambda s: put(s.source_tokens, 0, s.source_tokens[-1, 1])),
        r"merges a token twice.*\(span 3: \d+\)",
    ),
    "weights as numbers": (
        selection_with(weights=lambda s: s.target_row),
        r"weights = .*int64.*give a tensor \[4, 2\] of floating point, as members",
    ),
    "weights of other width": (
        selection_with(weights=lambda s: torch.ones(4, 3)),
        r"weights = a tensor \[4, 3\] .* give a tensor \[4, 2\]",
    ),
    "a weight that is none": (
        selection_with(weights=lambda s: torch.full(s.target_row.shape, float("nan"))),
        r"weights that are not finite \(span 0: \d+\)",
    ),
    "weights and twice": (
        selection_with(
            weights=lambda s: torch.ones(s.target_row.shape), index=lambda s: put(s.index, 0, s.index[-1, 1])
        ),
        r"keeps a token twice \(span 3: 1\)",
    ),
    "kept and merged": (
        selection_with(source_tokens=lambda s: put(s.source_tokens, 0, s.index[-1, 0])),
        r"one that it also keeps \(span 3: 0\)",
    ),
}
MASKS: dict[str, tuple[Callable[..., Any], str]] = {
    "none": (lambda mask, view: None, r"returned None: give a tensor \[2, \d+\] of torch.bool on cpu"),
    "numbers": (lambda mask, view: mask.long(), r"returned a tensor \[2, \d+\] of torch.int64 on cpu: give a tensor"),
    "indices": (lambda mask, view: pack_right(mask, 3)[0], r"returned a tensor \[2, 3\] of torch.int64 on cpu: give"),
    "one sample": (
        lambda mask, view: mask[0],
        r"returned a tensor \[\d+\] of torch.bool on cpu: give a tensor \[2, \d+\]",
    ),
    "another device": (lambda mask, view: mask.to("meta"), "on meta: give a tensor .* on cpu"),
    "everything": (
        lambda mask, view: torch.ones_like(mask),
        r"another number of tokens than planned \(row 0: \d+ instead of \d+\)",
    ),
    "nothing": (
        lambda mask, view: torch.zeros_like(mask),
        r"another number of tokens than planned \(row 0: 0 instead of \d+\)",
    ),
    "one more": (
        lambda mask, view: put(mask, int((~mask[-1]).nonzero()[0]), True),
        r"than planned \(row 1: \d+ instead of \d+\)",
    ),
}
# on LLaVA all pictures have the same size; elsewhere the small ones of a batch are padded
PADDED: dict[str, tuple[Callable[..., Any], str]] = {
    "padding": (padding_of, r"padding in it \(span \d: \d+\)"),
    "rows that are none": (
        selection_with(valid=lambda s: torch.ones_like(s.valid)),
        "another number of rows than planned",
    ),
}
BATCH = (*MIXED[:2],)


def refused(family: str, stage: str, spoil: Callable[..., Any], message: str) -> None:
    model = shared(family)
    with pytest.raises(ValueError, match=rf"mine\.{stage}.*{message}"):
        with duet_vlm.attach(model, Mine(stage=stage, spoil=spoil)):
            forward(model, FAMILIES[family].inputs(BATCH))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("name", PLANS)
def test_wrong_plans(family: str, name: str) -> None:
    refused(family, "plan", *PLANS[name])


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("name", SELECTIONS)
def test_wrong_selections(family: str, name: str) -> None:
    refused(family, "select_tokens", *SELECTIONS[name])


@pytest.mark.parametrize("name", PADDED)
def test_padding_is_never_chosen(name: str) -> None:
    refused("qwen2_5_vl", "select_tokens", *PADDED[name])


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("name", MASKS)
def test_wrong_masks(family: str, name: str) -> None:
    refused(family, "prune_tokens", *MASKS[name])


@pytest.mark.parametrize("past", [0, 1000], ids=["padding", "past the end"])
def test_a_stage_of_a_composition_chooses_among_its_candidates(past: int) -> None:
    """Frames hands on a pool of a clip's tokens: what is not in it is no choice, though the clip may have such a token."""

    def beyond(selection: Selection, view: EncoderView) -> Selection:
        if view.modality != "video":
            return selection
        row = int(view.valid.sum(1).argmin())
        index = selection.index.clone()
        index[row, 0] = past or int(view.valid[row].sum())
        return dataclasses.replace(selection, index=index)

    model, inputs = shared("qwen2_5_vl"), FAMILIES["qwen2_5_vl"].inputs(clips_for("qwen2_5_vl"))
    with pytest.raises(
        ValueError,
        match=r"frames\+mine\.select_tokens returned a selection of tokens that do not exist \(span \d: -1\)",
    ):
        with duet_vlm.attach(model, duet_vlm.compose(Frames(keep=0.8), Mine(stage="select_tokens", spoil=beyond))):
            forward(model, inputs)


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl"])
@pytest.mark.parametrize("parts", ["joint", "per_crop"])
def test_the_method_that_is_spoiled_is_right_in_itself(family: str, parts: str) -> None:
    seen: list[str] = []
    with duet_vlm.attach(shared(family), checked(Mine(options=TokenOptions(crops=parts)), seen)) as handle:
        forward(shared(family), FAMILIES[family].inputs(BATCH))
        assert any(span.merged for row in handle.trace for span in row)
    assert {"select_tokens", "prune_tokens"} <= set(seen)


def test_a_plan_needs_a_stage_that_carries_it_out() -> None:
    """A method without V2V cannot let fewer rows in, one without T2V cannot choose who leaves later; leaving none needs
    no choice."""
    before, inside = VisionZip(dominant=4), duet_vlm.get_method("fastv")()
    with pytest.raises(ValueError, match="fewer rows enter than the span has, but this method is no EncoderReducer"):
        check_plan(inside, SpanPlan(8, 4, 0, (4, 4)), 8, 2)
    assert check_plan(inside, SpanPlan(8, 8, 0, (4, 2)), 8, 2).counts == (4, 2)
    with pytest.raises(ValueError, match="drops tokens before layer 1, but this method is no DecoderReducer"):
        check_plan(before, SpanPlan(8, 4, 0, (4, 2)), 8, 2)
    assert check_plan(before, SpanPlan(8, 4, 0, (4, 0)), 8, 2).counts == (4, 0)


def test_numbers_of_numpy_become_plain_ones() -> None:
    plan = SpanPlan(np.int64(8), np.int32(3), np.int64(1), [np.int64(4), np.int64(2)])
    found = check_plan(Mine(), plan, 8, 2)
    assert found == SpanPlan(8, 3, 1, (4, 2))
    assert all(type(n) is int for n in (found.tokens, found.dominant, found.contextual, *found.counts))


def test_a_method_without_a_name_is_called_by_its_class() -> None:
    class Nameless(Reducer):
        def plan(self, tokens: int, depth: int, budget: Any) -> SpanPlan:
            return SpanPlan(tokens, tokens, 0, (tokens,) * depth)

    with pytest.raises(ValueError, match=r"^Nameless\.plan\(tokens=4, depth=2\) returned None"):
        check_plan(Nameless(), None, 4, 2)


# ---- any selection, against loops


def view_of(valid: Tensor, rows: list[tuple[int, int]], device: str = "cpu") -> EncoderView:
    plans = tuple(SpanPlan(int(n), *pair, ()) for n, pair in zip(valid.sum(1).tolist(), rows, strict=True))
    counts = torch.tensor(rows, device=device)
    return EncoderView(valid.to(device), counts[:, 0], counts[:, 1], plans)


def faults(selection: Selection, view: EncoderView) -> set[InvalidSelection]:
    """All that is wrong with the values, one token after the other."""
    found: set[InvalidSelection] = set()
    tables = (
        x.tolist()
        for x in (selection.index, selection.valid, selection.source_tokens, selection.target_row, view.valid)
    )
    for index, valid, members, into, real, plan in zip(*tables, view.plans, strict=True):
        kept = [token for token, counts in zip(index, valid, strict=True) if counts]
        merged = []
        for member, row in zip(members, into, strict=True):
            if 0 <= row < len(valid) and valid[row]:
                merged.append(member)
            elif row != -1:
                found.add(InvalidSelection.INTO)
        everyone = [token for token in kept + merged if 0 <= token < len(real)]
        if len(everyone) < len(kept) + len(merged):
            found.add(InvalidSelection.RANGE)
        if len(kept) != plan.dominant + plan.contextual:
            found.add(InvalidSelection.ROWS)
        if not all(real[token] for token in everyone):
            found.add(InvalidSelection.PADDING)
        kept, merged = ([token for token in some if 0 <= token < len(real)] for some in (kept, merged))
        if len(set(kept)) < len(kept):
            found.add(InvalidSelection.TWICE)
        if len(set(merged)) < len(merged) or set(merged) & set(kept):
            found.add(InvalidSelection.MEMBERS)
    return found


@st.composite
def right_ones(draw: Any) -> tuple[Selection, EncoderView]:
    """Spans of unequal size, any rows in any order, any members, and anything at all where there is no row and no
    member."""
    batch, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    shown = [draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens)) for _ in range(batch)]
    orders = [draw(st.permutations([i for i in range(tokens) if row[i]])) for row in shown]
    rows = [(draw(st.integers(0, len(order))), 0) for order in orders]
    rows = [(n - (k := draw(st.integers(0, n))), k) for n, _ in rows]
    width = max(sum(pair) for pair in rows) + draw(st.integers(0, 2))
    joining = [
        order[sum(pair) : sum(pair) + draw(st.integers(0, tokens))] if sum(pair) else []
        for order, pair in zip(orders, rows, strict=True)
    ]
    most = max(map(len, joining)) + draw(st.integers(0, 2))
    anything = st.integers(-3, tokens + 3)
    index, valid, members, into = [], [], [], []
    for order, pair, joins in zip(orders, rows, joining, strict=True):
        entry = sum(pair)
        places = sorted(draw(st.permutations(range(width)))[:entry])
        at = dict(zip(places, order[:entry], strict=True))
        index.append([at.get(i, draw(anything)) for i in range(width)])
        valid.append([i in at for i in range(width)])
        free = most - len(joins)
        members.append([*joins, *(draw(anything) for _ in range(free))])
        into.append([*(draw(st.sampled_from(places)) for _ in joins), *[-1] * free])

    def table(rows: list[list[int]], width: int, dtype: torch.dtype) -> Tensor:
        return torch.tensor(rows, dtype=dtype).reshape(batch, width)

    rows_kept, rows_merged = (table(index, width, torch.long), table(valid, width, torch.bool)), (members, into)
    return Selection(*rows_kept, *(table(x, most, torch.long) for x in rows_merged)), view_of(torch.tensor(shown), rows)


@quick
@given(right_ones())
def test_a_right_selection_is_never_refused(pair: tuple[Selection, EncoderView]) -> None:
    selection, view = pair
    found, code = check_selection(Mine(), selection, view, view.plans)
    joins = selection.target_row >= 0
    assert int(code) == 0 and code.ndim == 0 and not faults(selection, view)
    assert torch.equal(found.valid, selection.valid) and torch.equal(found.target_row, selection.target_row)
    assert torch.equal(found.index[found.valid], selection.index[selection.valid])
    assert torch.equal(found.source_tokens[joins], selection.source_tokens[joins])


def test_with_weights_a_token_may_join_several_rows_and_be_kept() -> None:
    """Nothing is looked at of a weight that joins no row."""
    view = view_of(torch.ones(2, 5, dtype=torch.bool), [(2, 1), (3, 0)])
    index, members = torch.tensor([[0, 1, 2], [4, 0, 1]]), torch.tensor([[0, 4, 4, 1], [3, 3, 3, 2]])
    into = torch.tensor([[0, 0, 1, 2], [0, 0, 2, -1]])
    selection = Selection(index, torch.ones(2, 3, dtype=torch.bool), members, into, weights=torch.ones(2, 4))
    selection.weights[1, 3] = float("nan")
    assert check_selection(Mine(), selection, view, view.plans)[1] == 0
    assert code_of(dataclasses.replace(selection, weights=None), view)[1] == InvalidSelection.MEMBERS
    selection.weights[1, 2] = float("inf")
    assert code_of(selection, view)[1] == InvalidSelection.WEIGHTS
    assert code_of(dataclasses.replace(selection, source_tokens=put(members, 0, 9)), view)[1] == InvalidSelection.RANGE
    assert code_of(dataclasses.replace(selection, target_row=put(into, 0, 7)), view)[1] == InvalidSelection.INTO


@st.composite
def spoiled(draw: Any) -> tuple[Selection, EncoderView]:
    """A right one with a few numbers changed to others."""
    selection, view = draw(right_ones())
    tables = {name: getattr(selection, name).clone() for name in ("index", "valid", "source_tokens", "target_row")}
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from([name for name, table in tables.items() if table.numel()] or ["none"]))
        if name != "none":
            place = draw(st.integers(0, tables[name].numel() - 1))
            tables[name].view(-1)[place] = draw(
                st.booleans() if name == "valid" else st.integers(-3, view.valid.shape[1] + 3)
            )
    return dataclasses.replace(selection, **tables), view


def code_of(selection: Selection, view: EncoderView) -> tuple[Selection, int]:
    """As on an accelerator: nothing is raised yet."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation, "raise_if_invalid", lambda *_: None)
        found, code = check_selection(Mine(), selection, view, view.plans)
    return found, int(code)


@settings(quick, max_examples=300)
@given(spoiled())
def test_the_code_is_the_worst_fault_that_loops_find(pair: tuple[Selection, EncoderView]) -> None:
    selection, view = pair
    assert code_of(selection, view)[1] == max(faults(selection, view), default=0)


@settings(quick, max_examples=300)
@given(spoiled())
def test_until_it_is_told_a_wrong_selection_reads_nothing_out_of_bounds(pair: tuple[Selection, EncoderView]) -> None:
    selection, view = pair
    found, _ = code_of(selection, view)
    tokens, rows = view.valid.shape[1], found.index.shape[1]
    for table, lowest, end in (
        (found.index, 0, tokens),
        (found.source_tokens, 0, tokens),
        (found.target_row, -1, rows),
    ):
        assert bool(((table >= lowest) & (table < end)).all())
    assert bool((found.valid.sum(1) <= view.dominant + view.contextual).all())
    if rows:
        assert merged_rows(torch.ones(len(view.valid), tokens, 2), found).shape[1] == rows


@quick
@given(st.data())
def test_masks_against_loops(data: st.DataObject) -> None:
    batch, width = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 6))
    table = st.lists(st.lists(st.booleans(), min_size=width, max_size=width), min_size=batch, max_size=batch)
    mask, valid = torch.tensor(data.draw(table)), torch.tensor(data.draw(table))
    kept = [
        sum(a and b for a, b in zip(row, real, strict=True))
        for row, real in zip(mask.tolist(), valid.tolist(), strict=True)
    ]
    found, code = check_mask(Mine(), mask, valid, torch.tensor(kept))
    assert int(code) == 0 and found.tolist() == [
        [a and b for a, b in zip(row, real, strict=True)]
        for row, real in zip(mask.tolist(), valid.tolist(), strict=True)
    ]
    row = data.draw(st.integers(0, batch - 1))
    wanted = torch.tensor(kept)
    wanted[row] += data.draw(st.sampled_from([-1, 1]))
    with pytest.raises(
        ValueError, match=rf"mine\.prune_tokens .*\(row {row}: {kept[row]} instead of {int(wanted[row])}\)"
    ):
        check_mask(Mine(), mask, valid, wanted)


# ---- numbers that are none, other devices, cost


@pytest.mark.parametrize("signal", ["importance", "keys", "features"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_input_that_is_not_finite_is_told_before_the_choice_it_spoiled(signal: str, bad: float) -> None:
    view = view_of(torch.ones(2, 4, dtype=torch.bool), [(2, 0), (1, 0)])
    rows = torch.zeros(2, 4) if signal == "importance" else torch.zeros(2, 4, 3)
    rows[1, 2] = bad
    nowhere = Selection.keep_only(torch.full((2, 2), 99), torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="contain NaN or Inf: tokens cannot be ranked. Check the input image"):
        check_selection(Mine(), nowhere, dataclasses.replace(view, **{signal: rows}), view.plans)


def test_a_row_that_must_come_first_is_finite() -> None:
    """The importance of a fed CLS row is the largest float32 there is, in every span."""
    view = view_of(torch.ones(3, 4, dtype=torch.bool), [(2, 0)] * 3)
    view = dataclasses.replace(view, importance=torch.full((3, 4), torch.finfo(torch.float32).max))
    _, code = check_selection(Mine(), Selection.keep_only(*pack_right(view.valid, 2)), view, view.plans)
    assert int(code) == 0


@pytest.mark.parametrize("code", InvalidSelection)
def test_codes_that_were_read_later_tell_as_much(code: InvalidSelection) -> None:
    raise_if_invalid(0, Mine())
    verb = {
        InvalidSelection.KEPT: "prune_tokens",
        InvalidSelection.UNITS: "keep_patches",
        InvalidSelection.JOINS: "keep_patches",
    }.get(code, "select_tokens")
    expected = (
        "contain NaN or Inf" if code == InvalidSelection.INPUT else rf"^mine\.{verb} returned (a|units) .*: [^{{}}]+$"
    )
    with pytest.raises(ValueError, match=expected):
        raise_if_invalid(int(code), Mine())
    assert len(set(MESSAGES.values())) == len(InvalidSelection) - 1


class Sizes(TorchDispatchMode):
    """Numbers that each operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.made += [x.numel() for x in (out if isinstance(out, tuple | list) else [out]) if isinstance(x, Tensor)]
        return out


def test_on_other_devices_no_value_is_read_and_nothing_large_is_made() -> None:
    """Tensors without storage have no value that could be read; of the largest span no table is made but of its tokens."""
    batch, tokens, rows = 3, 700, 80
    view = view_of(torch.ones(batch, tokens, dtype=torch.bool), [(60, 20)] * batch, "meta")
    view = dataclasses.replace(
        view, importance=torch.empty(batch, tokens, device="meta"), keys=torch.empty(batch, tokens, 16, device="meta")
    )
    index = torch.zeros(batch, rows, dtype=torch.long, device="meta")
    members = torch.zeros(batch, 100, dtype=torch.long, device="meta")
    with Sizes() as sizes:
        weights = torch.empty(members.shape, device="meta")
        check_selection(Mine(), Selection(index, index > 0, members, members, weights=weights), view, view.plans)
        assert len(sizes.made) < 60
        sizes.made.clear()
        selection, code = check_selection(Mine(), Selection(index, index > 0, members, members), view, view.plans)
        mask, told = check_mask(Mine(), view.valid, view.valid, view.dominant)
    assert code.device.type == told.device.type == "meta" and code.ndim == told.ndim == 0
    assert selection.index.shape == index.shape and mask.shape == view.valid.shape
    assert max(sizes.made) <= batch * (tokens + 1)
    assert len(sizes.made) < 60
    assert int(torch.stack([torch.tensor(0), torch.tensor(4)]).amax()) == 4  # several calls, one code
