"""Check the result of a method before it is used.

A wrong count, a token twice or a padding token would not fail on its own: later steps would use other tokens than the
report says. Plans are checked on the host. Of selections and masks, type, shape, dtype and device are known at once;
what depends on values is reduced to one code, a 0-dim int64 tensor (0: nothing wrong, else the worst
``InvalidSelection``), without reading the device. On the CPU a code that is not 0 is raised at once, elsewhere with the
next device read. Until then a wrong selection is harmless: the selection that is handed back points at tokens that
exist and has no more rows than planned, so no kernel reads out of bounds. A right one is handed back with the same
meaning, and a row that is not valid, or a member that joins none (-1), may hold any number.

How to call them::

    # where plans are made, once per size
    plan = check_plan(reducer, reducer.plan(tokens, depth, budget), tokens, depth)
    # wherever select_tokens is called, of parts too
    selection, code = check_selection(reducer, reducer.select_tokens(view), view, view.plans)
    # wherever prune_tokens is called
    mask, code = check_mask(reducer, reducer.prune_tokens(view), view.valid, view.num_keep)
    # where the code has been read
    raise_if_invalid(int(code), reducer)

Codes of several calls of one method are one: ``torch.stack(codes).amax()``. In a prefill the codes of selections stand
beside ``finite`` in the one read of the entry; look at ``finite`` first, numbers that are not finite explain any
choice. Codes of masks wait, as the flags of scores do, until somebody asks for the run.

Cost: a selection takes some thirty small kernels (fifty with members) over [B, N] or [B, K + P] numbers, and one sum
over what the method was shown; a mask takes six over [B, V]. About a tenth of a millisecond. Nothing is sorted, nothing
is N x N, nothing is moved.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from enum import IntEnum
from numbers import Integral
from typing import NoReturn, TypeAlias

import torch
from torch import Tensor

from duet_vlm.planning.budget import SpanPlan
from duet_vlm.planning.tokens import MERGES, Selection
from duet_vlm.reducers.base import Reducer
from duet_vlm.reducers.decoder import DecoderReducer, DecoderView
from duet_vlm.reducers.encoder import EncoderReducer, EncoderView
from duet_vlm.reducers.vision_tower import MergePairs, TowerReducer, TowerView

MEMBER = 1 << 32  # how a member counts in a table where a kept row counts 1

Values: TypeAlias = "Tensor | tuple[Tensor, Tensor] | None"
# where each kind is true, and what was found there (instead of what)
Faults: TypeAlias = "dict[InvalidSelection, tuple[Tensor, Values]]"


class InvalidSelection(IntEnum):
    """The kind of fault of a selection or a mask; of several the largest is reported."""

    WEIGHTS = 1
    MEMBERS = 2
    INTO = 3
    TWICE = 4
    PADDING = 5
    ROWS = 6
    RANGE = 7
    INPUT = 8
    KEPT = 9
    UNITS = 10
    JOINS = 11


MESSAGES = {
    InvalidSelection.WEIGHTS: "select_tokens returned a selection with weights that are not finite{}: the weight of a member that joins a row is a finite number",
    InvalidSelection.MEMBERS: "select_tokens returned a selection that merges a token twice, or one that it also keeps{}: every token is kept, merged once or dropped "
    "(give weights to merge it into several rows)",
    InvalidSelection.INTO: "select_tokens returned a selection that merges a token into a row that does not exist{}: into is the number of a valid row of index, or -1",
    InvalidSelection.TWICE: "select_tokens returned a selection that keeps a token twice{}: the valid entries of index must differ",
    InvalidSelection.PADDING: "select_tokens returned a selection with padding in it{}: choose and merge tokens only where view.valid is True",
    InvalidSelection.ROWS: "select_tokens returned a selection with another number of rows than planned{}: per span, view.dominant + view.contextual rows are valid",
    InvalidSelection.RANGE: "select_tokens returned a selection of tokens that do not exist{}: index and members are token numbers from 0 to view.valid.shape[1] - 1",
    InvalidSelection.KEPT: "prune_tokens returned a mask that keeps another number of tokens than planned{}: per row, keep exactly view.num_keep of the tokens in view.valid",
    InvalidSelection.UNITS: "keep_patches returned a mask that keeps another number of units than planned{}: per picture, keep exactly view.num_keep of those in view.valid",
}

MESSAGES[InvalidSelection.JOINS] = (
    "keep_patches returned units that join what does not stay, or an order that is none{}: into names, for each unit in view.valid, the place of one that "
    "stays (its own if it does), and order every place once"
)
PLACES = {InvalidSelection.KEPT: "row", InvalidSelection.UNITS: "picture", InvalidSelection.JOINS: "picture"}


def raise_if_invalid(code: int, reducer: Reducer, where: str = "") -> None:
    """Raise the ValueError that a code stands for; 0 is none. ``where`` says more, if more is known."""
    if code == InvalidSelection.INPUT:
        raise not_finite("the image features or attention scores that rank the visual tokens")
    if code:
        raise ValueError(f"{_name(reducer)}.{MESSAGES[InvalidSelection(code)].format(where)}")


def not_finite(what: str) -> ValueError:
    return ValueError(
        f"{what} contain NaN or Inf: tokens cannot be ranked. Check the input image, the weights and the dtype (try bfloat16 or float32)."
    )


def check_finite(flag: Tensor, what: str) -> None:
    """Raise if a flag says that something is not finite.

    Checked at once on the CPU only; elsewhere the one read of the prefill covers it.
    """
    if flag.device.type == "cpu" and not bool(flag):
        raise not_finite(what)


# ---- plans


def check_plan(reducer: Reducer, plan: SpanPlan, tokens: int, depth: int) -> SpanPlan:
    """The plan that ``reducer`` made for a span of ``tokens`` in a decoder of ``depth`` layers, its counts as plain
    ints.

    Raises
    ------
    ValueError
        If it is none that a span can have; the message names the method and what it returned.
    """

    def refuse(why: str) -> NoReturn:
        raise ValueError(f"{_name(reducer)}.plan(tokens={tokens}, depth={depth}) returned {plan!r}: {why}")

    if not isinstance(plan, SpanPlan):
        refuse("return a duet_vlm.SpanPlan")
    if not isinstance(plan.counts, Sequence):
        refuse("counts must be a tuple of ints, one per decoder layer")
    if not all(
        isinstance(n, Integral) and not isinstance(n, bool)
        for n in (plan.tokens, plan.dominant, plan.contextual, *plan.counts)
    ):
        refuse("tokens, dominant, contextual and counts must be ints")
    counts = tuple(int(n) for n in plan.counts)
    tower = None if plan.tower is None else int(plan.tower)
    checked = SpanPlan(
        int(plan.tokens), int(plan.dominant), int(plan.contextual), counts, floored=bool(plan.floored), tower=tower
    )
    if plan.structure or plan.parts:
        refuse("structure and parts are filled in later; leave them out")
    if checked.tokens != tokens:
        refuse(f"tokens must be the {tokens} that were asked for")
    if len(checked.counts) != depth:
        refuse(f"counts must have one number for each of the {depth} decoder layers, it has {len(checked.counts)}")
    if min(checked.dominant, checked.contextual, *checked.counts) < 0:
        refuse("a token count cannot be negative")
    if checked.entry > tokens:
        refuse(f"dominant + contextual = {checked.entry} rows are more than the span's {tokens}")
    if tower is not None and not checked.entry <= tower <= tokens:
        refuse(f"tower={tower} must lie between the {checked.entry} rows that enter and the span's {tokens}")
    before = checked.entry
    for layer, count in enumerate(checked.counts):
        if count > (checked.entry if reducer.reenters else before):
            refuse(
                f"layer {layer} cannot read {count} tokens where {before} are left: counts may not grow with depth (with re-entry they may), nor "
                "exceed what enters"
            )
        if 0 < count < before and not isinstance(reducer, DecoderReducer):
            refuse(f"it drops tokens before layer {layer}, but this method is no DecoderReducer: nothing says which")
        before = count
    if checked.reduces_entry and not isinstance(reducer, EncoderReducer):
        refuse(
            "fewer rows enter than the span has, but this method is no EncoderReducer: nothing says which; drop at layer 0 instead"
        )
    return checked


# ---- selections


def check_selection(
    reducer: Reducer, selection: Selection, view: EncoderView, plans: Sequence[SpanPlan]
) -> tuple[Selection, Tensor]:
    """The selection that ``reducer`` made of ``view``, and the code of what is wrong with it.

    Parameters
    ----------
    selection : Selection
        B spans of up to N tokens, K rows and P members, on the device of ``view``.
    view : EncoderView
        The view of the method.
    plans : sequence of SpanPlan
        Of each span, as ``view.plans``: ``dominant + contextual`` rows.

    Returns
    -------
    selection, code : Selection, Tensor
        0-dim int64; 0 on the CPU, where anything else is raised.

    Raises
    ------
    ValueError
        The message names the fault, the method and its result.
    """
    max_planned = max(plan.entry for plan in plans)
    return _checked(
        reducer, "select_tokens", selection, view.valid, view.dominant + view.contextual, max_planned, _shown_to(view)
    )


def check_rows(reducer: DecoderReducer, selection: Selection, view: DecoderView) -> tuple[Selection, Tensor]:
    """As ``check_selection``, for the ``view.num_keep`` of rows [B, V] that `prune_tokens` keeps and merges inside the
    decoder."""
    if not reducer.merges:
        raise ValueError(
            f"{_name(reducer)}.prune_tokens returned a Selection: a method that merges inside the decoder says so (merges = True)"
        )
    return _checked(
        reducer, "prune_tokens", selection, view.valid, view.num_keep, max(stay for _, stay in view.host_counts), None
    )


def _checked(
    reducer: Reducer,
    verb: str,
    selection: Selection,
    view_valid: Tensor,
    num_planned: Tensor,
    max_planned: int,
    view_inputs: Tensor | None,
) -> tuple[Selection, Tensor]:
    """A selection and the code of what is wrong with it.

    ``view_valid`` [B, N] are the tokens of the view, ``num_planned`` [B] the rows that are wanted, ``max_planned`` the
    largest of these; ``view_inputs`` [B, N] is finite where the inputs of the view are.
    """
    _check_form(reducer, verb, selection, view_valid, max_planned)
    index, valid, members, into = selection.index, selection.valid, selection.source_tokens, selection.target_row
    tokens, rows = view_valid.shape[1], index.shape[1]
    faults: Faults = {}
    chosen, chosen_valid, weight, weights = index, valid, valid.long(), selection.weights
    if members.shape[1]:
        row = into.clamp(0, max(rows - 1, 0))
        joins = (row == into) & (valid if rows else valid.new_zeros(len(valid), 1)).gather(1, row)
        chosen, chosen_valid = torch.cat([index, members], 1), torch.cat([valid, joins], 1)
        weight = torch.cat([weight, joins * MEMBER], 1)
        faults[InvalidSelection.INTO] = joins != (into != -1), into
        if weights is not None:
            faults[InvalidSelection.WEIGHTS] = joins & ~weights.isfinite(), members
        into = torch.where(joins, into, -1)
    # those outside are the worst that is wrong, so that they count as others hides nothing
    inside = chosen.clamp(0, tokens - 1)
    times = weight.new_zeros(view_valid.shape).scatter_add_(1, inside, weight)
    if members.shape[1] and weights is None:
        faults[InvalidSelection.MEMBERS] = times > MEMBER, None
    faults[InvalidSelection.TWICE] = times % MEMBER > 1, None
    faults[InvalidSelection.PADDING] = times.masked_fill(view_valid, 0), None
    faults[InvalidSelection.ROWS] = _differ(valid.sum(1), num_planned)
    faults[InvalidSelection.RANGE] = chosen_valid & (inside != chosen), chosen
    if view_inputs is not None:
        faults[InvalidSelection.INPUT] = view_inputs * 0 != 0, None
    code = _code(reducer, faults)
    kept = valid & (valid.cumsum(1) <= num_planned[:, None])
    return Selection(
        inside[:, :rows], kept, inside[:, rows:], into, selection.merge, weights, selection.tags, selection.custom_rows
    ), code


def _check_form(reducer: Reducer, verb: str, selection: Selection, view_valid: Tensor, max_planned: int) -> None:
    """Check type, shape, dtype and device of a selection, without its values."""

    def refuse(what: str) -> NoReturn:
        raise ValueError(f"{_name(reducer)}.{verb} returned {what}")

    if not isinstance(selection, Selection):
        refuse(f"{_shown(selection)}: return a duet_vlm.Selection")
    batch = len(view_valid)
    for name, dtype in (
        ("index", torch.int64),
        ("valid", torch.bool),
        ("source_tokens", torch.int64),
        ("target_row", torch.int64),
    ):
        tensor = getattr(selection, name)
        form = isinstance(tensor, Tensor) and tensor.ndim == 2 and len(tensor) == batch and tensor.dtype == dtype
        if not form or tensor.device != view_valid.device:
            columns = "K" if name in ("index", "valid") else "P"
            refuse(f"{name} = {_shown(tensor)}: give a tensor [{batch}, {columns}] of {dtype} on {view_valid.device}")
    for a, b in (("index", "valid"), ("source_tokens", "target_row")):
        shapes = [tuple(getattr(selection, name).shape) for name in (a, b)]
        if shapes[0] != shapes[1]:
            refuse(f"{a} of shape {shapes[0]} and {b} of shape {shapes[1]}: they must be alike")
    if (weights := selection.weights) is not None:
        form = (
            isinstance(weights, Tensor)
            and weights.shape == selection.source_tokens.shape
            and weights.is_floating_point()
        )
        if not form or weights.device != view_valid.device:
            expected = f"give a tensor {list(selection.source_tokens.shape)} of floating point, as members, on {view_valid.device}, or None"
            refuse(f"weights = {_shown(weights)}: {expected}")
    if (tags := selection.tags) is not None:
        form = isinstance(tags, Tensor) and tags.shape == selection.index.shape and tags.dtype == torch.float32
        if not form or tags.device != view_valid.device:
            refuse(
                f"notes = {_shown(tags)}: give a tensor {list(selection.index.shape)} of {torch.float32}, as index, on {view_valid.device}, or None"
            )
    if (custom_rows := selection.custom_rows) is not None:
        form = (
            isinstance(custom_rows, Tensor)
            and custom_rows.ndim == 3
            and custom_rows.shape[:2] == selection.index.shape
            and custom_rows.is_floating_point()
        )
        if not form or custom_rows.device != view_valid.device or weights is None:
            refuse(
                f"rows = {_shown(custom_rows)}: give a tensor {[*selection.index.shape, 'C']} of floating point on {view_valid.device}, with weights, or None"
            )
    if selection.merge not in MERGES:
        refuse(f"merge={selection.merge!r}: choose one of {', '.join(map(repr, MERGES))}")
    if selection.index.shape[1] < max_planned:
        refuse(f"{selection.index.shape[1]} rows per span: {max_planned} are planned for the largest")


def _shown_to(view: EncoderView) -> Tensor | None:
    """[B, N] float32: a sum over all inputs of a token, finite if they are; None without inputs."""
    shown = [x if x.ndim == 2 else x.sum(-1, dtype=torch.float32) for x in view.finite_inputs()]
    return functools.reduce(torch.add, shown) if shown else None


# ---- masks


def check_units(reducer: TowerReducer, mask: Tensor, view: TowerView) -> tuple[Tensor, Tensor]:
    """As ``check_mask``, for the units [P, U] that go through the tower.

    Any number of them where a threshold decides.
    """
    keep = view.num_keep if view.host_num_keep else None
    return check_mask(reducer, mask, view.valid, keep, "keep_patches", InvalidSelection.UNITS)


def check_merge_pairs(reducer: TowerReducer, merged: MergePairs, view: TowerView) -> tuple[Tensor, Tensor, Tensor]:
    """The target of each unit [P, U] (invalid units keep themselves), the mask of the kept units, and the code."""
    position = torch.arange(view.valid.shape[1], device=view.valid.device).expand(view.valid.shape)
    for name, value in (("target", merged.target), ("order", position if merged.order is None else merged.order)):
        form = (
            isinstance(value, Tensor)
            and value.shape == position.shape
            and value.dtype == torch.int64
            and value.device == position.device
        )
        if not form:
            raise ValueError(
                f"{_name(reducer)}.keep_patches returned {name} = {_shown(value)}: give a tensor {list(position.shape)} of {torch.int64}"
            )
    inside = merged.target.clamp(0, position.shape[1] - 1)
    into = torch.where(view.valid, inside, position)
    mask = (into == position) & view.valid
    faults: Faults = {InvalidSelection.UNITS: _differ(mask.sum(1), view.num_keep)}
    faults[InvalidSelection.JOINS] = view.valid & ((into != merged.target) | ~mask.gather(1, into)), merged.target
    if merged.order is not None:
        faults[InvalidSelection.JOINS] = (
            faults[InvalidSelection.JOINS][0] | (merged.order.sort(1).values != position),
            merged.target,
        )
    return into, mask, _code(reducer, faults)


def check_counts(reducer: TowerReducer, units: int, left: int, depth: int) -> Sequence[int]:
    """Kept units of a picture of ``units`` at each boundary.

    Raises
    ------
    ValueError
        If these are no counts that a picture can have.
    """
    boundaries, counts = reducer.boundaries(depth), reducer.stage_counts(units, left, depth)
    if (
        len(counts) != len(boundaries)
        or list(counts) != sorted(counts, reverse=True)
        or not 1 <= left == counts[-1] <= counts[0] <= units
    ):
        raise ValueError(
            f"{_name(reducer)}.stage_counts(units={units}, left={left}, depth={depth}) returned {list(counts)}: for each of the {len(boundaries)} "
            f"boundaries a number of units, none above the one before, at last {left}"
        )
    return counts


def check_mask(
    reducer: Reducer,
    mask: Tensor,
    valid: Tensor,
    keep: Tensor | None,
    verb: str = "prune_tokens",
    wrong: InvalidSelection = InvalidSelection.KEPT,
) -> tuple[Tensor, Tensor]:
    """The mask [B, V] that ``reducer`` made of the tokens that stay, False for padding, and the code of what is wrong
    with it.

    ``valid`` [B, V] bool and ``keep`` [B] are those of the ``DecoderView`` (None: any number, but one at least where
    there are any). The code is a 0-dim int64 tensor; on the CPU it is 0.

    Raises
    ------
    ValueError
        What is wrong, the method and what it returned.
    """
    form = isinstance(mask, Tensor) and mask.shape == valid.shape and mask.dtype == torch.bool
    if not form or mask.device != valid.device:
        expected = f"give a tensor {list(valid.shape)} of {torch.bool} on {valid.device}"
        raise ValueError(f"{_name(reducer)}.{verb} returned {_shown(mask)}: {expected}")
    mask = mask & valid
    num_kept = mask.sum(1)
    # of a picture of one unit there is nothing to choose
    num_expected = num_kept.maximum(valid.any(1).long()) if keep is None else keep
    return mask, _code(reducer, {wrong: _differ(num_kept, num_expected)})


# ---- both


def _differ(actual: Tensor, expected: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    return actual != expected, (actual, expected)


def _code(reducer: Reducer, faults: Faults) -> Tensor:
    """The largest kind that is anywhere true: 0-dim int64. On the CPU it is raised."""
    device = next(iter(faults.values()))[0].device
    code = torch.zeros((), dtype=torch.int64, device=device)
    for kind in sorted(faults):
        code = code.masked_fill(faults[kind][0].any(), int(kind))
    if device.type == "cpu":
        _raise_at_once(reducer, code, faults)
    return code


def _raise_at_once(reducer: Reducer, code: Tensor, faults: Faults) -> None:
    if kind := int(code):
        raise_if_invalid(kind, reducer, _where(InvalidSelection(kind), *faults[InvalidSelection(kind)]))


def _where(kind: InvalidSelection, table: Tensor, values: Values) -> str:
    """The first position where a table is True, and the value there: its column number if no values are given."""
    position = tuple(table.nonzero()[0].tolist())
    if isinstance(values, tuple):
        description = f"{int(values[0][position])} instead of {int(values[1][position])}"
    else:
        description = str(position[-1] if values is None else int(values[position]))
    return f" ({PLACES.get(kind, 'span')} {position[0]}: {description})"


def _name(reducer: Reducer) -> str:
    return getattr(reducer, "name", type(reducer).__name__)  # not registered yet


def _shown(value: object) -> str:
    return (
        f"a tensor {list(value.shape)} of {value.dtype} on {value.device}" if isinstance(value, Tensor) else repr(value)
    )
