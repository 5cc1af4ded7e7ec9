"""Compositions: who does what, one budget over the whole, the pool of candidates, and the same reducer by every way
that leads to it."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import reference_ops
import torch
from families import CLIP, CLIPS, FAMILIES, build, forward, pictures_of, shared
from hypothesis import given, settings
from hypothesis import strategies as st
from method_matrix import REDUCING
from method_views import Clip, frames_view, kept_of_clip
from PIL import Image
from typer.testing import CliRunner

import duet_vlm
from duet_vlm import BudgetError, DecoderReducer, EncoderReducer, EncoderView, SpanPlan, compose
from duet_vlm.cli.main import app
from duet_vlm.evaluation import console
from duet_vlm.evaluation.experiment import cells_of
from duet_vlm.methods.baselines.none import NoReduction
from duet_vlm.methods.baselines.tokens import UniformTokens
from duet_vlm.methods.decoder.fastv import FastV
from duet_vlm.methods.decoder.pyramiddrop import PyramidDrop
from duet_vlm.methods.encoder.divprune import DivPrune
from duet_vlm.methods.encoder.prumerge import PruMerge
from duet_vlm.methods.encoder.scope import Scope
from duet_vlm.methods.encoder.tome import ToMe
from duet_vlm.methods.encoder.visionzip import VisionZip
from duet_vlm.methods.two_stage.duet import Duet
from duet_vlm.methods.two_stage.duet_plus import DuetPlus
from duet_vlm.methods.video.frames import Frames
from duet_vlm.ops.schedules import duet_schedule
from duet_vlm.planning.budget import target_mean
from duet_vlm.reducers import registry
from duet_vlm.reducers.inputs import Input
from duet_vlm.reducers.options import TokenOptions
from duet_vlm.utils.field_types import merged

MADE: dict[str, duet_vlm.Reducer] = {
    "frames, duet": compose(Frames(), Duet()),
    "frames of a size, duet_plus with drops": compose(Frames(keep=0.3), DuetPlus(schedule=((1, 0.5), (2, 0.1)))),
    "frames, visionzip": compose(Frames(keep=0.5), VisionZip()),
    "frames, pyramiddrop": compose(Frames(), PyramidDrop()),
    "all three": compose(Frames(keep=0.5), VisionZip(), PyramidDrop()),
    "all three, drops set": compose(Frames(), Scope(), PyramidDrop(schedule=((1, 0.75), (2, 0.3)))),
    "duet, pyramiddrop": compose(Duet(), PyramidDrop()),
    "divprune, duet": compose(DivPrune(), Duet()),
    "visionzip, duet_plus": compose(VisionZip(), DuetPlus()),
    "visionzip, fastv": compose(VisionZip(), FastV(layers=1, keep=0.25)),
    "frames, uniform": compose(Frames(), UniformTokens(entry=0.5, schedule=((1, 0.2),))),
}
many = settings(max_examples=60, deadline=None, derandomize=True)
BUDGETS = st.one_of(st.integers(1, 700), st.floats(0.001, 1.0, allow_nan=False))
EACH = pytest.mark.parametrize("made", MADE)


# ---- how many


@EACH
@many
@given(tokens=st.integers(1, 700), depth=st.integers(3, 48), budget=BUDGETS)
def test_never_above_the_budget_and_within_one_token(made: str, tokens: int, depth: int, budget: Any) -> None:
    target = target_mean(budget, tokens)
    try:
        plan = MADE[made].plan(tokens, depth, budget)
    except BudgetError as error:
        assert error.floor is not None and error.floor > target - 1e-9  # refused only below the floor
        return
    assert plan.mean <= target + 1e-6
    assert plan.mean > target - 1 - 1e-6 or tokens <= target
    assert plan.tokens == tokens and plan.entry <= MADE[made].pool(plan) <= tokens and len(plan.counts) == depth  # type: ignore[attr-defined]
    assert plan.dominant >= min(1, plan.entry) and plan.contextual >= 0
    assert all(0 <= b <= a for a, b in zip((plan.entry, *plan.counts), plan.counts, strict=False))
    if target >= tokens:
        assert plan.counts == (tokens,) * depth and plan.entry == tokens and not plan.reduces_entry


# half of one token is none: it has no floor
@pytest.mark.parametrize("made", [name for name in MADE if name != "frames, uniform"])
@many
@given(tokens=st.integers(1, 700), depth=st.integers(3, 48))
def test_a_floor_is_the_smallest_budget_that_works(made: str, tokens: int, depth: int) -> None:
    method = MADE[made]
    with pytest.raises(BudgetError) as caught:
        method.plan(tokens, depth, 1e-7)
    floor = caught.value.floor
    assert floor is not None and 0 < floor <= tokens
    assert method.plan(tokens, depth, min(1.0, floor / tokens + 1e-9)).mean <= floor + 1e-5
    with pytest.raises(BudgetError):
        method.plan(tokens, depth, 0.999 * floor / tokens)


def test_a_larger_entry_would_be_above_the_budget() -> None:
    """The paper's halving at 8, 16 and 24 of 32 layers, counted by hand: n + n // 2 + n // 4 + n // 8 over four."""
    for tokens, budget in ((576, 64), (2304, 200), (576, 5)):
        fitting = [n for n in range(1, tokens + 1) if n + n // 2 + n // 4 + n // 8 <= 4 * budget]
        plan = compose(Frames(), VisionZip(), PyramidDrop()).plan(tokens, 32, budget)
        n = plan.entry
        assert n == max(fitting) and plan.counts == (n,) * 8 + (n // 2,) * 8 + (n // 4,) * 8 + (n // 8,) * 8


def test_one_method_in_both_places_solves_as_alone() -> None:
    for budget in (64, 0.11, 0.3, 0.95):
        alone = Duet().plan(576, 32, budget)
        assert (
            compose(Frames(), Duet()).plan(576, 32, budget)
            == compose(Frames(keep=0.4), Duet()).plan(576, 32, budget)
            == alone
        )
        assert compose(Frames(), VisionZip()).plan(576, 32, budget) == VisionZip().plan(576, 32, budget)


@pytest.mark.parametrize(("entry", "dominant", "contextual"), [(102, 85, 17), (307, 300, 7)])
def test_rows_are_divided_as_the_method_divides_them_alone(entry: int, dominant: int, contextual: int) -> None:
    """Duet's published settings by what enters, in front of another method's drops."""
    # Duet's own schedule, so the same budgets lead to the same entries
    method = compose(Duet(), PyramidDrop(schedule=((16, 0.5), (24, 0.0))))
    plan = method.plan(576, 32, {102: 64, 307: 192}[entry])
    assert (plan.entry, plan.dominant, plan.contextual) == (entry, dominant, contextual)
    plan = compose(VisionZip(), FastV(layers=16, keep=0.0)).plan(576, 32, 32)
    assert (plan.dominant, plan.contextual) == (54, 10)  # as published for 64 tokens


def test_a_method_of_somebody_else_names_its_usual_drops_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_methods", dict(duet_vlm.list_methods()))

    @duet_vlm.register("half_way")
    @dataclass(frozen=True)
    class HalfWay(DecoderReducer):
        """Leaves its one drop to a budget, or to the middle of the decoder."""

        paper = summary = "-"
        at: int | None = None

        def with_paper_schedule(self, depth: int, share: float | None = None) -> HalfWay:
            return self if self.at is not None else dataclasses.replace(self, at=depth // 2)

        def plan(self, tokens: int, depth: int, budget: Any) -> SpanPlan:
            assert self.at is not None
            return SpanPlan(tokens, tokens, 0, tuple(tokens if layer < self.at else 0 for layer in range(depth)))

        def prune_tokens(self, view: duet_vlm.DecoderView) -> torch.Tensor:
            return view.valid

    assert compose(Scope(), HalfWay()).plan(100, 8, 10).counts == (20,) * 4 + (0,) * 4
    assert compose(Scope(), HalfWay(at=2)).plan(100, 8, 10).counts == (40,) * 2 + (0,) * 6
    assert duet_vlm.make_method("scope+half_way") == compose(Scope(), HalfWay())


def test_the_pool() -> None:
    """Given, never less than what enters; or the geometric mean of all tokens and those that enter."""
    plan = SpanPlan(1000, 80, 10, (90,) * 4)
    assert compose(Frames(), VisionZip()).pool(plan) == 300
    assert (
        compose(Frames(keep=0.5), VisionZip()).pool(plan) == 500
        and compose(Frames(keep=200), VisionZip()).pool(plan) == 200
    )
    assert compose(Frames(keep=0.01), VisionZip()).pool(plan) == 90
    assert compose(Frames(keep=0.5), PyramidDrop()).pool(plan) == 90  # nobody chooses from it: it enters
    assert compose(VisionZip(), PyramidDrop()).pool(plan) == 1000


def test_settings_of_the_stages_without_a_budget() -> None:
    plan = compose(
        Frames(keep=0.5), VisionZip(dominant=0.3, contextual=0.05), PyramidDrop(schedule=((2, 0.5), (3, 0.2)))
    ).plan(200, 4, None)
    assert (plan.dominant, plan.contextual, plan.counts) == (60, 10, (70, 70, 35, 14))
    plan = compose(Frames(keep=0.5), PyramidDrop()).plan(200, 32, None)  # the paper's stages
    assert plan.counts == (100,) * 8 + (50,) * 8 + (25,) * 8 + (12,) * 8
    plan = compose(Frames(keep=0.5), Duet(schedule=((2, 0.5),))).plan(200, 4, None)  # no V2V set: the pool enters
    assert (plan.dominant, plan.contextual, plan.counts) == (100, 0, (100, 100, 50, 50))
    assert compose(Frames(keep=0.5), VisionZip(dominant=1.0)).plan(200, 4, None).counts == (100,) * 4
    plan = compose(Frames(), Duet(dominant=50, contextual=10)).plan(200, 32, None)
    assert plan.counts == Duet(dominant=50, contextual=10).plan(200, 32, None).counts and duet_schedule(32)[0] == (
        16,
        0.5,
    )
    plan = compose(VisionZip(dominant=50), Duet(schedule=((1, 0.5),))).plan(200, 4, None)
    assert plan.counts == (50, 25, 25, 25)


def test_a_pool_of_a_size_in_front_of_drops_alone_is_what_enters() -> None:
    """PyramidDrop then solves its share for the pool, as it would for an image of that size."""
    plan = compose(Frames(keep=0.5), PyramidDrop()).plan(576, 32, 100)
    assert plan.entry == 288 and plan.counts == PyramidDrop().plan(288, 32, 100).counts
    # a budget above it widens it
    assert compose(Frames(keep=0.1), PyramidDrop()).plan(576, 32, 100).counts == (100,) * 32


def test_neither_budget_nor_settings() -> None:
    with pytest.raises(BudgetError, match=r"frames\+pyramiddrop needs a budget or frames_keep="):
        compose(Frames(), PyramidDrop()).plan(100, 8, None)
    with pytest.raises(BudgetError, match="visionzip needs a budget"):
        compose(Frames(), VisionZip()).plan(100, 8, None)
    with pytest.raises(ValueError, match="visionzip: give either budget= or the method's own settings"):
        compose(VisionZip(dominant=5), PyramidDrop()).plan(100, 8, 10)


# ---- who does what


def test_facts_come_from_the_stages() -> None:
    three = compose(Frames(), VisionZip(), FastV())
    assert (three.name, three.score_layer_offset, three.options.text_query) == ("frames+visionzip+fastv", 1, "last")  # type: ignore[attr-defined]
    assert isinstance(three, EncoderReducer) and isinstance(three, DecoderReducer) and three.compares_frames
    assert three.requires == VisionZip.requires | {Input.FEATURES, Input.SCORES}
    two = compose(Frames(), DivPrune())
    assert not isinstance(two, DecoderReducer) and two.requires == {Input.PROJECTED_FEATURES}
    assert (
        compose(Frames(), PyramidDrop()).requires == {Input.FEATURES, Input.SCORES}
        and compose(VisionZip(), Duet()).options.text_query == "all"
    )  # type: ignore[attr-defined]
    assert not compose(VisionZip(), Duet()).compares_frames
    assert compose(Frames(), UniformTokens(entry=0.5)).requires == {Input.FEATURES}
    assert compose(Frames(), Duet(options=TokenOptions(text_query="last", signal_layer=2))).options.text_query == "last"
    assert compose(VisionZip.official(), PyramidDrop.official()).options.cls_token is True
    assert three.paper == f"{Frames.paper} + {VisionZip.paper} + {FastV.paper}"


@pytest.mark.parametrize(
    "stages",
    [
        (),
        (Frames(),),
        (Frames(), Frames()),
        (Duet(), Frames()),
        (Duet(), Duet()),
        (Duet(), VisionZip()),
        (PyramidDrop(), VisionZip()),
        (PyramidDrop(), FastV()),
        (Frames(), VisionZip(), Scope()),
        (Frames(), NoReduction()),
        (Frames(), VisionZip(), PyramidDrop(), FastV()),
        (compose(Frames(), VisionZip()), PyramidDrop()),
    ],
    ids=lambda stages: "+".join(stage.name for stage in stages) or "nothing",
)
def test_stages_that_do_not_follow_each_other(stages: tuple[duet_vlm.Reducer, ...]) -> None:
    with pytest.raises(ValueError, match="give two to four different methods, at most one of each, in this order"):
        compose(*stages)


def test_stages_that_want_different_things() -> None:
    with pytest.raises(ValueError, match=r"frames wants positions='keep', duet 'compact'; a composition has one"):
        compose(Frames(), Duet(options=TokenOptions(positions="compact")))
    with pytest.raises(ValueError, match=r"pyramiddrop wants positions='compact', duet 'keep'"):
        compose(Duet(), PyramidDrop(options=TokenOptions(positions="compact")))
    with pytest.raises(ValueError, match=r"duet wants text_query='salient', pyramiddrop 'last'"):
        compose(Duet(options=TokenOptions(text_query="salient")), PyramidDrop())
    with pytest.raises(ValueError, match="leave duet_schedule out"):
        compose(Duet(schedule=((2, 0.5),)), PyramidDrop())
    with pytest.raises(ValueError, match="of duet set the drops only"):
        compose(VisionZip(), Duet(dominant=5))
    with pytest.raises(ValueError, match="crops='per_crop' would separate them"):
        compose(Frames(), VisionZip(options=TokenOptions(crops="per_crop")))
    with pytest.raises(TypeError, match="is no method; give instances"):
        compose(Frames(), "duet")  # type: ignore[arg-type]
    assert (
        compose(
            Frames(options=TokenOptions(positions="compact")), Duet(options=TokenOptions(positions="compact"))
        ).options.positions
        == "compact"
    )


# ---- which


def chosen(method: duet_vlm.Reducer, view: EncoderView) -> list[tuple[list[int], dict[int, list[int]]]]:
    """Per span: rows that enter without anyone merged into them, and anchor -> members."""
    assert isinstance(method, EncoderReducer)
    selection = method.select_tokens(view)
    out = []
    for number in range(len(view.plans)):
        index = selection.index[number].tolist()
        joined: dict[int, list[int]] = {}
        for member, into in zip(
            selection.source_tokens[number].tolist(), selection.target_row[number].tolist(), strict=True
        ):
            if into >= 0:
                joined.setdefault(index[into], []).append(member)
        rows = [row for row, real in zip(index, selection.valid[number].tolist(), strict=True) if real]
        out.append(
            (sorted(set(rows) - set(joined)), {anchor: sorted(members) for anchor, members in sorted(joined.items())})
        )
    return out


def with_signals(view: EncoderView, plans: list[SpanPlan], seed: int) -> EncoderView:
    """The view with random attention and keys, and other plans."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.tensor([[p.dominant, p.contextual] for p in plans])
    keys = torch.randn(*view.valid.shape, 5, generator=generator)
    importance = torch.rand(view.valid.shape, generator=generator)
    return EncoderView(
        view.valid, counts[:, 0], counts[:, 1], tuple(plans), importance, keys, view.features, view.parts, view.modality
    )


@pytest.mark.parametrize("method", ["visionzip", "duet"])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    data=st.data(),
    clips=st.lists(st.tuples(st.integers(1, 5), st.integers(2, 8)), min_size=1, max_size=3),
    seed=st.integers(0, 10**6),
)
def test_the_second_stage_works_within_the_pool(method: str, data: st.DataObject, clips: list[Clip], seed: int) -> None:
    """By loops: the pool of each clip, then the published rule on the rows of the pool alone."""
    share = data.draw(st.sampled_from([None, 0.3, 0.6, 1.0]))
    plans = []
    for steps, size in clips:
        entry = data.draw(st.integers(1, steps * size))
        contextual = data.draw(st.integers(0, min(entry - 1, 3))) if entry < steps * size else 0
        plans.append(SpanPlan(steps * size, entry - contextual, contextual, (entry,) * 4))
    view = with_signals(frames_view(clips, [1] * len(clips), seed), plans, seed)
    made = compose(Frames(keep=share), {"visionzip": VisionZip(), "duet": Duet()}[method])
    assert view.features is not None and view.keys is not None and view.importance is not None
    for row, ((steps, size), plan, result) in enumerate(zip(clips, plans, chosen(made, view), strict=True)):
        tokens = steps * size
        root = next(n for n in range(tokens + 1) if n * n >= plan.entry * tokens)
        wanted = root if share is None else int(share * tokens + 1e-9)
        pool = kept_of_clip(view.features[row, :tokens].double().tolist(), steps, max(plan.entry, wanted))
        importance, keys = view.importance[row][pool].tolist(), view.keys[row][pool].double().tolist()
        if method == "visionzip":
            dominant, merged = reference_ops.visionzip_entry(importance, keys, plan.dominant, plan.contextual, "spread")
        else:
            dominant, merged = reference_ops.duet_entry(importance, keys, plan.dominant, plan.contextual, 4, "spread")
        alone = [pool[i] for i in dominant] + [pool[anchor] for anchor, members in merged.items() if not members]
        joined = {pool[anchor]: sorted(pool[i] for i in members) for anchor, members in merged.items() if members}
        assert result == (sorted(alone), dict(sorted(joined.items())))


def test_the_pool_of_an_image_is_the_image() -> None:
    plans = [SpanPlan(12, 4, 2, (6,) * 4)] * 2
    view = with_signals(frames_view([(3, 4), (1, 12)], [1, 1], stream="image"), plans, 5)
    assert chosen(compose(Frames(keep=0.5), VisionZip()), view) == chosen(VisionZip(), view)


def test_without_a_second_stage_the_pool_enters() -> None:
    view = frames_view([(3, 4), (2, 5)], [7, 3])
    assert chosen(compose(Frames(), PyramidDrop()), view) == chosen(Frames(), view)


# ---- on models


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_clips_are_narrowed_and_images_are_not(family: str) -> None:
    made, model = FAMILIES[family], shared(family)
    inputs = made.inputs(CLIPS)
    fields: dict[str, Any] = {"visionzip_dominant": 0.3, "visionzip_contextual": 0.1}
    with duet_vlm.attach(model, "visionzip", dominant=0.3, contextual=0.1) as handle:
        forward(model, inputs)
        plain = [span for row in handle.trace for span in row]
    with duet_vlm.attach(model, "frames", keep=0.5) as handle:
        forward(model, inputs)
        pools = [set(span.stages[0].kept) for row in handle.trace for span in row]
    with duet_vlm.attach(model, "frames+visionzip", frames_keep=0.5, **fields) as handle:
        forward(model, inputs)
        composed = [span for row in handle.trace for span in row]
    changed = 0
    for span, pool, before, picture in zip(composed, pools, plain, pictures_of(CLIPS), strict=True):
        kept = set(span.stages[0].kept)
        if picture.frames:
            assert kept | {m for members in span.merged.values() for m in members} <= pool
            changed += kept != set(before.stages[0].kept)
        else:
            assert (span.stages, span.merged) == (before.stages, before.merged)
    assert changed


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("made", MADE)
def test_clips_meet_the_budget(family: str, made: str) -> None:
    model, inputs, (clip,) = shared(family), FAMILIES[family].inputs([CLIP]), pictures_of([CLIP])
    tokens = FAMILIES[family].tokens(clip)
    with duet_vlm.attach(model, MADE[made], budget=0.6) as handle:
        forward(model, inputs)
        report = handle.report()
    assert report.method == MADE[made].name and report.measured == report.nominal
    assert 0.6 * tokens - 1 < report.measured_mean <= 0.6 * tokens


# ---- by every way


def test_by_name_by_instance_and_by_setting() -> None:
    model, name = shared("llava"), "frames+visionzip+pyramiddrop"
    made = compose(
        Frames(keep=0.7), VisionZip(dominant=0.4, contextual=0.2), PyramidDrop(schedule=((2, 0.5), (4, 0.25), (6, 0.1)))
    )
    with duet_vlm.attach(model, name, **REDUCING[name]) as handle:
        assert (
            handle.reducer == made
            and hash(handle.reducer) == hash(made)
            and handle.reducer == duet_vlm.make_method(name, **REDUCING[name])
        )
        handle.set(frames_keep=0.8, options=TokenOptions(positions="compact"))
        assert handle.reducer.settings() == merged(
            made.settings(), {"frames_keep": 0.8, "options": {"positions": "compact"}}
        )
        with pytest.raises(ValueError, match="dominant=-1"):
            handle.set(visionzip_dominant=-1)
        with pytest.raises(
            ValueError,
            match=r"frames\+visionzip\+pyramiddrop has no setting 'keep' \(did you mean 'frames_keep'\?\); its settings",
        ):
            handle.set(keep=0.5)
        assert handle.reducer.settings()["frames_keep"] == 0.8
    with duet_vlm.attach(model, made, options=TokenOptions(text_query="all")) as handle:
        assert handle.reducer.options.text_query == "all"
    assert pickle.loads(pickle.dumps(made)) == copy.deepcopy(made) == made


@pytest.mark.parametrize("name", ["frames+nothing", "frames+", "+", "frames++duet"])
def test_unknown_stages(name: str) -> None:
    with pytest.raises(ValueError, match="unknown method"):
        duet_vlm.make_method(name)


def test_a_checkpoint_remembers_it() -> None:
    model = build("qwen2_vl")
    with duet_vlm.attach(
        model, compose(Frames(keep=0.75), Duet(), PyramidDrop(schedule=((2, 0.5),))), budget=0.25
    ) as handle:
        duet_vlm.save_to_config(handle)
        reducer = handle.reducer
    written = json.loads(json.dumps(model.config.duet_vlm))
    assert written == {
        "method": "frames+duet+pyramiddrop", "budget": 0.25, "settings": {"frames_keep": 0.75, "pyramiddrop_schedule": [[2, 0.5]]},
    }  # fmt: skip
    model.config.duet_vlm = written
    with duet_vlm.attach(model) as handle:
        assert (handle.reducer, handle.budget) == (reducer, 0.25)


def test_on_the_command_line(tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    Image.new("RGB", (224, 224), "red").save(picture)
    command = [
        "run",
        "-i",
        str(picture),
        "-p",
        "What colour?",
        "--method",
        "frames+duet",
        "--budget",
        "0.2",
        "--set",
        "frames_keep=0.5",
        "--json",
    ]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)["report"]
    assert report["method"] == "frames+duet" and report["settings"]["frames_keep"] == 0.5
    refused = CliRunner().invoke(app, [*command[:6], "duet+frames", *command[7:]])
    assert refused.exit_code != 0 and "in this order: a method in the tower, frames" in refused.output


def test_in_an_evaluation() -> None:
    assert cells_of("duet,frames+duet[frames_keep=0.5;options.text_query=last]") == [
        ("duet", []),
        ("frames+duet", ["frames_keep=0.5", "options.text_query=last"]),
    ]
    made = compose(Frames(keep=0.5), Duet())
    run = {"method": made.name, "settings": made.settings(), "solved": None}
    assert (
        console.settings(run) == "frames_keep=0.5"
        and "frames_keep=0.5; " in console.settings(run | {"method": "not_installed"}) + "; "
    )


def test_nothing_is_read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = [SpanPlan(12, 4, 2, (6,) * 4), SpanPlan(10, 3, 1, (4,) * 4)]
    view = with_signals(frames_view([(3, 4), (2, 5)], [1, 1]), plans, 3)

    def refuse(*args: Any) -> Any:
        raise AssertionError("reads the device")

    for name in ("item", "tolist", "__bool__", "__int__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    for second in (VisionZip(), Duet(), DivPrune(), Scope(), PruMerge(), ToMe()):
        made = compose(Frames(), second)
        assert isinstance(made, EncoderReducer)
        made.select_tokens(view)
