"""In front of the tower's blocks: choose the units that go through them, and hand out what comes out at its full length.

Rows that left come back as zeros behind the tower, so that everything that the model does with its output (select a layer, cut CLS off,
shuffle cells of patches into tokens, pool, split by pictures) runs unchanged. Units are whole cells, so no living token ever mixes with such
a row. Towers whose pictures stand side by side in a batch are served here; those that pack them into one row in ``flow/packed.py``.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from duet_vlm.flow import compat
from duet_vlm.flow.call import EncoderCall, Stacks
from duet_vlm.flow.verify import checked_units
from duet_vlm.models.adapter import Adapter, Blocks, Recorded
from duet_vlm.ops.merge import BLOCK, sizes_of
from duet_vlm.ops.ragged import pack_right, take, take_square
from duet_vlm.parts import left_in_tower
from duet_vlm.tower import Grid, TowerReducer, TowerView


class Run(Protocol):
    """What goes through the tower in one call. ``counts``: units of each picture that are left; ``wrong``: the code of what the method
    returned (flow/verify.py); ``merges_left``: what comes behind the blocks sees only these, too."""

    merges_left: ClassVar[bool]
    counts: tuple[int, ...]
    wrong: Tensor

    @property
    def ran(self) -> Sequence[int]:
        """Units of each picture that the blocks worked on, padding included, counted on their rows."""

    def alive(self) -> Tensor:
        """[P, N, 1] float32, as the adapter's ``carried`` takes numbers of patches: which are left."""

    def recorded(self, calls: list[Recorded]) -> list[Recorded]:
        """Queries and keys of the rows that are left as those of all, each with its size."""

    def bias(self, key: Tensor) -> Tensor | None:
        """What is added to the attention logits of ``key`` [P, H, R, d], where the tower hands over no mask of its own."""


@dataclasses.dataclass(frozen=True)
class Chosen:
    """Units that go through the tower: ``index`` [P, K] ascending, of which ``valid`` [P, K] are real; ``size`` [P, K] float32, how many units
    each stands for; ``mask`` [P, U] the same units."""

    mask: Tensor
    index: Tensor
    valid: Tensor
    size: Tensor
    wrong: Tensor


def choose(tower: TowerReducer, patches: Tensor, real: Tensor, counts: Sequence[int], grids: Sequence[Grid], weighs: bool) -> Chosen:
    """What ``tower`` chooses.

    Parameters
    ----------
    patches : Tensor
        [P, U, c, D] patch embeddings of the c patches of each unit, without position.
    real : Tensor
        [P, U, c] bool, False for padding.
    counts : sequence of int
        Units of each picture that are to be left.
    weighs : bool
        Survivors stand for those that leave.
    """
    mean = mean_of(patches, real)
    some, keep = real.any(2), torch.tensor(counts, device=patches.device)
    last = (some & (some.cumsum(1) == some.sum(1, keepdim=True))) & tower.keep_predicting  # the last row of a picture may have to predict
    view = TowerView(
        some & ~last, keep - last.sum(1), tuple(n - tower.keep_predicting for n in counts), tuple(grids),
        contrast(patches, mean, real) if "contrast" in tower.tower_signals else None,
    )  # fmt: skip
    mask, wrong = checked_units(tower, tower.stay(view), view)
    mask = mask | last
    index, valid = pack_right(mask, max(counts))
    size = sizes_of(patches.mean(2, dtype=torch.float32) - mean[:, 0], mask | ~some, index, valid) if weighs else valid.float()
    return Chosen(mask, index, valid, size, wrong)


def mean_of(patches: Tensor, real: Tensor) -> Tensor:
    """[P, U, c, D] -> [P, 1, 1, D] float32, over the patches that are real."""
    blocks = zip(patches.split(BLOCK, 1), real.split(BLOCK, 1), strict=True)
    total = sum((some.float() * there[..., None]).sum((1, 2), keepdim=True) for some, there in blocks)
    return total / real.sum((1, 2))[:, None, None, None]


def contrast(patches: Tensor, mean: Tensor, real: Tensor) -> Tensor:
    """[P, U, c, D] -> [P, U] float32: how far patches lie from their picture's mean [P, 1, 1, D], mean over a unit's; padding lies nowhere."""
    blocks = zip(patches.split(BLOCK, 1), real.split(BLOCK, 1), strict=True)  # memory is that of the scores
    return torch.cat([((some.float() - mean).norm(dim=-1) * there).mean(2) for some, there in blocks], 1)


@dataclasses.dataclass(frozen=True)
class BatchRun:
    """``Run`` of a tower that takes pictures as a batch.

    Attributes
    ----------
    rows : Tensor
        [P, R] rows in front of the patches, and the patches that are left, unit by unit.
    valid : Tensor
        [P, R] bool; pictures may keep unlike many.
    size : Tensor
        [P, R] float32, how many rows each stands for; 0 where it is not valid.
    total, extra, unit : int
        Rows of the whole tower, those in front of the patches, and patches of a unit.
    weighs : bool
        Sizes bias the attention.
    """

    merges_left: ClassVar[bool] = False

    counts: tuple[int, ...]
    rows: Tensor
    valid: Tensor
    size: Tensor
    total: int
    extra: int
    unit: int
    weighs: bool
    wrong: Tensor

    @property
    def ran(self) -> Sequence[int]:
        return [(self.rows.shape[1] - self.extra) // self.unit] * len(self.rows)

    def alive(self) -> Tensor:
        return self.whole(self.valid[..., None].float())[:, self.extra :]

    def whole(self, rows: Tensor, dim: int = 1) -> Tensor:
        """Rows that are left, along ``dim``, as those of the whole tower: zeros where they are gone."""
        shape = list(rows.shape)
        shape[dim] = self.total + 1  # the last one collects what is not valid
        place = torch.where(self.valid, self.rows, self.total)
        place = place.view(len(place), *[1] * (dim - 1), -1, *[1] * (rows.ndim - dim - 1)).expand(rows.shape)
        return rows.new_zeros(shape).scatter(dim, place, rows).narrow(dim, 0, self.total)

    def recorded(self, calls: list[Recorded]) -> list[Recorded]:
        size = self.whole(self.size)
        return [dataclasses.replace(one, query=self.whole(one.query, 2), key=self.whole(one.key, 2), size=size) for one in calls]

    def bias(self, key: Tensor) -> Tensor | None:
        if not self.weighs and len(set(self.counts)) == 1:
            return None
        return self.size.log().clamp(min=torch.finfo(key.dtype).min).to(key.dtype)[:, None, None]


class TowerFlow:
    """The hooks on the towers of one model."""

    def __init__(self, adapter: Adapter, stacks: Stacks) -> None:
        self.adapter, self.stacks = adapter, stacks

    def running(self) -> tuple[EncoderCall, TowerReducer] | None:
        """The running encoder call, if something reduces in its tower."""
        call = self.stacks.encoders[-1] if self.stacks.encoders else None
        tower = None if call is None else getattr(call.rules.reducer, "tower", None)
        return None if call is None or tower is None else (call, tower)

    def counts(self, call: EncoderCall, spans: list[tuple[int, ...]], whole: int | None = None) -> tuple[int, ...]:
        """Units of each picture that are left, by the plan of its span; ``spans``: units of each picture, span by span, and ``whole`` where the
        tower sees more of it."""
        fed, beside = self.adapter.fed(call.encoding), self.adapter.beside(call.encoding, len(spans))
        plans = [call.rules.span([n + fed for n in sizes], rows, call.each) for sizes, rows in zip(spans, beside, strict=True)]
        left = [
            left_in_tower(plan, sizes, fed) if plan.tower is not None else [whole or n for n in sizes]
            for plan, sizes in zip(plans, spans, strict=True)
        ]
        return tuple(n for counts in left for n in counts)

    def embedded(self, module: nn.Module, args: Any, output: Tensor) -> None:
        """Post-hook of the patch embedding."""
        if running := self.running():
            running[0].patches = output.detach()

    def enter(self, blocks: Blocks, parameters: tuple[str, ...], stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pre-hook of what runs the blocks: hand over the rows that are left."""
        running = self.running()
        if running is None or running[0].patches is None:
            return None
        call, tower = running
        assert call.patches is not None
        with torch.no_grad(), compat.without_autocast(call.patches):
            call.tower, call.patches = self._choose(call, tower, blocks), None
        if call.tower is None or call.aside:  # who calls the encoder himself gets what the stock model gives
            return None
        given = dict(zip(parameters, args, strict=False)) | kwargs
        given[parameters[0]] = take(given[parameters[0]], call.tower.rows)
        if "attention_mask" in parameters:
            given["attention_mask"] = cut(given.get("attention_mask"), call.tower, given[parameters[0]])
        return (), given

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Post-hook of the tower: every row that it hands out at its old place."""
        running = self.running()
        if running is None or running[0].tower is None or running[0].aside:
            return
        run: BatchRun = running[0].tower

        def full(rows: Tensor | None) -> Tensor | None:  # None: a layer that nobody asked for
            return rows if rows is None or rows.shape[1] != run.rows.shape[1] else run.whole(rows)

        output.last_hidden_state = full(output.last_hidden_state)
        if getattr(output, "hidden_states", None) is not None:
            output.hidden_states = tuple(map(full, output.hidden_states))

    def _choose(self, call: EncoderCall, tower: TowerReducer, blocks: Blocks) -> BatchRun | None:
        assert call.patches is not None
        pictures, _, high, wide = call.patches.shape
        grid = high // blocks.cell, wide // blocks.cell
        total = grid[0] * grid[1]
        counts = self.counts(call, self.adapter.pictures(call.encoding, pictures, total), total)
        if min(counts) == total:
            return None
        units = in_cells(torch.arange(high * wide, device=call.patches.device).view(high, wide), blocks.cell)
        rows = call.patches.flatten(2).transpose(1, 2)
        real = self.adapter.real_patches(call.encoding, pictures)
        real = torch.ones(rows.shape[:2], dtype=torch.bool, device=rows.device) if real is None else real.to(rows.device)
        enough = real[:, units].any(2).sum(1) >= torch.tensor(counts, device=rows.device)
        real = real | ~enough[:, None]  # of less picture than that some padding goes along
        if self.adapter.shows_padding:  # then the last token of a picture is one, padding or not
            real[:, units[-1]] = True
        weighs = tower.mass and takes_bias(blocks, counts)
        chosen = choose(tower, rows[:, units], real[:, units], counts, [grid] * pictures, weighs)
        front = torch.arange(blocks.extra, device=rows.device).expand(pictures, -1)
        valid, size = (x.repeat_interleave(units.shape[1], 1) for x in (chosen.valid, chosen.size))
        return BatchRun(
            counts, torch.cat([front, blocks.extra + units[chosen.index].flatten(1)], 1), torch.cat([torch.ones_like(front).bool(), valid], 1),
            torch.cat([torch.ones_like(front).float(), size], 1), blocks.extra + high * wide, blocks.extra, units.shape[1], weighs,
            chosen.wrong,
        )  # fmt: skip


def is_flash(tower: Any) -> bool:
    """Whether a tower's attention kernel takes neither mask nor bias."""
    return "flash" in (tower.config._attn_implementation or "")


def recomputes(tower: nn.Module) -> bool:
    """Whether blocks run again in the backward pass, when nobody knows any more which call they belonged to."""
    return torch.is_grad_enabled() and tower.training and any(getattr(module, "gradient_checkpointing", False) for module in tower.modules())


def takes_bias(blocks: Blocks, counts: Sequence[int]) -> bool:
    """Whether the attention of a tower can be biased; without, pictures that keep unlike many cannot stand in one batch."""
    if not is_flash(blocks.tower):
        return not (blocks.attentions and recomputes(blocks.tower))
    if len(set(counts)) > 1:
        raise ValueError(
            f"flash attention takes no mask, and the pictures of this call would keep {min(counts)} to {max(counts)} units: give a fraction that "
            "leaves equally many, or load the tower with attn_implementation='sdpa'"
        )
    return False


def cut(mask: Any, run: BatchRun, rows: Tensor) -> Any:
    """The attention mask of the rows that are left [P, R, D], with the bias of their sizes; None where nothing is hidden and all weigh alike."""
    bias = run.bias(rows)
    if not isinstance(mask, Tensor):
        return bias
    if mask.ndim == 2:  # which patches are no padding, as flash attention takes it
        return mask.gather(1, run.rows)
    seen = take_square(mask, run.rows)
    if seen.dtype == torch.bool:
        seen = torch.zeros_like(seen, dtype=rows.dtype).masked_fill(~seen, torch.finfo(rows.dtype).min)
    return seen if bias is None else (seen + bias).clamp(min=torch.finfo(rows.dtype).min)


def in_cells(grid: Tensor, cell: int) -> Tensor:
    """Numbers of patches [h, w] by unit: [U, cell * cell], units line by line; what fills no cell is left out."""
    rows, columns = (size // cell for size in grid.shape)
    table = grid[: rows * cell, : columns * cell].unflatten(1, (columns, cell)).unflatten(0, (rows, cell))
    return table.transpose(1, 2).flatten(2).flatten(0, 1)


def names_of(stack: nn.Module) -> tuple[str, ...]:
    """The names of what a stack of blocks takes, in order."""
    plain: Callable[..., Any] = stack.forward
    return tuple(inspect.signature(plain).parameters)
