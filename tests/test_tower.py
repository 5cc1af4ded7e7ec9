"""Reduction in front of the tower: survivors are those of the whole tower that does not see the rest, everything else
follows from them."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from families import FAMILIES, MIXED, TEXT, TWO, Inputs, Picture, build, clips_for, forward, generate, shared
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface

import duet_vlm
from duet_vlm.models.adapter import EncoderCall, VarlenTower
from duet_vlm.models.lookup import adapter_for
from duet_vlm.ops.merge import in_stretches
from duet_vlm.profiling.flop_counter import count_flops
from duet_vlm.reducers.options import TokenOptions
from duet_vlm.reducers.vision_tower import MergePairs, TowerReducer, TowerView
from duet_vlm.runtime.vision_tower.batched import BatchedTowerState
from duet_vlm.runtime.vision_tower.capabilities import use_size_bias
from duet_vlm.runtime.vision_tower.concatenated import ConcatenatedTowerState
from duet_vlm.runtime.vision_tower.selection import select_patches
from duet_vlm.runtime.vision_tower.varlen import VarlenTowerState
from duet_vlm.utils.field_types import merged

SERVED = list(FAMILIES)
CONTENT = [(name, "images") for name in SERVED] + [(name, "clips") for name in SERVED if FAMILIES[name].video is True]
KEEP = 0.45
# what packing cuts off leaves first, and crops then keep unlike many
PACKING = ("llava_next", "llava_next_video", "llava_onevision")
DROPPING = ["contrast", "key_norm", "evit"]  # rows leave, and are not merged
INSIDE = ["key_norm", "evit", "tome_tower"]
FRONT = ["contrast", "motion", "rlt", "pixelprune", "random_patches", "checkerboard"]


def suits(family: str, method: str) -> bool:
    """Whether the tower's rows are not read before units can leave, and its attention ranks pictures."""
    behind = method.split("+")[0]
    return behind not in INSIDE or not (family == "vipllava" or (family == "qwen2_5_vl" and behind == "evit"))


def cells(methods: list[str], contents: bool = False) -> list[Any]:
    """(family, method), or (family, "images" or "clips", method)."""
    items = CONTENT if contents else [(family,) for family in SERVED]
    return [(*item, method) for method in methods for item in items if suits(item[0], method)]


def spelled(cell: str) -> tuple[str, dict[str, Any]]:
    """``contrast+duet/3``: with three rows for what leaves."""
    method, _, rows = cell.partition("/")
    return method, {"options": {"pooled_context_tokens": int(rows)}} if rows else {}


def rows_of(family: str, content: str) -> list[Any]:
    return [fitting(family, row) for row in ([*MIXED] if content == "images" else [*clips_for(family), TEXT])]


def fitting(family: str, row: Any) -> Any:
    """LLaVA-OneVision resizes other pictures."""
    if family != "llava_onevision":
        return row
    return tuple(Picture(x.seed, 4, 4) if isinstance(x, Picture) and not x.frames else x for x in row)


@pytest.fixture
def towers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What went through the towers of the calls that follow."""
    seen: list[Any] = []
    from duet_vlm.runtime.encode.encoder import EncoderHooks

    real, cuts = EncoderHooks._store_result, {}
    for kind in (BatchedTowerState, VarlenTowerState):
        monkeypatch.setattr(kind, "drop_patches", remembering(kind.drop_patches, cuts))

    def finish(self: Any, output: Any, call: Any) -> Any:
        if call.tower_work.state is not None:
            run = call.tower_work.state
            run.content_before = (
                None if isinstance(run, VarlenTowerState) else content_of(self.adapter, call.encoding, run)
            )
            run.history = {max(run.stages): whole_sizes(run)} | cuts.pop(id(run), {})
            # patches that fill no token leave in front, but of pictures that stay whole
            if isinstance(run, ConcatenatedTowerState):
                some = torch.cat([run.cells.flatten(), run.spare])
                run.history.setdefault(0, torch.zeros(1, run.patches_before).index_fill(1, some, 1.0))
            seen.append((call.encoding.stream, call.tower_work.state))
        return real(self, output, call)

    monkeypatch.setattr(EncoderHooks, "_store_result", finish)
    return seen


def remembering(cut: Any, cuts: dict[int, Any]) -> Any:
    """``cut`` that notes what was left since when."""

    def cut_and_note(run: Any, chosen: Any, hidden: Tensor, after: int) -> Any:
        made = cut(run, chosen, hidden, after)
        cuts.setdefault(id(run), {})[after] = whole_sizes(run)
        return made

    return cut_and_note


def content_of(adapter: Any, encoding: EncoderCall, run: BatchedTowerState) -> Tensor:
    """[P, U] bool: units that show more than padding."""
    real = adapter.real_patches(encoding, len(run.units))
    real = torch.ones(len(run.units), run.total - run.num_cls, dtype=torch.bool) if real is None else real.clone()
    found = real[:, run.cells].any(2)
    found[:, -1] |= adapter.feeds_padding
    return found


def whole_sizes(run: Any) -> Tensor:
    """How many rows each row of the whole tower stands for: [P, rows]; of packed towers [1, rows] in the order of their
    blocks."""
    if isinstance(run, ConcatenatedTowerState):
        return run.whole(run.row_sizes()[None])
    if isinstance(run, BatchedTowerState):
        return run.whole(run.row_sizes())
    sizes = run.size.new_zeros(run.total).index_copy(
        0, run.packed.slots[run.entry_index], run.size if run.uses_size_bias else torch.ones_like(run.size)
    )
    return sizes.repeat_interleave(run.packed.unit)[None]


# ---- the slow twin: the whole tower, dropped patches hidden as keys, survivors weighed


class Twin:
    """Attention that hides and weighs keys: ``sizes`` of the whole tower's rows since the attention of so many blocks."""

    def __init__(self, numbers: dict[int, int]) -> None:
        self.numbers = numbers  # of blocks, by the identity of their attention
        self.sizes: dict[int, Tensor] | None = None
        self.run: Any = None
        self.at = 0

    def reading(self, plain: Any, run: Any, *args: Any, **kwargs: Any) -> Any:
        if self.sizes is not None:  # one encoder method calls another
            return plain(*args, **kwargs)
        self.sizes, self.run = run.history, run
        try:
            return plain(*args, **kwargs)
        finally:
            self.sizes = self.run = None

    def pool_input(self, stack: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Pre-hook of what runs the blocks."""
        if self.run is None:
            return None
        if args:
            return (pooled_slowly(args[0], self.run), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, kwargs | {name: pooled_slowly(kwargs[name], self.run)}

    def pool_output(self, embedding: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        """Post-hook of the patch embedding of packed towers."""
        return None if self.run is None else pooled_slowly(output[None], self.run)[0]

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        scaling: float,
        **kwargs: Any,
    ) -> Any:
        assert self.sizes is not None
        rows = key.shape[2]
        since = max((after for after in self.sizes if after <= self.numbers[id(module)]), default=None)
        sizes = torch.ones(len(key), rows) if since is None else self.sizes[since]
        if len(sizes) != len(key) or sizes.shape[1] != rows:  # segment by segment
            self.at, first = (self.at + rows) % sizes.shape[1], self.at
            sizes = sizes[:, first : first + rows]
        groups = query.shape[1] // key.shape[1]
        logits = query @ key.repeat_interleave(groups, 1).transpose(2, 3) * scaling + sizes.log()[:, None, None]
        if isinstance(attention_mask, Tensor):
            logits = (
                logits.masked_fill(~attention_mask, -torch.inf)
                if attention_mask.dtype == torch.bool
                else logits + attention_mask
            )
        weights = logits.softmax(-1).nan_to_num(0.0)  # a segment of which nothing is left
        return (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2), None


def pooled_slowly(hidden: Tensor, run: Any) -> Tensor:
    """Rows in front of the first block with the means of what leaves in the places of those that stand for it."""
    hidden, start = hidden.clone(), 0
    for picture, (high, wide) in enumerate(run.grids):
        if isinstance(run, BatchedTowerState):
            row, rows, read = (
                hidden[picture],
                [(run.num_cls + cell).tolist() for cell in run.cells],
                run.survivors()[picture, run.cells[:, 0], 0],
            )
        else:
            units = range(start, start + high * wide)
            packed = [list(range(u * run.packed.unit, (u + 1) * run.packed.unit)) for u in units]
            row, rows = (
                hidden[0],
                [run.cells[u].tolist() for u in units] if isinstance(run, ConcatenatedTowerState) else packed,
            )
            read = run.survivors()[0, [some[0] for some in rows], 0]
            start += high * wide
        content = [True] * len(rows) if run.content_before is None else run.content_before[picture]
        gone = [unit for unit in range(high * wide) if content[unit] and not read[unit]]
        for number in range(run.pooled_count[picture]):
            members = [
                unit for rank, unit in enumerate(gone) if rank * run.pooled_count[picture] // len(gone) == number
            ]
            if not members:  # less left than that, beside padding
                continue
            mean = sum(row[rows[unit]] for unit in members) / len(members)
            row[rows[members[(len(members) - 1) // 2]]] = mean
    return hidden


def rows_of_twin(family: str, inputs: Inputs, runs: list[Any]) -> dict[str, list[Tensor]]:
    """Per stream and span the rows of the stock model whose tower does not see what left."""
    model = build(family)
    core = model.model
    towers = [
        FAMILIES[family].blocks(model),
        *([core.video_tower.encoder.layers] if hasattr(core, "video_tower") else []),
    ]
    twin = Twin(
        {id(FAMILIES[family].attention(block)): number for blocks in towers for number, block in enumerate(blocks)}
    )
    AttentionInterface.register("tower_twin", twin)
    for blocks in towers:
        for block in blocks:
            attention = FAMILIES[family].attention(block)
            attention.config = copy.copy(attention.config)
            attention.config._attn_implementation_internal = "tower_twin"
    for part in adapter_for(model).blocks_to_reduce():
        if isinstance(part, VarlenTower):
            part.module.patch_embed.register_forward_hook(twin.pool_output)
        else:
            part.stack.register_forward_pre_hook(twin.pool_input, with_kwargs=True)
    for stream, run in runs:
        name = f"get_{stream}_features"
        plain = getattr(core, name)
        setattr(core, name, functools.wraps(plain)(functools.partial(twin.reading, plain, run)))
    with duet_vlm.attach(model, "none") as handle:
        forward(model, inputs)
        return by_stream(handle)


def by_stream(handle: duet_vlm.Handle) -> dict[str, list[Tensor]]:
    """Per stream the rows of each span as the decoder got them, marked where they are gone."""
    found: dict[str, list[Tensor]] = {}
    for encoded, number in handle._prompt_state.sources:
        found.setdefault(encoded.modality, []).append(encoded.rows[number])
    return found


@pytest.mark.parametrize("mass", [True, False], ids=["mass", "plain"])
@pytest.mark.parametrize(("family", "kind", "method"), cells(DROPPING, True))
def test_survivors_are_those_of_a_tower_that_does_not_see_the_rest(
    family: str, kind: str, method: str, mass: bool, towers: list[Any]
) -> None:
    model, inputs = shared(family), FAMILIES[family].inputs(rows_of(family, kind))
    with duet_vlm.attach(model, method, keep=KEEP, options=TokenOptions(proportional_attention=mass)) as handle:
        forward(model, inputs)
        ours = by_stream(handle)
    twins = rows_of_twin(family, inputs, towers)
    assert ours.keys() == twins.keys() and towers
    assert all(mass == bool((run.size > 1).any()) for _, run in towers)
    for stream, spans in ours.items():
        for mine, twin in zip(spans, twins[stream], strict=True):
            left = ~mine[:, 0].isnan()
            assert 0 < left.sum() < len(left)
            torch.testing.assert_close(mine[left], twin[left], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(("family", "kind", "method"), cells(["contrast", "motion+duet_plus"], True))
def test_what_leaves_is_stood_for_by_the_means_of_its_stretches(
    family: str, kind: str, method: str, towers: list[Any]
) -> None:
    """Two rows stand for it: survivors are those of a tower that sees these, weighed, and not the rest; only survivors
    are read."""
    model, inputs = shared(family), FAMILIES[family].inputs(rows_of(family, kind))
    tower, *behind = method.split("+")
    settings = (
        {f"{tower}_keep": KEEP, "options": {"pooled_context_tokens": 2}, "budget": 0.2}
        if behind
        else {"keep": KEEP, "options": {"pooled_context_tokens": 2}}
    )
    with duet_vlm.attach(model, method, **settings) as handle:
        forward(model, inputs)
        ours, history = by_stream(handle), [span for row in handle.trace for span in row]
    for _, run in towers:
        assert (
            run.pooled_count
            == tuple(min(2, (high * wide - n) // 2) for (high, wide), n in zip(run.grids, run.counts, strict=True))
            != (0,)
        )
    fed = 8 if family == "video_llava" and kind == "clips" else 0  # CLS rows are tokens there
    assert sum(len(span.tower.kept) for span in history) == sum(n for _, run in towers for n in run.counts) + fed
    if behind:  # which rows of the tower enter is the choice of the method behind it
        return
    twins = rows_of_twin(family, inputs, towers)
    for stream, spans in ours.items():
        for mine, twin in zip(spans, twins[stream], strict=True):
            left = ~mine[:, 0].isnan()
            assert 0 < left.sum() < len(left)
            torch.testing.assert_close(mine[left], twin[left], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("family", SERVED)
def test_with_nothing_to_stand_for_the_tower_is_the_stock_one(family: str) -> None:
    model, inputs = shared(family), FAMILIES[family].inputs(rows_of(family, "images"))
    plain = forward(model, inputs).logits
    with duet_vlm.attach(model, "contrast+duet_plus", budget=1.0, options={"pooled_context_tokens": 3}):
        assert torch.equal(forward(model, inputs).logits, plain)
    assert torch.equal(forward(model, inputs).logits, plain)


@pytest.mark.parametrize(
    ("family", "method"), cells([*FRONT, *INSIDE, "contrast+duet_plus", "contrast+frames+duet", "evit+pyramiddrop"])
)
def test_keeping_every_patch_is_bit_equal(family: str, method: str) -> None:
    model, inputs = shared(family), FAMILIES[family].inputs(rows_of(family, "images"))
    plain = forward(model, inputs).logits
    with duet_vlm.attach(model, method, budget=1.0):
        assert torch.equal(forward(model, inputs).logits, plain)


@pytest.mark.parametrize(
    ("family", "cell"),
    cells([f"{method}+duet_plus" for method in ("contrast", "motion", *INSIDE)] + ["contrast+duet_plus/2"]),
)
def test_counts_and_costs_are_as_planned_and_detach_leaves_no_trace(family: str, cell: str, towers: list[Any]) -> None:
    model, inputs = shared(family), FAMILIES[family].inputs([fitting(family, TWO)])
    plain = forward(model, inputs).logits
    whole, settings = spelled(cell)
    method = whole.split("+")[0]
    with duet_vlm.attach(model, whole, budget=0.2, **{f"{method}_keep": 0.5}, **settings) as handle:
        forward(model, inputs)
        report = handle.report()
        assert report.observed.vision_flops < (0.95 if method in INSIDE or settings else 0.8) * report.full.vision_flops
        assert report.predicted.vision_flops == report.observed.vision_flops
        ((_, run),) = towers
        spans = [span for sample in handle._prompt_state.plans for span in sample]
        assert sum(run.counts) == sum(plan.tower for plan in spans)
        assert report.measured == report.nominal
    assert torch.equal(forward(model, inputs).logits, plain)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize(("family", "kind", "cell"), cells(["random_patches", "random_patches/2", "key_norm"], True))
def test_flops_of_the_reduced_tower_are_those_that_torch_counts(family: str, kind: str, cell: str) -> None:
    """Without mass, whose products are counted with the choice."""
    method, settings = spelled(cell)
    shown = Picture(1, 3 if family.startswith("mistral3") else 4, 4, frames=2 if kind == "clips" else 0)
    model, inputs = build(family, "eager"), FAMILIES[family].inputs([(1, shown, 5)])
    encoder = "get_video_features" if kind == "clips" else "get_image_features"
    plain, counted = getattr(model.model, encoder), []

    def encode(*args: Any, **kwargs: Any) -> Any:
        with FlopCounterMode(display=False) as counter:
            output = plain(*args, **kwargs)
        counted.append(counter.get_total_flops())
        return output

    setattr(model.model, encoder, functools.wraps(plain)(encode))
    costs = []
    for keep in (1.0, 0.5):
        with (
            duet_vlm.attach(
                model, method, keep=keep, **merged(settings, {"options": {"proportional_attention": False}})
            ) as handle,
            torch.no_grad(),
        ):
            forward(model, inputs)
            costs.append(handle.report().observed.vision_flops)
    assert counted[0] == costs[0] and costs[1] < 0.95 * costs[0]
    # windows keep unlike many
    assert counted[1] == costs[1] if family != "qwen2_5_vl" else abs(counted[1] - costs[1]) < 0.01 * costs[1]


TOGETHER = [
    "contrast",
    "contrast+duet_plus",
    "contrast+pyramiddrop",
    "contrast+frames+duet",
    "checkerboard",
    "motion",
    "rlt+duet_plus",
]
TOGETHER += ["contrast/2", "contrast+duet_plus/3", "rlt+duet/2"]
TOGETHER += ["pixelprune+duet", "key_norm", "key_norm+duet_plus", "evit+duet", "tome_tower", "tome_tower+duet_plus"]


@pytest.mark.parametrize(("family", "kind", "method"), cells(TOGETHER, True))
def test_a_batch_equals_each_row_alone(family: str, kind: str, method: str) -> None:
    model, rows = shared(family), rows_of(family, kind)
    method, settings = spelled(method)
    alone = {"contrast", "motion", "key_norm", "tome_tower"}
    budget = 0.5 if method in alone else {"checkerboard": 0.4, "contrast+pyramiddrop": 0.3}.get(method, 0.25)
    plain = forward(model, FAMILIES[family].inputs([TEXT])).logits[0, -1]
    with duet_vlm.attach(model, method, budget=budget, **settings):
        together = generate(model, FAMILIES[family].inputs(rows))
        for number, row in enumerate(rows):
            alone = generate(model, FAMILIES[family].inputs([row]))
            for mine, single in zip(together.logits, alone.logits, strict=True):
                torch.testing.assert_close(mine[number], single[0], rtol=1e-3, atol=2e-4)
        assert torch.equal(forward(model, FAMILIES[family].inputs([TEXT])).logits[0, -1], plain)


@pytest.mark.parametrize(("family", "method"), cells(["contrast+duet_plus", "key_norm+duet", "tome_tower"]))
def test_what_the_user_encodes_himself_is_what_the_stock_model_gives(family: str, method: str) -> None:
    model, inputs = shared(family), FAMILIES[family].inputs([fitting(family, TWO)])
    with torch.no_grad():
        plain = FAMILIES[family].features(model, inputs)
        with duet_vlm.attach(model, method, budget=0.5):
            mine = FAMILIES[family].features(model, inputs)
    assert all(torch.equal(a, b) for a, b in zip(plain["image"], mine["image"], strict=True))


@pytest.mark.parametrize("family", SERVED)
@pytest.mark.parametrize(
    ("cell", "checkpointing"),
    [
        ("contrast", False),
        ("contrast", True),
        ("contrast/2", False),
        ("contrast/2", True),
        ("key_norm", False),
        ("tome_tower", False),
    ],
)
def test_gradients_pass_through_survivors(family: str, cell: str, checkpointing: bool, towers: list[Any]) -> None:
    """With and without recomputation they are the same."""
    method, context = spelled(cell)
    if not suits(family, method):
        return
    model, inputs = build(family), FAMILIES[family].inputs([fitting(family, TWO)])
    model.train()
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] > 90, -100)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(**inputs | FAMILIES[family].supervised(labels), labels=labels).loss.backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return [found[name] for name in sorted(found) if "patch_" in name or "blocks" in name or "encoder" in name]

    options = {"proportional_attention": not checkpointing or family not in NO_MASK} | context.get("options", {})
    with duet_vlm.attach(model, f"{method}+duet_plus", budget=0.3, options=options) as handle:
        plain = gradients()
        assert plain and any(float(g.abs().max()) > 0 for g in plain)
        assert all(bool(g.isfinite().all()) for g in plain)
        if checkpointing and context and family in NO_MASK:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            with pytest.raises(
                ValueError, match="pooled_context_tokens=2: .* nor does this tower with gradient checkpointing"
            ):
                gradients()
        elif checkpointing:
            handle.set(options={"proportional_attention": True})  # left out by itself where nobody could repeat it
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            for a, b in zip(plain, gradients(), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


NO_MASK = [name for name in SERVED if name.startswith(("internvl", "qwen", "glm"))]


def test_what_is_resized_behind_the_tower_is_refused_by_name() -> None:
    model, family = build("llava_onevision"), FAMILIES["llava_onevision"]
    with duet_vlm.attach(model, "contrast", budget=0.5):
        with pytest.raises(ValueError, match="an image of 44 x 55 pixels is resized behind the vision tower"):
            forward(model, family.inputs([(1, Picture(1, 4, 5), 5)]))
        forward(model, family.inputs([(1, Picture(1, 4, 4), 5)]))
    adapter: Any = adapter_for(model)
    adapter.side = 27
    with pytest.raises(ValueError, match="frames of 27 x 27 patches are resized"):
        adapter.cell_of(EncoderCall("video"), adapter.blocks_to_reduce()[0])


@pytest.mark.parametrize(("family", "method"), cells(["contrast", *INSIDE]))
def test_the_trace_tells_what_went_through_the_tower(family: str, method: str, towers: list[Any]) -> None:
    model = shared(family)
    with duet_vlm.attach(model, f"{method}+duet", budget=0.2, **{f"{method}_keep": 0.5}) as handle:
        forward(model, FAMILIES[family].inputs([fitting(family, TWO), TEXT]))
        history = [span for row in handle.trace for span in row]
    assert sum(len(span.tower.kept) for span in history) == sum(n for _, run in towers for n in run.counts)
    for span in history:
        assert span.tower.layer == -1
        assert sorted((*span.tower.kept, *span.tower.dropped)) == list(range(span.span.tokens))
        merged = {member for members in span.merged.values() for member in members}
        entry = span.stages[0]
        assert {*entry.kept, *entry.dropped, *merged} == set(span.tower.kept)
        # the last row may have to predict; there it is a newline
        assert span.span.tokens - 1 in span.tower.kept or family in PACKING


def test_floors_choose_as_they_say() -> None:
    grid = (4, 6)
    view = TowerView(torch.ones(2, 24, dtype=torch.bool), torch.tensor([12, 12]), (12, 12), (grid, grid))
    board = duet_vlm.get_method("checkerboard")(keep=0.5).keep_patches(view)
    assert board.sum(1).tolist() == [12, 12]
    lines = board[0].view(grid)
    assert not (lines[:, 1:] & lines[:, :-1]).any() and not (lines[1:] & lines[:-1]).any()
    chance = [duet_vlm.get_method("random_patches")(keep=0.5, seed=seed).keep_patches(view) for seed in (0, 0, 1)]
    assert (
        torch.equal(chance[0], chance[1])
        and not torch.equal(chance[0], chance[2])
        and chance[0].sum(1).tolist() == [12, 12]
    )


def test_contrast_takes_what_differs_and_hands_on_the_mass() -> None:
    patches = torch.zeros(1, 9, 1, 4)
    patches[0, 4, 0, 0], patches[0, 7, 0, 1] = 5.0, 3.0  # two things on an even ground
    chosen = select_patches(
        duet_vlm.get_method("contrast")(keep=3), patches, torch.ones(1, 9, 1, dtype=torch.bool), [3], [(3, 3)], True
    )
    # the ground stands for itself
    assert chosen.index.tolist() == [[4, 7, 8]] and chosen.size.tolist() == [[1.0, 1.0, 7.0]]
    plain = select_patches(
        duet_vlm.get_method("contrast")(keep=3), patches, torch.ones(1, 9, 1, dtype=torch.bool), [3], [(3, 3)], False
    )
    assert plain.size.tolist() == [[1.0, 1.0, 1.0]]


def test_context_stands_for_what_leaves_in_stretches() -> None:
    patches = torch.arange(9.0).view(1, 9, 1, 1).repeat(1, 1, 1, 2)
    patches[0, 4], patches[0, 7] = 50.0, -50.0
    chosen = select_patches(
        duet_vlm.get_method("contrast")(keep=3, options=TokenOptions(pooled_context_tokens=2)),
        patches,
        torch.ones(1, 9, 1, dtype=torch.bool),
        [3],
        [(3, 3)],
        True,
    )
    assert chosen.counts == (5,) and chosen.pooled == (2,)  # 0 1 2 | 3 5 6 leave, 4 7 8 stay
    assert chosen.index.tolist() == [[1, 4, 5, 7, 8]] and chosen.unread.tolist() == [[True, False, True, False, False]]
    assert chosen.size.tolist() == [[3.0, 1.0, 3.0, 1.0, 1.0]]
    assert chosen.entering(patches[:, :, 0])[0, :, 0].tolist() == pytest.approx([1.0, 50.0, 14 / 3, -50.0, 8.0])


def test_rows_that_stand_for_what_leaves_need_a_bias() -> None:
    contrast = duet_vlm.get_method("contrast")
    assert use_size_bias(
        contrast(keep=0.5, options=TokenOptions(pooled_context_tokens=2, proportional_attention=False)), True
    ) and not use_size_bias(contrast(keep=0.5, options=TokenOptions(proportional_attention=False)), True)
    assert use_size_bias(contrast(keep=0.5), True) and not use_size_bias(contrast(keep=0.5), False)
    with pytest.raises(
        ValueError,
        match="pooled_context_tokens=2: rows that represent dropped units need a bias .* attn_implementation='sdpa'",
    ):
        use_size_bias(contrast(keep=0.5, options=TokenOptions(pooled_context_tokens=2)), False)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 12])
def test_stretches_are_groups_of_one_size(count: int) -> None:
    gone = torch.rand(20, 12, generator=torch.Generator().manual_seed(count)) < 0.6
    into = in_stretches(gone, torch.full((20,), count))
    for mine, row in zip(into.tolist(), gone.tolist(), strict=True):
        members = [place for place, out in enumerate(row) if out]
        wanted = list(range(12))
        for number in range(count):
            group = [place for rank, place in enumerate(members) if rank * count // len(members) == number]
            for place in group:
                wanted[place] = group[(len(group) - 1) // 2]
        assert mine == wanted


def test_ground_is_taken_evenly_from_the_ranks_of_the_rest() -> None:
    view = TowerView(torch.ones(1, 20, dtype=torch.bool), torch.tensor([8]), (8,), ((4, 5),), torch.arange(20.0)[None])
    assert duet_vlm.get_method("contrast")(keep=8).keep_patches(view)[0].nonzero()[:, 0].tolist() == list(range(12, 20))
    # ranks 3 and 10 of 14
    assert duet_vlm.get_method("contrast")(keep=8, ground=0.25).keep_patches(view)[0].nonzero()[:, 0].tolist() == [
        3,
        10,
        *range(14, 20),
    ]


def shows(
    pixels: Tensor, grid: tuple[int, int], keeps: tuple[int, ...] = (), before: tuple[int, ...] = (-1,)
) -> TowerView:
    """Pictures of units with one number each: [P, U] or, of several frames, [P, U, T]."""
    frames = pixels if pixels.ndim == 3 else pixels[..., None]
    keep = torch.tensor(keeps) if keeps else torch.zeros(len(pixels), dtype=torch.long)
    valid = torch.ones(pixels.shape[:2], dtype=torch.bool)
    return TowerView(valid, keep, keeps, (grid,) * len(pixels), torch.rand(valid.shape), frames[..., None], before)


def pruned_slowly(pixels: list[list[float]], threshold: float) -> list[list[bool]]:
    """PixelPrune as its paper tells it, number by number."""
    value = [[0.0] * len(pixels[0]) for _ in pixels]
    keep = [[True] * len(pixels[0]) for _ in pixels]

    def same(a: float, b: float) -> bool:
        return abs(a - b) <= threshold

    for r, line in enumerate(pixels):
        for c, pixel in enumerate(line):
            if r == c == 0:
                value[0][0] = pixel
                continue
            if r == 0 or c == 0:
                guess = value[r][c - 1] if r == 0 else value[r - 1][c]
            else:
                left, above, corner = value[r][c - 1], value[r - 1][c], value[r - 1][c - 1]
                guess = above if same(corner, left) and not same(corner, above) else left
            keep[r][c] = not same(pixel, guess)
            value[r][c] = pixel if keep[r][c] else guess
    return keep


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("grid", [(5, 6), (1, 7), (6, 1)])
def test_pixelprune_is_its_slow_twin(grid: tuple[int, int], threshold: float) -> None:
    pixels = torch.randint(0, 4, (30, grid[0] * grid[1]), generator=torch.Generator().manual_seed(1)) / 2
    stays = duet_vlm.get_method("pixelprune")(threshold=threshold).keep_patches(shows(pixels, grid))
    for mine, picture in zip(stays, pixels, strict=True):
        assert mine.view(grid).tolist() == pruned_slowly(picture.view(grid).tolist(), threshold)
    counted = duet_vlm.get_method("pixelprune")(keep=3).keep_patches(shows(pixels, grid, (3,) * 30))
    assert counted.sum(1).tolist() == [3] * 30 and counted[:, 0].all()


def test_rlt_keeps_what_changed() -> None:
    # frames of three units
    drift = torch.tensor([[0.0, 0.0, 5.0], [0.08, 0.0, 9.0], [0.16, 0.0, 9.0], [0.24, 1.0, 9.0]])
    view, rlt = shows(drift, (1, 3), before=(-1, 0, 1, 2)), duet_vlm.get_method("rlt")
    first = [True, True, True]
    # a slow drift is seen against what stayed, not against the frame before; a frame in which nothing changed keeps one
    # unit
    assert rlt(threshold=0.1).keep_patches(view).tolist() == [
        first,
        [False, False, True],
        [True, False, False],
        [False, True, False],
    ]
    assert rlt(threshold=0.1, against="before").keep_patches(view).tolist() == [
        first,
        [False, False, True],
        [True, False, False],
        [False, True, False],
    ]
    assert rlt(threshold=0.09, against="before").scores(view)[2, 0] < 0 < rlt(threshold=0.09).scores(view)[2, 0]
    # the last frame of a step against the first of the one before
    tubelets = torch.tensor([[[0.0, 7.0]], [[3.0, 0.05]]])
    assert rlt().scores(shows(tubelets, (1, 1), before=(-1, 0)))[1, 0] < 0
    counted = rlt(keep=1).keep_patches(shows(drift, (1, 3), (1, 1, 1, 1), (-1, 0, 1, 2)))
    assert counted.tolist() == [[False, False, True], [False, False, True], [True, False, False], [False, True, False]]
    assert rlt().keep_patches(shows(torch.rand(2, 6), (2, 3), before=(-1, -1))).all()  # images stay whole


def test_motion_takes_what_a_clip_usually_does_not_show() -> None:
    clip = torch.zeros(5, 4)
    clip[:, 3] = 9.0  # stands still, however bright
    for frame, place in enumerate((0, 1, 2, 0, 1)):
        clip[frame, place] = 1.0
    stays = duet_vlm.get_method("motion")(keep=1).keep_patches(shows(clip, (2, 2), (1,) * 5, (-1, 0, 1, 2, 3)))
    assert stays.long().argmax(1).tolist() == [0, 1, 2, 0, 1]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("method", ["pixelprune", "pixelprune+duet_plus", "rlt+frames+duet"])
def test_thresholds_account_for_what_they_leave(family: str, method: str, towers: list[Any]) -> None:
    """Pictures of one colour but for a spot: little is left, and no more than that enters."""
    model, inputs = build(family), FAMILIES[family].inputs([(1, Picture(1, 4, 4), 5), TEXT])
    pixels = inputs["pixel_values"]
    pixels[:] = 0.25
    pixels[(0,) * (pixels.ndim - 1)] = 1.0
    budget = {} if method == "pixelprune" else {"budget": 0.3}
    with duet_vlm.attach(model, method, **budget) as handle:
        forward(model, inputs)
        report = handle.report()
        if method.startswith("rlt"):  # images stay whole
            assert not towers and report.observed.vision_flops == report.predicted.vision_flops
            return
        ((_, run),) = towers
        (span,) = handle._prompt_state.plans[0]
        assert run.counts == (span.tower,) and span.entry <= span.tower < span.tokens / 2
        assert report.observed.vision_flops == report.predicted.vision_flops < report.full.vision_flops
        assert report.measured == report.nominal


def test_no_more_enters_than_the_tower_leaves() -> None:
    method = duet_vlm.compose(duet_vlm.get_method("contrast")(keep=0.3), duet_vlm.get_method("duet")())
    with pytest.warns(UserWarning, match=r"\d+ of 576 tokens would enter the decoder, but the tower leaves 172"):
        plan = method.plan(576, 32, 0.25)
    assert plan.entry == plan.tower == 172 and plan.mean <= 0.25 * 576 < plan.mean + 3
    free = duet_vlm.make_method("contrast+duet_plus").plan(576, 32, 0.11)
    assert free.tower == 323 and free.entry == duet_vlm.get_method("duet_plus")().plan(576, 32, 0.11).entry
    wide = duet_vlm.make_method("contrast+duet").plan(576, 32, 0.25)
    assert wide.tower == min(576, -(-3 * wide.entry // 2))
    drops = duet_vlm.make_method("contrast+pyramiddrop").plan(576, 32, 0.2)
    assert drops.entry == drops.tower == 323 and drops.mean <= 0.2 * 576


@pytest.mark.parametrize(
    ("method", "settings", "words"),
    [
        ("contrast", {"keep": 0}, "keep=0: at least one token of a picture goes through the tower"),
        ("contrast", {"keep": 1.5}, r"keep=1.5: a float is a fraction in \[0, 1\]"),
        ("contrast", {}, "contrast needs a budget"),
        ("contrast", {"keep": 0.5, "budget": 0.5}, "give either budget= or"),
        ("contrast", {"budget": 0.001}, "at least one token enters"),
        ("duet+contrast", {"budget": 0.2}, "in this order: a method in the tower"),
        ("contrast+checkerboard+duet", {"budget": 0.2}, "in this order: a method in the tower"),
        ("contrast", {"budget": 0.5, "ground": 1.5}, "ground=1.5: a share of the patches that stay"),
        ("key_norm", {"budget": 0.5, "after": 0}, r"after=\(0,\): after the attention of how many blocks"),
        (
            "key_norm",
            {"budget": 0.5, "after": 4},
            "after the attention of 4 blocks, but the rows or the attention of block 2",
        ),
        ("key_norm+duet_plus", {"budget": 0.2, "after": 3}, "has no setting 'after'"),
        ("key_norm+duet_plus", {"budget": 0.2, "key_norm_after": 3}, "the rows or the attention of block 2"),
        ("evit", {"budget": 0.5, "after": (2, 1)}, r"after=\(2, 1\): after the attention"),
        ("tome_tower", {"budget": 0.5, "shares": (0, 0)}, r"shares=\(0, 0\): numbers of 0 or more, not all 0"),
        ("pixelprune", {"threshold": -1.0}, "threshold=-1.0: give a finite difference"),
        ("rlt+duet", {"budget": 0.2, "rlt_threshold": float("nan")}, "threshold=nan: give a finite difference"),
        (
            "contrast",
            {"budget": 0.2, "options": {"pooled_context_tokens": -1}},
            "pooled_context_tokens=-1: a number of rows for what leaves a picture, at least 0",
        ),
        (
            "motion+duet",
            {"budget": 0.2, "options": {"pooled_context_tokens": -2}},
            "pooled_context_tokens=-2: a number of rows",
        ),
        (
            "evit",
            {"budget": 0.2, "options": {"pooled_context_tokens": 2}},
            "pooled_context_tokens=2: with evit units are dropped after blocks",
        ),
        ("rlt", {"budget": 0.2, "against": "next"}, "against='next': choose one of 'kept', 'before'"),
    ],
)
def test_bad_settings_are_refused_and_leave_no_trace(method: str, settings: dict[str, Any], words: str) -> None:
    model = shared("llava")
    with pytest.raises(ValueError, match=words):
        duet_vlm.attach(model, method, **settings)
    assert duet_vlm.handle_of(model) is None and not any("forward" in vars(module) for module in model.modules())


def test_windowed_signals_of_a_reduced_tower_are_refused() -> None:
    model = shared("qwen2_5_vl")
    windowed = next(
        i for i in range(len(model.model.visual.blocks)) if i not in model.model.visual.fullatt_block_indexes
    )
    with pytest.raises(ValueError, match="attends within windows"):
        duet_vlm.attach(model, "contrast+duet_plus", budget=0.2, options=TokenOptions(signal_layer=windowed))


class Wrong(TowerReducer):
    """Returns what no method may."""

    name, paper, summary = "wrong", "-", "-"
    kind: str = "few"

    def keep_patches(self, view: TowerView) -> Tensor:
        mask = torch.zeros_like(view.valid)
        return {"few": mask, "float": mask.float(), "shape": mask[:, 1:]}[type(self).kind]


class Joins(TowerReducer):
    """Returns who joins whom."""

    name, paper, summary = "joins", "-", "-"
    made: Any = None
    place: int = 1

    def boundaries(self, depth: int) -> tuple[int, ...]:
        return (type(self).place,)

    def keep_patches(self, view: TowerView) -> MergePairs:
        number = torch.arange(view.valid.shape[1]).expand(view.valid.shape)
        return (
            MergePairs(number.clamp(max=int(view.num_keep[0]) - 1))
            if type(self).made is None
            else MergePairs(type(self).made(number))
        )


@pytest.mark.parametrize(
    ("made", "place", "words"),
    [
        (lambda number: number, 1, "another number of units than planned"),
        (lambda number: (number + 1).clamp(max=int(number.max())), 1, "units that join what does not stay"),
        (lambda number: number - 9, 1, "units that join what does not stay|another number of units"),
        (lambda number: number.float(), 1, r"joins\.keep_patches returned target = a tensor"),
        (None, 0, "units join others behind a block's attention only"),
    ],
)
def test_who_joins_whom_is_checked(made: Any, place: int, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Joins, "made", made)
    monkeypatch.setattr(Joins, "place", place)
    model, inputs = shared("llava"), FAMILIES["llava"].inputs([TWO])
    plain = forward(model, inputs).logits
    with duet_vlm.attach(model, Joins(keep=0.5)), pytest.raises(ValueError, match=words):
        forward(model, inputs)
    monkeypatch.setattr(Joins, "made", None)
    monkeypatch.setattr(Joins, "place", 1)
    with duet_vlm.attach(model, Joins(keep=0.5)):
        forward(model, inputs)
    assert torch.equal(forward(model, inputs).logits, plain)


def test_blocks_that_run_again_cannot_be_cut() -> None:
    model = build("llava").train()
    model.gradient_checkpointing_enable()
    with (
        duet_vlm.attach(model, "key_norm", budget=0.5),
        pytest.raises(ValueError, match="gradient checkpointing.*contrast"),
    ):
        model(**FAMILIES["llava"].inputs([TWO]))


@pytest.mark.parametrize(
    ("kind", "words"),
    [("few", "another number of units than planned"), ("float", "give a tensor"), ("shape", "give a tensor")],
)
def test_what_a_users_method_returns_is_checked(kind: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Wrong, "kind", kind)
    model, inputs = shared("llava"), FAMILIES["llava"].inputs([TWO])
    plain = forward(model, inputs).logits
    with (
        duet_vlm.attach(model, Wrong(keep=0.5)),
        pytest.raises(ValueError, match=rf"wrong\.keep_patches returned .*{words}"),
    ):
        forward(model, inputs)
    assert torch.equal(forward(model, inputs).logits, plain)


WHOLE = [
    ("contrast", {"budget": 8}),
    ("contrast", {"budget": 8, "options": {"pooled_context_tokens": 2}}),
    ("checkerboard+duet_plus", {"budget": 8}),
]
WHOLE += [("key_norm", {"budget": 8}), ("evit+duet", {"budget": 6}), ("tome_tower", {"budget": 8}), ("pixelprune", {})]


@pytest.mark.parametrize(("method", "settings"), WHOLE, ids=str)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("sizes", [[(2, 3), (4, 5)], [(4, 6), (2, 2), (3, 5), (2, 3)]], ids=["first", "between"])
def test_a_picture_that_stays_whole_is_seen_as_by_itself(
    method: str, settings: dict[str, Any], attention: str, sizes: list[tuple[int, int]], towers: list[Any]
) -> None:
    """Mistral 3's pictures with a line of patches that fill no token: beside one that loses patches, too, it belongs to
    what the others see."""
    family, model = FAMILIES["mistral3"], shared("mistral3", attention)
    rows = [(1, 5, Picture(n, *size), 7 + n, 8, 9) for n, size in enumerate(sizes)]
    inputs = family.inputs(rows)
    # nothing but lines of one grey leave: those of the pictures from the third line of tokens on
    if method == "pixelprune":
        inputs["pixel_values"] = flat_from(inputs["pixel_values"], 8 * 2)
    with duet_vlm.attach(model, method, **settings) as handle:
        together, slots = forward(model, inputs).logits, handle.slots
        spares = list(towers[-1][1].spares)
        assert len(towers[-1][1].rows) == sum(towers[-1][1].row_counts())
        for number, row in enumerate(rows):
            single = family.inputs([row])
            high, wide = single["pixel_values"].shape[2:]
            single["pixel_values"] = inputs["pixel_values"][number : number + 1, :, :high, :wide]
            alone = forward(model, single).logits[0]
            torch.testing.assert_close(together[number][slots[number] >= 0], alone, rtol=1e-3, atol=2e-4)
    assert spares == [2 * wide if high == 2 else 0 for high, wide in sizes]


def flat_from(pixels: Tensor, line: int) -> Tensor:
    """Pictures whose lines of pixels from ``line`` on are grey."""
    return torch.cat([pixels[:, :, :line], torch.zeros_like(pixels[:, :, line:])], 2)


@pytest.mark.parametrize("method", ["rlt+duet", "pixelprune+duet", "pixelprune"])
@pytest.mark.parametrize(
    "content", [(1, Picture(1, 1, 1), 5, 6), (1, Picture(1, 1, 1, frames=3), 5, 6)], ids=["image", "clip"]
)
def test_pictures_of_one_unit_have_nothing_to_choose(method: str, content: Any) -> None:
    """Their only token may have to predict, so it is not up for choice."""
    settings = {"budget": 0.5} if "+" in method else {}
    with duet_vlm.attach(shared("qwen2_vl"), method, **settings) as handle:
        forward(shared("qwen2_vl"), FAMILIES["qwen2_vl"].inputs([content]))
        assert handle.report().measured[0] >= 1


@pytest.mark.parametrize("method", [*FRONT, *INSIDE, "pixelprune+duet_plus"])
@pytest.mark.parametrize("parts", ["joint", "per_crop"])
def test_crops_of_which_packing_leaves_nothing(method: str, parts: str) -> None:
    """A very wide image shows nothing of its own crops in LLaVA-NeXT: its counts are those of the image behind it, by
    itself and together."""
    family, model = FAMILIES["llava_next"], shared("llava_next")
    rows: Any = [(1, Picture(1, 1, 12), 5, 6), (1, Picture(2, 6, 7), 7, 8)]
    settings = {"budget": 0.5} if "+" in method else {} if method in ("rlt", "pixelprune") else {"keep": 0.5}
    with duet_vlm.attach(model, method, **merged(settings, {"options": {"crops": parts}})) as handle:
        alone = []
        for row in rows:
            forward(model, family.inputs([row]))
            alone.append([span.stages[0].kept for span in handle.trace[0]])
        forward(model, family.inputs(rows))
        assert [[span.stages[0].kept for span in row] for row in handle.trace] == alone
        assert handle.report().measured == handle.report().nominal


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v", "llava", "internvl"])
@pytest.mark.parametrize("tower", ["contrast", "key_norm"])
def test_a_method_may_ask_the_projector_behind_a_reduced_tower(
    family: str, tower: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it makes of unchanged rows is what the method is shown; its cost is counted on the rows that it works on."""
    kind, seen = duet_vlm.get_method("zoo_prune"), []
    plain = kind.sensitivity

    def spy(self: Any, view: Any) -> Tensor:
        if not view.valid.is_meta:  # costs are counted on shapes
            seen.append((view.project(lambda rows: rows), view.features, view.valid))
        return plain(self, view)

    model, inputs = build(family), FAMILIES[family].inputs([(1, Picture(1, 4, 4), 5, Picture(2, 3, 6), 6, 7)])
    with (
        duet_vlm.attach(
            model, f"{tower}+zoo_prune", budget=0.3, zoo_prune_directions=3, **{f"{tower}_keep": 0.5}
        ) as handle,
        torch.no_grad(),
    ):
        counted = count_flops(lambda: model(**inputs, logits_to_keep=1))
        assert handle.report().observed.flops == pytest.approx(counted, rel=0.01)
        monkeypatch.setattr(kind, "sensitivity", spy)
        forward(model, inputs)
    ((projected, features, valid),) = seen
    assert 0 < valid.sum() < valid.numel()
    torch.testing.assert_close(projected[valid], features[valid], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "mistral3", "internvl"])
@pytest.mark.parametrize("method", ["contrast", "contrast+duet", "key_norm+visionzip", "tome_tower"])
def test_a_tower_in_float64_keeps_and_computes_what_one_in_float32_does(family: str, method: str) -> None:
    """Models in double precision are what gradients are checked with."""
    rows = [TWO, (1, Picture(1, 4, 4), 5, Picture(2, 3, 6), 6, 7)]
    single, inputs = build(family), FAMILIES[family].inputs(rows, "right")
    double, wide = (
        build(family).double(),
        {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()},
    )
    with duet_vlm.attach(single, method, budget=0.5) as handle:
        expected, slots = forward(single, inputs).logits, handle.slots
    with duet_vlm.attach(double, method, budget=0.5) as handle:
        found = forward(double, wide).logits
        assert found.dtype == torch.float64 and torch.equal(handle.slots, slots)
    torch.testing.assert_close(found[slots >= 0].float(), expected[slots >= 0], rtol=1e-3, atol=1e-3)
