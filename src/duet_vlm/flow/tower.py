"""In front of the tower's blocks: choose the units that go through them, and hand out what comes out at its full length.

Rows that left come back as zeros behind the tower, so that everything that the model does with its output (select a layer, cut CLS off,
shuffle cells of patches into tokens, pool, split by pictures) runs unchanged. Units are whole cells, so no living token ever mixes with such
a row. Towers whose pictures stand side by side in a batch are served here; those that pack them into one row in ``flow/packed.py``.
"""

from __future__ import annotations

import dataclasses
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from duet_vlm.budget import Stages
from duet_vlm.flow import compat
from duet_vlm.flow.call import EncoderCall, Stacks
from duet_vlm.flow.verify import checked_counts, checked_merged, checked_units
from duet_vlm.models.adapter import Adapter, Blocks, Recorded
from duet_vlm.ops.merge import BLOCK, in_stretches, sizes_of, weighed_means
from duet_vlm.ops.ragged import pack_right, take, take_square
from duet_vlm.ops.score import cls_attention, column_attention
from duet_vlm.parts import left_in_tower
from duet_vlm.tower import Grid, Merged, TowerReducer, TowerView


class Run(ABC):
    """What goes through the tower in one call; where units leave behind a block, what is left now.

    Attributes
    ----------
    stages : dict
        Blocks whose attention has run -> units of each picture that are to be left then.
    grids : tuple
        (rows, columns) of each picture's units.
    extra : int
        Rows in front of the units of each picture.
    weighs : bool
        Rows stand for several in the attention, by their sizes.
    merges_left : bool
        What comes behind the blocks sees only what is left, too.
    wrong : Tensor
        The code of what the method returned (flow/verify.py).
    pooled : tuple of int
        Units of each picture that stand for what left in front of the blocks, and are not read.
    """

    merges_left: ClassVar[bool]

    stages: dict[int, tuple[int, ...]]
    grids: tuple[Grid, ...]
    extra: int
    weighs: bool
    wrong: Tensor
    pooled: tuple[int, ...]

    @property
    @abstractmethod
    def patches_of_unit(self) -> int:
        """How many patches a unit is."""

    @property
    def counts(self) -> tuple[int, ...]:
        """Units of each picture that are left to be read in the end."""
        return tuple(n - pooled for n, pooled in zip(self.stages[max(self.stages)], self.pooled, strict=True))

    @property
    def planned(self) -> list[Stages]:
        """Per picture where units leave, and how many are left."""
        return [tuple(zip(self.stages, left, strict=True)) for left in zip(*self.stages.values(), strict=True)]

    @property
    @abstractmethod
    def ran(self) -> list[Stages]:
        """The same as the blocks had it, padding included, counted on their rows."""

    @abstractmethod
    def alive(self) -> Tensor:
        """[P, N, 1] float32, as the adapter's ``carried`` takes numbers of patches: which are left."""

    @abstractmethod
    def recorded(self, calls: list[Recorded]) -> list[Recorded]:
        """Queries and keys of the rows that are left as those of all, each with its size."""

    @abstractmethod
    def mask(self, mask: Any, key: Tensor) -> Any:
        """The attention mask of a block with keys [P, H, R, d], given that of the whole tower."""

    @abstractmethod
    def of_units(self, rows: Tensor) -> Tensor:
        """What the blocks have of each row [B, R, C] as the method sees it: [P, U, C] float32, means over a unit's patches."""

    @abstractmethod
    def attention(self, calls: list[Recorded]) -> Tensor:
        """[B, R] CLS attention of each row, or attention that it receives."""

    @abstractmethod
    def view(self, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """[P, U] bool, the units of which ``counts`` are to be left, and their numbers in the picture."""

    @abstractmethod
    def sizes(self) -> Tensor:
        """[P, U] float32, how many units each of them stands for."""

    @abstractmethod
    def cut(self, chosen: Chosen, hidden: Tensor, after: int) -> tuple[Tensor, Tensor]:
        """Go on with these units: of the rows of a block [.., R, D] those that are left [.., R', D], merged where they are to be, and their
        places among all [B, R']."""


@dataclasses.dataclass(frozen=True)
class Chosen:
    """Units that go on, as places in what the method was shown: ``index`` [P, K] in its order, of which ``valid`` [P, K] are real; ``size``
    [P, K] float32, how many units each stands for; ``counts`` of each picture, of which ``pooled`` are ``unread`` [P, K] and stand for what left;
    ``into`` [P, U]: where units merge, which one each joins."""

    index: Tensor
    valid: Tensor
    size: Tensor
    counts: tuple[int, ...]
    pooled: tuple[int, ...]
    unread: Tensor
    wrong: Tensor
    into: Tensor | None

    def entering(self, units: Tensor) -> Tensor:
        """Of the rows of all units [P, U, C] in front of the blocks those that go on [P, K, C]."""
        if self.into is None:
            return take(units, self.index)
        return weighed_means(units, torch.ones_like(self.into, dtype=torch.float32), self.into, self.index)


def choose(
    tower: TowerReducer, patches: Tensor, real: Tensor, counts: Sequence[int], grids: Sequence[Grid], weighs: bool,
    pixels: Tensor | None = None, before: tuple[int, ...] = (),
) -> Chosen:  # fmt: skip
    """What ``tower`` chooses in front of the blocks.

    Parameters
    ----------
    patches : Tensor
        [P, U, c, D] patch embeddings of the c patches of each unit, without position.
    real : Tensor
        [P, U, c] bool, False for padding.
    counts : sequence of int
        Units of each picture that are to be left; empty where a threshold says how many.
    weighs : bool
        Survivors stand for those that leave.
    """
    mean = mean_of(patches, real)
    some = real.any(2)
    signals = {"contrast": contrast(patches, mean, real) if "contrast" in tower.tower_signals else None, "pixels": pixels}
    unit = torch.arange(some.shape[1], device=some.device).expand(some.shape)
    return decide(tower, some, counts, patches.mean(2, dtype=torch.float32) - mean[:, 0], some.float(), weighs, grids=tuple(grids), before=before,
                  unit=unit, **signals)  # fmt: skip


def decide(
    tower: TowerReducer, there: Tensor, counts: Sequence[int], metric: Tensor | None, size: Tensor, weighs: bool, **shown: Any
) -> Chosen:
    """What ``tower`` chooses of the units that are ``there`` [P, U], each standing for ``size`` [P, U] of them; ``metric`` [P, U, d] says which
    are alike, ``shown`` what else the method looks at."""
    last = there & (shown["unit"] == shown["unit"].masked_fill(~there, -1).amax(1, keepdim=True)) & tower.keep_predicting  # may have to predict
    free = there & ~last
    keep = (torch.tensor(counts, device=there.device) if counts else there.sum(1)) - last.sum(1)
    view = TowerView(free, keep, tuple(n - tower.keep_predicting for n in counts), **shown)
    picked, place = tower.stay(view), torch.arange(there.shape[1], device=there.device).expand(there.shape)
    into, order = None, place
    if isinstance(picked, Merged):
        if not view.after:
            raise ValueError(f"{tower.name}.stay returned who joins whom in front of the blocks: units join others behind a block's attention only")
        into, mask, wrong = checked_merged(tower, picked, view)
        order = place if picked.order is None else picked.order
    else:
        mask, wrong = checked_units(tower, picked, view)
    mask = mask | last
    counts = tuple(counts) or tuple(mask.sum(1).tolist())
    unread, pooled = torch.zeros_like(mask), (0,) * len(counts)
    if tower.context:
        pooled = tuple(tower.pooled(high * wide, n) for (high, wide), n in zip(view.grids, counts, strict=True))
        groups, gone = torch.tensor(pooled, device=there.device), there & ~mask
        into = in_stretches(gone, groups)
        unread = unread.scatter(1, into, gone & (groups > 0)[:, None])
        counts = tuple(map(sum, zip(counts, pooled, strict=True)))
    index, valid = pack_right((mask | unread).gather(1, order), max(counts))
    index = order.gather(1, index)
    if into is not None:
        size = torch.zeros_like(size).scatter_add(1, into, size * there).gather(1, index) * valid
    elif weighs:
        assert metric is not None
        size = sizes_of(metric, mask | ~there, index, valid, size)
    else:
        size = size.gather(1, index) * valid
    return Chosen(index, valid, size, counts, pooled, unread.gather(1, index), wrong, into)


def mean_of(patches: Tensor, real: Tensor) -> Tensor:
    """[P, U, c, D] -> [P, 1, 1, D] float32, over the patches that are real."""
    blocks = zip(patches.split(BLOCK, 1), real.split(BLOCK, 1), strict=True)
    total = sum((some.float() * there[..., None]).sum((1, 2), keepdim=True) for some, there in blocks)
    return total / real.sum((1, 2))[:, None, None, None]


def contrast(patches: Tensor, mean: Tensor, real: Tensor) -> Tensor:
    """[P, U, c, D] -> [P, U] float32: how far patches lie from their picture's mean [P, 1, 1, D], mean over a unit's; padding lies nowhere."""
    blocks = zip(patches.split(BLOCK, 1), real.split(BLOCK, 1), strict=True)  # memory is that of the scores
    return torch.cat([((some.float() - mean).norm(dim=-1) * there).mean(2) for some, there in blocks], 1)


@dataclasses.dataclass
class BatchRun(Run):
    """``Run`` of a tower that takes pictures as a batch.

    Attributes
    ----------
    units : Tensor
        [P, U] numbers of the units that are left, of which ``there`` [P, U] are real and ``read`` [P, U] are read behind the tower, and their
        ``size`` [P, U] (0 where it is none).
    content : Tensor
        [P, U] bool, those that show more than padding, and become tokens.
    cells : Tensor
        [units of a picture, c] numbers of the patches of each.
    total : int
        Rows of the whole tower.
    """

    merges_left: ClassVar[bool] = False

    stages: dict[int, tuple[int, ...]]
    grids: tuple[Grid, ...]
    extra: int
    weighs: bool
    wrong: Tensor
    pooled: tuple[int, ...]
    units: Tensor
    there: Tensor
    read: Tensor
    content: Tensor
    size: Tensor
    cells: Tensor
    total: int
    entering: Chosen | None = None  # until its rows are handed over
    widths: dict[int, int] = dataclasses.field(default_factory=dict)  # units in the batch since each cut

    @property
    def ran(self) -> list[Stages]:
        return [tuple(self.widths.items())] * len(self.units)

    @property
    def patches_of_unit(self) -> int:
        return self.cells.shape[1]

    @property
    def rows(self) -> Tensor:
        """[P, R] numbers of the rows that are left in the whole tower, those in front of the patches first, then unit by unit."""
        front = torch.arange(self.extra, device=self.units.device).expand(len(self.units), -1)
        return torch.cat([front, self.extra + self.cells[self.units].flatten(1)], 1)

    def of_rows(self, units: Tensor, front: float) -> Tensor:
        """Numbers of units [P, U] as those of rows [P, R]."""
        return nn.functional.pad(units.repeat_interleave(self.cells.shape[1], 1), (self.extra, 0), value=front)

    def alive(self) -> Tensor:
        return self.whole(self.of_rows((self.there & self.read).float(), 1.0)[..., None])[:, self.extra :]

    def whole(self, rows: Tensor, dim: int = 1) -> Tensor:
        """Rows that are left, along ``dim``, as those of the whole tower: zeros where they are gone."""
        shape = list(rows.shape)
        shape[dim] = self.total + 1  # the last one collects what is not valid
        place = torch.where(self.of_rows(self.there, True), self.rows, self.total)
        place = place.view(len(place), *[1] * (dim - 1), -1, *[1] * (rows.ndim - dim - 1)).expand(rows.shape)
        return rows.new_zeros(shape).scatter(dim, place, rows).narrow(dim, 0, self.total)

    def row_sizes(self) -> Tensor:
        """[P, R] float32, how many rows each one stands for in the attention; 0: it is not there."""
        return self.of_rows(self.size if self.weighs else self.there.float(), 1.0)

    def recorded(self, calls: list[Recorded]) -> list[Recorded]:
        size = self.whole(self.row_sizes())
        return [dataclasses.replace(one, query=self.whole(one.query, 2), key=self.whole(one.key, 2), size=size) for one in calls]

    @property
    def is_stock(self) -> bool:
        """Whether the rows are still those of the whole tower, in its order and not unit by unit."""
        return not self.widths and self.cells.shape[1] == 1

    def bias(self, key: Tensor) -> Tensor | None:
        """What is added to the attention logits; None where nothing is hidden and all weigh alike."""
        if not self.widths or not self.weighs and len(set(self.counts)) == 1:
            return None
        return self.row_sizes().log().clamp(min=torch.finfo(key.dtype).min).to(key.dtype)[:, None, None]

    def mask(self, mask: Any, key: Tensor) -> Any:
        if self.is_stock:
            return mask
        bias = self.bias(key)
        if not isinstance(mask, Tensor):
            return bias
        if mask.ndim == 2:  # which patches are no padding, as flash attention takes it
            return mask.gather(1, self.rows)
        seen = take_square(mask, self.rows)
        if seen.dtype == torch.bool:
            seen = torch.zeros_like(seen, dtype=key.dtype).masked_fill(~seen, torch.finfo(key.dtype).min)
        return seen if bias is None else (seen + bias).clamp(min=torch.finfo(key.dtype).min)

    def of_units(self, rows: Tensor) -> Tensor:
        return rows[:, self.extra :].unflatten(1, (-1, self.cells.shape[1])).mean(2, dtype=torch.float32)

    def attention(self, calls: list[Recorded]) -> Tensor:
        (one,) = calls
        size = self.row_sizes()
        if self.extra:
            return nn.functional.pad(cls_attention(one.query, one.key, one.scaling, size), (1, 0))
        return column_attention(one.query, one.key, one.scaling, one.sample, size)

    def view(self, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
        return content_first(self.there, self.there & self.content, counts), self.units

    def sizes(self) -> Tensor:
        return self.size

    def begin(self, chosen: Chosen) -> None:
        """Only these units come to the first block."""
        self.entering = chosen
        self._go_on(chosen, 0)

    def enter(self, hidden: Tensor) -> Tensor:
        """Of the rows of the whole tower [P, total, D] those that come to the first block, unit by unit [P, R, D]."""
        chosen, self.entering = self.entering, None
        if chosen is None or chosen.into is None:
            return take(hidden, self.rows)
        units = chosen.entering(hidden[:, self.extra + self.cells].flatten(2)).unflatten(2, (self.cells.shape[1], -1)).flatten(1, 2)
        return torch.cat([hidden[:, : self.extra], units], 1)

    def cut(self, chosen: Chosen, hidden: Tensor, after: int) -> tuple[Tensor, Tensor]:
        count = self.cells.shape[1]
        front = torch.arange(self.extra, device=hidden.device).expand(len(hidden), -1)
        patches = (chosen.index[..., None] * count + torch.arange(count, device=hidden.device)).flatten(1) + self.extra
        kept = torch.cat([front, patches], 1)
        if chosen.into is None:
            rows = take(hidden, kept)
        else:
            units = hidden[:, self.extra :].unflatten(1, (-1, count)).flatten(2)
            merged = weighed_means(units, self.size, chosen.into, chosen.index).unflatten(2, (count, -1)).flatten(1, 2)
            rows = torch.cat([hidden[:, : self.extra], merged], 1)
        self._go_on(chosen, after)
        return rows, kept

    def _go_on(self, chosen: Chosen, after: int) -> None:
        self.units, self.content = (x.gather(1, chosen.index) for x in (self.units, self.content))
        self.there, self.read, self.size, self.pooled = chosen.valid, ~chosen.unread, chosen.size, chosen.pooled
        self.widths[after], self.wrong = chosen.index.shape[1], torch.maximum(self.wrong, chosen.wrong)
        self.stages[after] = chosen.counts


class TowerFlow:
    """The hooks on the towers of one model."""

    def __init__(self, adapter: Adapter, stacks: Stacks) -> None:
        self.adapter, self.stacks = adapter, stacks

    def running(self) -> tuple[EncoderCall, TowerReducer] | None:
        """The running encoder call, if something reduces in its tower."""
        call = self.stacks.encoders[-1] if self.stacks.encoders else None
        return None if call is None or call.rules.tower is None else (call, call.rules.tower)

    def stages(
        self, call: EncoderCall, tower: TowerReducer, spans: list[tuple[int, ...]], depth: int, whole: int | None = None
    ) -> dict[int, tuple[int, ...]]:
        """After the attention of how many of ``depth`` blocks units leave, and how many of each picture are left then, by the plan of its span;
        ``spans``: units of each picture, span by span, and ``whole`` where the tower sees more of it. Where a threshold decides, none are named.
        """
        if call.rules.by_threshold:
            return {0: ()}
        fed, beside = self.adapter.fed(call.encoding), self.adapter.beside(call.encoding, len(spans))
        plans = [call.rules.span([n + fed for n in sizes], rows, call.each) for sizes, rows in zip(spans, beside, strict=True)]
        left = [
            left_in_tower(plan, sizes, fed) if plan.tower is not None else [whole or n for n in sizes]
            for plan, sizes in zip(plans, spans, strict=True)
        ]
        before = [n if plan.tower is not None else whole or n for plan, sizes in zip(plans, spans, strict=True) for n in sizes]
        return stages_of(tower, before, [n for some in left for n in some], depth, [whole or n for sizes in spans for n in sizes])

    def embedded(self, module: nn.Module, args: Any, output: Tensor) -> None:
        """Post-hook of the patch embedding."""
        if running := self.running():
            running[0].patches = output.detach()
            running[0].pixels = args[0].detach() if "pixels" in running[1].tower_signals else None

    def enter(
        self, blocks: Blocks, depth: int, parameters: tuple[str, ...], stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Pre-hook of what runs the blocks: hand over the rows that are left."""
        running = self.running()
        if running is None or running[0].patches is None:
            return None
        call, tower = running
        again = recomputes(blocks.tower)
        with torch.no_grad(), compat.without_autocast(running[0].patches):
            call.tower = self._begin(call, tower, blocks, depth, again)
        call.patches = call.pixels = None
        if call.tower is None or call.aside or call.tower.is_stock:  # who calls the encoder himself gets what the stock model gives
            return None
        given = dict(zip(parameters, args, strict=False)) | kwargs
        given[parameters[0]] = call.tower.enter(given[parameters[0]])
        if "attention_mask" in parameters and max(call.tower.stages) == 0:  # else block by block
            given["attention_mask"] = call.tower.mask(given.get("attention_mask"), given[parameters[0]])
        return (), given

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Post-hook of the tower: every row that it hands out at its old place."""
        running = self.running()
        if running is None or running[0].tower is None or running[0].aside:
            return
        run: BatchRun = running[0].tower
        width = run.extra + run.units.shape[1] * run.cells.shape[1]

        def full(rows: Tensor | None) -> Tensor | None:  # None: a layer that nobody asked for
            return rows if rows is None or rows.shape[1] != width else run.whole(rows)

        output.last_hidden_state = full(output.last_hidden_state)
        if getattr(output, "hidden_states", None) is not None:
            output.hidden_states = tuple(map(full, output.hidden_states))

    def _begin(self, call: EncoderCall, tower: TowerReducer, blocks: Blocks, depth: int, again: bool) -> BatchRun | None:
        """What goes through the tower; None: all of it. ``again``: its blocks run a second time in the backward pass."""
        assert call.patches is not None
        pictures, _, high, wide = call.patches.shape
        cell, device = self.adapter.cell_of(call.encoding, blocks), call.patches.device
        grid = high // cell, wide // cell
        total = grid[0] * grid[1]
        spans = self.adapter.pictures(call.encoding, pictures, total)
        stages = self.stages(call, tower, spans, depth, total)
        if not stages:
            return None
        cells = in_cells(torch.arange(high * wide, device=device).view(high, wide), cell)
        rows = call.patches.flatten(2).transpose(1, 2)
        real = self.adapter.real_patches(call.encoding, pictures)
        real = torch.ones(rows.shape[:2], dtype=torch.bool, device=device) if real is None else real.to(device)
        real = real[:, cells]
        if self.adapter.shows_padding:  # then the last token of a picture is one, padding or not
            real[:, -1] = True
        every, content = torch.ones_like(real[..., 0]), real.any(2)
        weighs = weighing(tower, takes_bias(blocks, stages, again))
        run = BatchRun(
            stages, (grid,) * pictures, blocks.extra, weighs, torch.zeros((), dtype=torch.long, device=device), (0,) * pictures,
            torch.arange(total, device=device).expand(pictures, -1), every, every, content, every.float(), cells, blocks.extra + high * wide,
        )  # fmt: skip
        if max(stages) and again:
            raise runs_again()
        if 0 not in stages:
            return run
        pixels = None if call.pixels is None else in_patches(call.pixels, high, wide)[:, cells].flatten(2)[:, :, None]
        if stages[0]:
            real = real | (content_first(every, content, stages[0]) & ~content)[..., None]
        chosen = choose(tower, rows[:, cells], real, stages[0], [grid] * pictures, weighs, pixels, frames_before(call, spans))
        if min(chosen.counts) == total:
            return None
        run.begin(chosen)
        return run


def content_first(there: Tensor, content: Tensor, counts: Sequence[int]) -> Tensor:
    """[P, U] bool: what can be chosen of the units that are ``there``: those with ``content``; all, where these are fewer than ``counts``."""
    enough = content.sum(1) >= torch.tensor(counts, device=content.device)
    return torch.where(enough[:, None], content, there)


def stages_of(
    tower: TowerReducer, before: Sequence[int], left: Sequence[int], depth: int, whole: Sequence[int]
) -> dict[int, tuple[int, ...]]:
    """Boundary -> units of each picture that are left there; only those at which some leave. ``before``: units of each picture that can become
    tokens, of the ``whole`` that the tower sees."""
    boundaries = tower.boundaries(depth)
    counts = list(zip(*(checked_counts(tower, n, k, depth) for n, k in zip(before, left, strict=True)), strict=True))
    arriving, stages = tuple(whole), {}
    for after, staying in zip(boundaries, counts, strict=True):
        if staying != arriving:
            stages[after] = arriving = staying
    return stages


def weighing(tower: TowerReducer, possible: bool) -> bool:
    """Whether rows stand for several in the attention; ``possible``: a bias can be handed to it."""
    if tower.context and not possible:
        raise ValueError(
            f"context={tower.context}: rows that stand for what leaves need a bias of the tower's attention, which flash attention does not take, "
            "nor does this tower with gradient checkpointing: leave context out, or load the tower with attn_implementation='sdpa'"
        )
    return possible and (tower.mass or tower.context > 0)


def is_flash(tower: Any) -> bool:
    """Whether a tower's attention kernel takes neither mask nor bias."""
    return "flash" in (tower.config._attn_implementation or "")


def runs_again() -> ValueError:
    """Where units leave behind blocks, nobody could repeat that."""
    return ValueError(
        "units cannot leave behind a block of a vision tower that runs again in the backward pass (gradient checkpointing): switch it off for "
        "the tower, or take a method that chooses in front of the blocks (contrast)"
    )


def recomputes(tower: nn.Module) -> bool:
    """Whether blocks run again in the backward pass, when nobody knows any more which call they belonged to."""
    return torch.is_grad_enabled() and tower.training and any(getattr(module, "gradient_checkpointing", False) for module in tower.modules())


def takes_bias(blocks: Blocks, stages: dict[int, tuple[int, ...]], again: bool) -> bool:
    """Whether the attention of a tower can be biased; without, pictures that keep unlike many cannot stand in one batch."""
    if not is_flash(blocks.tower):
        return blocks.takes_mask or not again
    for counts in stages.values():
        if len(set(counts)) == 1:
            continue
        if not counts:
            raise ValueError(
                "flash attention takes no mask, and a threshold keeps unlike many units of the pictures of a batch: give keep=, or load the tower "
                "with attn_implementation='sdpa'"
            )
        raise ValueError(
            f"flash attention takes no mask, and the pictures of this call would keep {min(counts)} to {max(counts)} units: give a fraction that "
            "leaves equally many, or load the tower with attn_implementation='sdpa'"
        )
    return False


def in_patches(pixels: Tensor, high: int, wide: int) -> Tensor:
    """Pictures [P, C, H, W] patch by patch: [P, high * wide, m]."""
    patches = pixels.unflatten(3, (wide, -1)).unflatten(2, (high, -1))
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def frames_before(call: EncoderCall, spans: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Per picture the number of the frame before it in its clip, or -1; ``spans`` lists the pictures of each."""
    starts = {sum(map(len, spans[:number])) for number in range(len(spans))}
    clip = call.encoding.stream == "video"
    return tuple(n - 1 if clip and n not in starts else -1 for n in range(sum(map(len, spans))))


def in_cells(grid: Tensor, cell: int) -> Tensor:
    """Numbers of patches [h, w] by unit: [U, cell * cell], units line by line; what fills no cell is left out."""
    rows, columns = (size // cell for size in grid.shape)
    table = grid[: rows * cell, : columns * cell].unflatten(1, (columns, cell)).unflatten(0, (rows, cell))
    return table.transpose(1, 2).flatten(2).flatten(0, 1)


def names_of(stack: nn.Module) -> tuple[str, ...]:
    """The names of what a stack of blocks takes, in order."""
    plain: Callable[..., Any] = stack.forward
    return tuple(inspect.signature(plain).parameters)
